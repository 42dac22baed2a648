"""Where the graph of a source comes from: its own, torch's exporter, or an .onnx file that is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoquant_core.model import Source


def graph_of(source: Source, example: Any, path: str) -> Source:
    """The source with an ONNX graph."""
    return source

"""What monoquant-onnx registers."""

from __future__ import annotations

from collections.abc import Iterable

from monoquant_core.declarations import SourceDeclaration
from monoquant_core.hookspecs import hookimpl


@hookimpl
def monoquant_register_sources() -> Iterable[SourceDeclaration]:
    """The reader of graphs."""
    return [SourceDeclaration("onnx", "ONNX graphs", "monoquant_onnx.source:OnnxReader", suffixes=(".onnx",))]

"""Where the graph of a source comes from: its own, torch's exporter, or an .onnx file that is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.errors import PlanError
from monoquant_onnx.graph import OnnxGraph

if TYPE_CHECKING:
    from monoquant_core.model import Source


def graph_of(source: Source, example: Any, path: str = "") -> Source:
    """The source with an ONNX graph: itself where it has one, else what torch exports.

    :param example: a batch to trace with, or None.
    :param path: an .onnx file whose graph a finished source's codes go into.
    :raises MonoquantError: when there is no way to a graph, saying what would be one.
    """
    finished = any(spec.encoding is not None for spec in source.specs())
    if path:
        from monoquant_onnx.finished import GraphedSource
        from monoquant_onnx.source import open_onnx

        if not finished:
            raise PlanError(f"{source.info.name}: --graph is for finished files", hint=f"quantize {path} itself")
        if not Path(path).is_file():
            raise PlanError(f"--graph {path}: no such file")
        return GraphedSource(open_onnx(Path(path)), source)
    if isinstance(source.info.graph, OnnxGraph):
        return source
    if finished:
        raise PlanError(
            f"{source.info.name}: is quantized already, and ONNX needs the graph of its model",
            hint="--graph model.onnx takes it from a file: export the original model with --format onnx",
        )
    from monoquant_onnx.tracing import trace

    return trace(source, example)

"""Which opset a file needs, and how an older graph gets there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from monoquant_core.errors import UnsupportedEncodingError
from monoquant_core.exporters import Placed
from monoquant_onnx.layouts import BLOCK_OPSET, Layout, layout_of

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

PAIRS_OPSET = 13  #: QuantizeLinear along an axis, and everything that dynamic products need

#: opset -> IR version whose checker knows its types
_IR_VERSIONS = ((25, 13), (24, 12), (23, 11), (21, 10), (19, 9), (0, 8))


def needed(placed: Sequence[Placed]) -> int:
    """The lowest opset that holds every encoding of a plan."""
    opset = 0
    for item in placed:
        if item.held.encoding is None:
            continue
        layout = layout_of(item.output.shape, item.held.encoding)
        assert isinstance(layout, Layout)
        looked_up = "Gather" in item.held.layout and layout.axis is not None
        opset = max(opset, PAIRS_OPSET, layout.opset, BLOCK_OPSET if looked_up else 0)
    return opset


def raised(graph: OnnxGraph, opset: int) -> ir.Model:
    """The model at an opset that is at least this one; the model itself if it is already.

    :raises UnsupportedEncodingError: when onnx cannot convert it.
    """
    model = graph.model
    if graph.opset >= opset:
        return model
    proto, data = without_data(model, set(graph.data))
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(proto, opset))
    except Exception as exc:
        reason = " ".join(str(exc).split())[:200]
        raise UnsupportedEncodingError(
            f"{graph.name}: needs opset {opset}, and onnx cannot convert it from {graph.opset}: {reason}",
            hint=f"export it with opset {opset}",
        ) from exc
    for value in list(converted.graph.inputs):
        if value.name in data:
            value.const_value = data[value.name].const_value
            converted.graph.inputs.remove(value)
            converted.graph.register_initializer(value)
    return converted


def without_data(model: ir.Model, names: set[str]) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """The model with some initializers as inputs instead, and these initializers: nothing reads their data."""
    data = {name: value for name, value in model.graph.initializers.items() if name in names}
    copy = model.clone()
    for name in data:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    copy.ir_version = max(copy.ir_version, ir_version(copy.opset_imports.get("", 0)))
    return ir.to_proto(copy), data


def ir_version(opset: int) -> int:
    """The IR version that goes with an opset."""
    return next(version for least, version in _IR_VERSIONS if opset >= least)

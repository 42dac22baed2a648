"""What the nodes of a graph say about a weight: its kind, its axes, the layer that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_core import kinds
from monoquant_core.model import ModelInfo, TensorSpec

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

#: kinds that a name tells and an operator does not
_BY_NAME = ("head", "router", "position", "state")

#: operator -> kind of its weights, by input
_OPERATORS: dict[str, dict[int, str]] = {
    **{op: {1: "conv", 2: "bias"} for op in ("Conv", "DeformConv")},
    "ConvTranspose": {1: "conv_transpose", 2: "bias"},
    **{op: {1: "recurrent", 2: "recurrent", 3: "bias"} for op in ("LSTM", "GRU", "RNN")},
    **{
        op: {1: "norm", 2: "norm", 3: "norm", 4: "norm"}
        for op in ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization")
    },
    **{op: {1: "norm"} for op in ("RMSNormalization", "SimplifiedLayerNormalization")},
}


def use_order(graph: OnnxGraph) -> dict[str, int]:
    """Initializer -> position among all initializers by their first use."""
    order: dict[str, int] = {}
    for node in graph.model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.name in graph.data:
                order.setdefault(value.name, len(order))
    return order


def kind_of_use(graph: OnnxGraph, initializer: str, spec: TensorSpec, info: ModelInfo) -> str:
    """The kind of a tensor: what its name says where that says more than the operator, else what the operator says.

    Matrices are "linear" where they lie as ``[outputs, inputs]``, "linear_transposed" where as ``[inputs, outputs]``.
    """
    named = kinds.kind_of(spec, info)
    found = {_kind_of(node, index, spec) for node, index in uses_through(graph, initializer)}
    if "embedding" in found:  # tied to the output layer or not: it is looked up
        return named if named == "position" else "embedding"
    if named in _BY_NAME:
        return "head_transposed" if named == "head" and found == {"linear_transposed"} else named
    if len(found) == 1 and (kind := found.pop()):
        return kind
    if not spec.is_float:
        return "state"  # indices, masks
    return named if named in ("bias", "norm", "vector", "embedding") else "vector" if len(spec.shape) < 2 else ""


def uses_through(graph: OnnxGraph, initializer: str) -> list[tuple[ir.Node, int]]:
    """Uses of an initializer; one that goes through Identity or Cast is a use of the value behind it."""
    found: list[tuple[ir.Node, int]] = []
    pending = graph.uses(initializer)
    while pending:
        node, index = pending.pop()
        if node.domain in ("", "ai.onnx") and node.op_type in ("Identity", "Cast"):
            pending += [(use.node, use.idx) for use in node.outputs[0].uses()]
        else:
            found.append((node, index))
    return found


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    found = node.attributes.get(name)
    return found.as_int() if isinstance(found, ir.Attr) else default


def _kind_of(node: ir.Node, index: int, spec: TensorSpec) -> str:
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return ""
    rank = len(spec.shape)
    op = node.op_type
    if op in _OPERATORS:
        return _OPERATORS[op].get(index, "")
    if rank < 2:
        return ""
    if op == "Gather" and index == 0 and rank == 2 and attribute(node, "axis", 0) == 0:
        return "embedding"
    if op == "MatMul" and rank == 2:
        return "linear_transposed" if index == 1 else "linear"
    if op == "Gemm":
        if index == 1:
            return "linear" if attribute(node, "transB", 0) else "linear_transposed"
        if index == 0:
            return "linear_transposed" if attribute(node, "transA", 0) else "linear"
    if op == "Transpose" and rank == 2 and (behind := _behind(node)) is not None:
        turned = {"linear": "linear_transposed", "linear_transposed": "linear"}
        return turned.get(_kind_of(*behind, spec), "")
    return ""


#: operators whose channels are axis 1
_CHANNELS_FIRST = {
    *("Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"),
}


@dataclass(frozen=True)
class Points:
    """Where a graph can be observed: point -> (value, channel axis)."""

    modules: dict[str, tuple[str, int]]  #: inputs and outputs of the layers that have weights
    values: dict[str, tuple[str, int]]  #: every value that holds floats
    default: dict[str, tuple[str, int]]  #: those whose statistics a plan could use

    def find(self, point: str) -> tuple[str, int] | None:
        """The value of a point, or None if there is none."""
        return self.modules.get(point) or self.values.get(point)


def points_of(graph: OnnxGraph) -> Points:
    """The points of a graph.

    The plan of a convolutional net can use every value, that of other nets what flows into and out of weights.
    """
    main = graph.model.graph
    made = [value for node in main for value in node.outputs if value.name and _is_float(value)]
    floats = [value for value in main.inputs if value.name and _is_float(value)] + made
    values = {value.name: (value.name, _channel_axis(value)) for value in floats if value.name}
    modules: dict[str, tuple[str, int]] = {}
    for name, initializer in graph.names.items():
        for node, index in graph.uses(initializer):
            taken = layer_input(node, index)
            if taken is None or taken.name not in values:
                continue
            module = name.removesuffix(".weight")
            modules[f"{module}:input"] = values[taken.name]
            if module != name and (result := layer_output(graph, node)).name in values:
                modules[f"{module}:output"] = values[result.name]
            break
    convolutional = any(node.op_type in ("Conv", "ConvTranspose") for node in main)
    return Points(modules, values, {**modules, **values} if convolutional else modules)


def layer_input(node: ir.Node, index: int) -> ir.Value | None:
    """The activation that meets a weight in a node; None where the weight is none."""
    if index == 1 and node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN"):
        return node.inputs[0]
    if index == 0 and node.op_type in ("MatMul", "Gemm"):
        return node.inputs[1]
    if index == 0 and node.op_type == "Transpose" and (behind := _behind(node)) is not None:
        return layer_input(*behind)
    return None


def layer_output(graph: OnnxGraph, node: ir.Node) -> ir.Value:
    """What a layer gives: the value behind its bias, where that is added by a node of its own."""
    if node.op_type == "Transpose" and (behind := _behind(node)) is not None:
        return layer_output(graph, behind[0])
    value = node.outputs[0]
    uses = list(value.uses())
    if node.op_type == "MatMul" and len(uses) == 1 and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and other.name in graph.data and len(graph.data[other.name].shape) == 1:
            return uses[0].node.outputs[0]
    return value


def _behind(transpose: ir.Node) -> tuple[ir.Node, int] | None:
    """The product that takes a transposed weight."""
    found = ((use.node, use.idx) for use in transpose.outputs[0].uses() if use.node.op_type in ("MatMul", "Gemm"))
    return next(found, None)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _channel_axis(value: ir.Value) -> int:
    node = value.producer()
    near = [use.node.op_type for use in value.uses()] + ([node.op_type] if node is not None else [])
    if any(op in _CHANNELS_FIRST for op in near):
        return 1
    return 1 if value.shape is not None and len(value.shape) in (4, 5) and node is not None else -1

"""Layers as runtimes want them: BatchNorm folded into the layer before it, so that what is quantized is what runs.

``BN(W x + b) = (f W) x + (f (b - mean) + beta)`` with ``f = gamma / sqrt(variance + epsilon)`` per output channel
(Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_onnx.data import Data, MemoryData, ScaledData, whole
from monoquant_onnx.layers import attribute

if TYPE_CHECKING:
    import torch

    from monoquant_onnx.graph import OnnxGraph


_EINSUM = re.compile(r"(\w+)(\w),(\w)(\w)->\1(\w)")


def fold_batch_norms(graph: OnnxGraph) -> list[str]:
    """Fold every BatchNorm that follows a convolution or a matrix and has no other use of its input between.

    :return: a note on what was done.
    """
    folded = [node for node in list(graph.model.graph) if node.op_type == "BatchNormalization" and _fold(graph, node)]
    if not folded:
        return []
    graph.tidy()
    return [f"{graph.name}: {len(folded)} BatchNorm folded into the weights before them"]


def einsums_to_matmuls(graph: OnnxGraph) -> None:
    """``Einsum("btf,fh->bth", x, W)`` and ``"btf,hf->bth"`` are a MatMul with a matrix, which runtimes quantize."""
    for node in list(graph.model.graph):
        equation = node.attributes.get("equation")
        if node.op_type != "Einsum" or not isinstance(equation, ir.Attr) or len(node.inputs) != 2:
            continue
        weight = node.inputs[1]
        data = graph.data.get(weight.name or "") if weight is not None else None
        found = _EINSUM.fullmatch(equation.as_string().replace(" ", ""))
        if weight is None or not isinstance(data, MemoryData) or found is None or len(list(weight.uses())) != 1:
            continue
        rows, k, first, second, n = found.groups()
        if {first, second} != {k, n} or k == n or {k, n} & set(rows) or len(set(rows)) != len(rows):
            continue
        if first == n:
            graph.bind(weight.name or "", MemoryData(data.tensor.T))
        made = ir.node("MatMul", [node.inputs[0], weight], name=node.name, num_outputs=1)
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        graph.model.graph.insert_before(node, made)
        name = node.outputs[0].name
        ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0], replace_graph_outputs=True)
        graph.model.graph.remove(node, safe=True)
        made.outputs[0].name = name


def _fold(graph: OnnxGraph, norm: ir.Node) -> bool:
    value = norm.inputs[0]
    layer = value.producer() if value is not None else None
    if value is None or layer is None or layer.domain not in ("", "ai.onnx") or value.is_graph_output():
        return False
    if len(list(value.uses())) != 1 or attribute(norm, "training_mode", 0) or any(o.uses() for o in norm.outputs[1:]):
        return False
    axis = _out_axis(layer)
    weight = layer.inputs[1] if len(layer.inputs) > 1 else None
    if axis is None or weight is None or weight.name not in graph.data or len(graph.uses(weight.name)) != 1:
        return False
    params = [graph.constant(v) for v in norm.inputs[1:5]]
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    old = graph.constant(bias) if bias is not None else None
    if any(p is None for p in params) or (bias is not None and old is None):
        return False
    gamma, beta, mean, variance = (whole(p).double() for p in params if p is not None)
    base = graph.data[weight.name]
    if gamma.ndim != 1 or gamma.numel() != base.shape[axis] or (old is not None and old.shape != tuple(gamma.shape)):
        return False
    epsilon = norm.attributes.get("epsilon")
    factor = gamma / (variance + (epsilon.as_float() if isinstance(epsilon, ir.Attr) else 1e-5)).sqrt()
    shift = beta + factor * ((whole(old).double() if old is not None else 0) - mean)
    graph.bind(weight.name, _scaled(base, factor, axis))
    graph.folded[weight.name] = (factor, axis)
    _set_bias(graph, layer, weight.name, bias, shift.to(whole(params[1]).dtype if params[1] is not None else None))
    made, target = norm.outputs[0], layer.outputs[0]
    name = made.name
    ir.convenience.replace_all_uses_with(made, target, replace_graph_outputs=True)
    graph.model.graph.remove(norm, safe=True)
    target.name = name  # outputs of the graph keep their names
    return True


def _out_axis(layer: ir.Node) -> int | None:
    """The axis of a weight that its output channels lie along; None where no factor per channel can go in."""
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose" and attribute(layer, "group", 1) == 1:
        return 1
    alpha = layer.attributes.get("alpha"), layer.attributes.get("beta")
    if layer.op_type == "Gemm" and all(not isinstance(a, ir.Attr) or a.as_float() == 1 for a in alpha):
        return 0 if attribute(layer, "transB", 0) else 1
    return None


def _scaled(base: Data, factor: torch.Tensor, axis: int) -> Data:
    if isinstance(base, ScaledData) and base.axis == axis:
        return ScaledData(base.base, base.factor * factor, axis)
    return ScaledData(base, factor, axis)


def _set_bias(graph: OnnxGraph, layer: ir.Node, weight: str, bias: ir.Value | None, values: torch.Tensor) -> None:
    if bias is not None and bias.name is not None and len(list(bias.uses())) == 1:
        graph.bind(bias.name, MemoryData(values))
        return
    name = graph.free_name(f"{weight.removesuffix('.weight')}.bias")
    graph.bind(name, MemoryData(values))
    layer.resize_inputs(3)
    layer.replace_input_with(2, graph.model.graph.initializers[name])

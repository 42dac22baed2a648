"""Finished files read back: nodes that dequantize a weight become the weight, with its encoding.

So a quantized graph is the float graph again, whose weights happen to be quantized, and every command takes it as it
takes any other source. Nodes that are not understood stay: the graph computes what it did in any case.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_core import encoding as e
from monoquant_core.errors import EncodingError
from monoquant_onnx.data import Data, MemoryData, QuantizedData, reshaped, whole
from monoquant_onnx.layers import attribute

if TYPE_CHECKING:
    import torch

    from monoquant_onnx.graph import OnnxGraph

_ELEMENTS = {
    element.name: element
    for element in (
        *(e.INT8, e.UINT8, e.INT4, e.UINT4, e.INT2, e.UINT2, e.integer(16), e.integer(16, signed=False)),
        *(e.FLOAT8_E4M3FN, e.FLOAT8_E5M2, e.FLOAT4_E2M1FN),
    )
}
_SUFFIX = re.compile(r"[._](quantized|codes)$")


def recognise(graph: OnnxGraph) -> None:
    """Turn quantized weights into initializers of their own, and take activations' Q/DQ pairs out."""
    changed = False
    for node in list(graph.model.graph):
        if node.domain not in ("", "ai.onnx", "com.microsoft") or node.graph is None:
            continue
        if node.op_type == "DequantizeLinear":
            changed |= _weight(graph, node) or _gathered(graph, node) or _activation(graph, node)
        elif node.op_type == "MatMulInteger":
            changed |= _integer_matmul(graph, node)
    if changed:
        _activations_of_weights(graph)
        graph.tidy()


def encoded(
    codes: Data, scale: Data, zero_point: Data | None, axis: int, block_size: int
) -> QuantizedData | MemoryData | None:
    """What DequantizeLinear makes of constants; None when the IR has no such encoding. 32-bit biases become floats."""
    rank = len(codes.shape)
    if codes.dtype == "int32" and not block_size and zero_point is None:
        values = whole(codes).double() * _along(whole(scale).double(), axis, rank)
        return MemoryData(values.to(whole(scale).dtype))
    element = _ELEMENTS.get(codes.dtype)
    if element is None or not codes.shape or not scale.dtype.startswith(("float", "bfloat")):
        return None
    block = _block(scale.shape, rank, axis, block_size)
    grid = e.param_shape(codes.shape, block)
    if (scale.shape != grid) if block_size else (math.prod(scale.shape) != math.prod(grid) or len(scale.shape) > 1):
        return None
    where = _in_shape(scale, grid)
    if where is None:
        return None
    zeros, shift = _zero_points(element, zero_point, grid)
    if shift:
        element = e.integer(element.bits, signed=False)
    param: e.Param = where.encoding if isinstance(where, QuantizedData) else where.dtype
    if param == e.FLOAT8_E8M0FNU.name:
        param = e.FLOAT8_E8M0FNU
    unsigned = element.kind == "int" and not element.signed
    try:
        found = e.Encoding(element, block, param, zero_point=element if unsigned else None)
        found.check_weight()
    except EncodingError:
        return None
    return QuantizedData(codes, where, zeros, found, shift)


def _block(scale: tuple[int, ...], rank: int, axis: int, block_size: int) -> tuple[int, ...]:
    """What shares a scale, as DequantizeLinear has it."""
    if block_size:
        return tuple(block_size if i == axis % rank else 1 for i in range(rank))
    return e.per_tensor(rank) if math.prod(scale) == 1 else e.per_channel(rank, axis)


def _zero_points(element: e.ElementType, given: Data | None, grid: tuple[int, ...]) -> tuple[Data | None, int]:
    """Zero points that there really are, and what makes them and their codes unsigned."""
    if given is None or element.kind != "int":
        return None, 0
    zeros = reshaped(given, grid)
    if not element.signed:
        return zeros, 0
    # onnxruntime's tools write zero points that are 0.
    return (zeros, 1 << element.bits - 1) if bool(whole(zeros).any()) else (None, 0)


def _weight(graph: OnnxGraph, node: ir.Node) -> bool:
    """``DequantizeLinear(codes, scale[, zero point])`` of constants."""
    source, turned = _untransposed(node.inputs[0])
    codes = graph.constant(source)
    if codes is None or isinstance(codes, QuantizedData):
        return False
    axis = attribute(node, "axis", 1)
    found = _dequantized(graph, node, codes, 1 - axis % 2 if turned else axis, turned=turned)
    if found is None:
        return False
    if not turned:
        _become(graph, source, found, [node.outputs[0]])
        return True
    made = ir.node("Transpose", [None], {"perm": [1, 0]}, num_outputs=1)
    graph.model.graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    _become(graph, source, found, [], into=(made, 0))
    _replace(graph, node.outputs[0], made.outputs[0])
    for use in list(made.outputs[0].uses()):  # a Gemm transposes on its own
        if use.node.op_type == "Gemm" and use.idx == 1:
            use.node.attributes["transB"] = ir.AttrInt64("transB", 1 - attribute(use.node, "transB", 0))
            use.node.replace_input_with(1, made.inputs[0])
    if not made.outputs[0].uses() and not made.outputs[0].is_graph_output():
        graph.model.graph.remove(made, safe=True)
    return True


def _gathered(graph: OnnxGraph, node: ir.Node) -> bool:
    """``DequantizeLinear(Gather(codes, ids), ...)``: an embedding, of which only the rows in use are dequantized."""
    gather = node.inputs[0].producer() if node.inputs[0] is not None else None
    if gather is None or gather.op_type != "Gather" or attribute(gather, "axis", 0):
        return False
    codes = graph.constant(gather.inputs[0])
    if codes is None or len(codes.shape) != 2 or len(list(gather.outputs[0].uses())) != 1:
        return False
    ids = gather.inputs[1]
    axis = attribute(node, "axis", 1)
    rank = None if ids is None or ids.shape is None else len(ids.shape) + 1
    last = axis == -1 or (rank is not None and axis == rank - 1)
    size = attribute(node, "block_size", 0)
    params = [_looked_up(graph, value, ids) if size else graph.constant(value) for value in node.inputs[1:3]]
    scale, zeros = [*params, None][:2]
    if scale is None or (math.prod(scale.shape) != 1 and not last) or (zeros is None and len(params) > 1):
        return False
    found = encoded(codes, scale, zeros, 1, size)
    if isinstance(found, QuantizedData) and size and found.shape[1] == size:  # one block is the whole row
        found = dataclasses.replace(found, encoding=dataclasses.replace(found.encoding, block=e.per_row(2)))
    if found is None:
        return False
    made = ir.node("Gather", [None, ids], name=gather.name, num_outputs=1)
    graph.model.graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    _become(graph, gather.inputs[0], found, [], into=(made, 0))
    _replace(graph, node.outputs[0], made.outputs[0])
    return True


def _looked_up(graph: OnnxGraph, value: ir.Value | None, ids: ir.Value | None) -> Data | None:
    """Parameters that are looked up with the same indices as the codes."""
    gather = value.producer() if value is not None else None
    if gather is None or gather.op_type != "Gather" or attribute(gather, "axis", 0) or gather.inputs[1] is not ids:
        return None
    return graph.constant(gather.inputs[0])


def _integer_matmul(graph: OnnxGraph, node: ir.Node) -> bool:
    """``Mul(Cast(MatMulInteger(q, codes, zero, zeros)), Mul(x scale, scale))`` behind DynamicQuantizeLinear."""
    quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    source, turned = _untransposed(node.inputs[1])
    codes = graph.constant(source)
    if quantize is None or quantize.op_type != "DynamicQuantizeLinear" or codes is None:
        return False
    cast = _only_use(node.outputs[0], "Cast")
    first = _only_use(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or first is None:
        return False
    found = _scales(graph, cast, first, quantize.outputs[1])
    if found is None:
        return False
    weight_scale, result = found
    zeros = graph.constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    x = quantize.inputs[0]
    if turned and (x is None or x.shape is None or len(x.shape) != 2):
        return False
    weight = encoded(codes, _flat(weight_scale), zeros, 0 if turned else len(codes.shape) - 1, 0)
    if not isinstance(weight, QuantizedData):
        return False
    activation = e.ActivationQuant(e.UINT8, "tensor", dynamic=True, symmetric=False)
    weight = dataclasses.replace(weight, activation=activation)
    kind, attributes = ("Gemm", {"transB": 1}) if turned else ("MatMul", {})
    made = ir.node(kind, [x, None], attributes, name=node.name, num_outputs=1)
    graph.model.graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = result.shape, result.type
    _become(graph, source, weight, [], into=(made, 1))
    _replace(graph, result, made.outputs[0])
    return True


def _scales(graph: OnnxGraph, cast: ir.Node, first: ir.Node, x_scale: ir.Value) -> tuple[Data, ir.Value] | None:
    """The weight's scale and the result, from the products behind a MatMulInteger."""
    other = next((v for v in first.inputs if v is not None and v is not cast.outputs[0]), None)
    if other is None:
        return None
    if other is x_scale or graph.constant(other) is not None:  # (cast * a) * b
        second = _only_use(first.outputs[0], "Mul")
        if second is None:
            return None
        last = next((v for v in second.inputs if v is not None and v is not first.outputs[0]), None)
        pair, result = [other, last], second.outputs[0]
    else:  # cast * (a * b)
        product = other.producer()
        if product is None or product.op_type != "Mul":
            return None
        pair, result = list(product.inputs), first.outputs[0]
    weight = [graph.constant(v) for v in pair if v is not x_scale]
    if len(weight) != 1 or weight[0] is None:
        return None
    return weight[0], result


def _activation(graph: OnnxGraph, node: ir.Node) -> bool:
    """A pair ``DequantizeLinear(QuantizeLinear(x))`` with one range: x, rounded when the finished file runs."""
    quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return False
    ours = [graph.constant(v) for v in node.inputs[1:3]]
    theirs = [graph.constant(v) for v in quantize.inputs[1:3]]
    if len(ours) != 2 or len(theirs) != 2 or any(d is None or math.prod(d.shape) != 1 for d in (*ours, *theirs)):
        return False
    (scale, zero), other = ([whole(d).reshape(()) for d in pair if d is not None] for pair in (ours, theirs))
    if zero.dtype != other[1].dtype or any(bool(a != b) for a, b in zip((scale, zero), other, strict=True)):
        return False
    element = _ELEMENTS.get(ours[1].dtype if ours[1] is not None else "")
    source = quantize.inputs[0]
    if element is None or element.kind != "int" or source is None or source.name is None:
        return False
    low, high = element.code_range
    graph.ranges[source.name] = (float(scale) * (low - int(zero)), float(scale) * (high - int(zero)))
    name = node.outputs[0].name
    if node.outputs[0].is_graph_output():
        if source.is_graph_input() or source.is_graph_output():
            del graph.ranges[source.name]
            return False
        graph.ranges[name or ""] = graph.ranges.pop(source.name)
        _replace(graph, node.outputs[0], source)
        source.name = name
    else:
        _replace(graph, node.outputs[0], source)
    return True


def _activations_of_weights(graph: OnnxGraph) -> None:
    """Say of quantized weights how their input was quantized."""
    for name, data in list(graph.data.items()):
        if not isinstance(data, QuantizedData) or data.activation is not None:
            continue
        for node, index in graph.uses(name):
            value = node.inputs[0]
            if index == 1 and value is not None and value.name in graph.ranges:
                low, high = graph.ranges[value.name]
                static = e.ActivationQuant(e.UINT8, "tensor", dynamic=False, symmetric=False, low=low, high=high)
                graph.data[name] = dataclasses.replace(data, activation=static)


def _untransposed(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """What a matrix was before a Transpose, and whether there is one."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose":
        return value, False
    perm = node.attributes.get("perm")
    if perm is not None and list(perm.as_ints()) != [1, 0]:
        return value, False
    return node.inputs[0], True


def _dequantized(
    graph: OnnxGraph, node: ir.Node, codes: Data, axis: int, *, turned: bool = False
) -> QuantizedData | MemoryData | None:
    inputs = [*node.inputs, None][:3]
    if turned:
        inputs = [_untransposed(value)[0] for value in inputs]
    if (cast := inputs[1].producer() if inputs[1] is not None else None) is not None and cast.op_type == "Cast":
        inputs[1] = cast.inputs[0]  # of powers of two, which are no floats to DequantizeLinear
    scale, zeros = graph.constant(inputs[1]), graph.constant(inputs[2])
    if scale is None or (zeros is None and inputs[2] is not None):
        return None
    if codes.dtype == "int32" and zeros is not None and not bool(whole(zeros).any()):
        zeros = None
    return encoded(codes, scale, zeros, axis, attribute(node, "block_size", 0))


def _become(
    graph: OnnxGraph,
    codes: ir.Value | None,
    data: QuantizedData | MemoryData,
    results: list[ir.Value],
    into: tuple[ir.Node, int] | None = None,
) -> None:
    """Make an initializer of the dequantized weight, under the name that the codes have without their suffix."""
    assert codes is not None
    old = codes.name or ""
    wanted = _SUFFIX.sub("", old)
    if wanted == old and old in graph.model.graph.initializers:
        name = old  # the codes give their name away, and go once nothing uses them
        codes.name = graph.free_name(f"{old}_codes")
        if old in graph.data:
            graph.data[codes.name] = graph.data.pop(old)
    else:
        name = wanted if wanted not in graph.model.graph.initializers else graph.free_name(wanted)
    graph.bind(name, data)
    initializer = graph.model.graph.initializers[name]
    for result in results:
        _replace(graph, result, initializer)
    if into is not None:
        into[0].replace_input_with(into[1], initializer)


def _replace(graph: OnnxGraph, old: ir.Value, new: ir.Value) -> None:
    """Use one value for another. An output of the graph keeps its name."""
    name, output = old.name, old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node = old.producer()
    if node is not None and node.graph is not None and not any(o.uses() for o in node.outputs):
        node.graph.remove(node, safe=True)
    if output and new.producer() is not None:
        new.name = name


def _only_use(value: ir.Value, op: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op else None


def _flat(data: Data) -> Data:
    """A scale as a vector, or a scalar where it is one number."""
    count = math.prod(data.shape)
    return data if isinstance(data, QuantizedData) else reshaped(data, () if count == 1 else (count,))


def _in_shape(scale: Data, grid: tuple[int, ...]) -> Data | None:
    """A scale in the shape that its blocks have; nested ones that ONNX has as a vector, too."""
    if not isinstance(scale, QuantizedData):
        return reshaped(scale, grid)
    if scale.shape == grid:
        return scale
    inner = scale.encoding
    if any(b != e.FULL for b in inner.block):
        return None
    block = e.per_tensor(len(grid))
    small = e.param_shape(grid, block)
    zeros = reshaped(scale.zero_point, small) if scale.zero_point is not None else None
    lifted = e.Encoding(inner.element, block, inner.scale, inner.zero_point)
    return QuantizedData(reshaped(scale.codes, grid), reshaped(scale.scale, small), zeros, lifted, scale.shift)


def _along(values: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    shape = [1] * max(1, rank)
    if values.numel() == 1:
        return values.reshape(())
    shape[axis % max(1, rank)] = -1
    return values.reshape(shape)

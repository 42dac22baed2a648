"""Finished files read back: nodes that dequantize a weight become the weight, with its encoding.

So a quantized graph is the float graph again, whose weights happen to be quantized, and every command takes it as it
takes any other source. Nodes that are not understood stay: the graph computes what it did in any case.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_core import encoding as e
from monoquant_core.containers.entries import tensor_at
from monoquant_onnx.data import BiasData, Data, QuantizedData, is_zero, number, reshaped
from monoquant_onnx.decoding import ELEMENTS, encoded
from monoquant_onnx.layers import attribute

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

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
        _absorb_transposes(graph)
        _activations_of_weights(graph)
        graph.tidy()


def _weight(graph: OnnxGraph, node: ir.Node) -> bool:
    """``DequantizeLinear(codes, scale[, zero point])`` of constants; all of them may be transposed before."""
    stored = _stored(graph, node.inputs[0])
    if stored is None or isinstance(stored.data, QuantizedData):
        return False
    found = _dequantized(graph, node, stored.data, attribute(node, "axis", 1), stored.turned)
    if found is None:
        return False
    looked_up = any(use.node.op_type == "Gather" and use.idx == 0 for use in stored.value.uses())
    if looked_up and isinstance(found, QuantizedData):
        found = _whole_rows(found)
    weight = _become(graph, stored.value, found)
    value = _turned(graph, node, weight) if stored.turned else weight
    _replace(graph, node.outputs[0], value)
    return True


def _gathered(graph: OnnxGraph, node: ir.Node) -> bool:
    """``DequantizeLinear(Gather(codes, ids), ...)``: an embedding, of which only the rows in use are dequantized.

    Scales are one number, one per column, or looked up with the same ids: then they are blocks of the last axis.
    """
    gather = _lookup(node.inputs[0])
    codes = graph.constant(gather.inputs[0]) if gather is not None else None
    if gather is None or codes is None or len(codes.shape) != 2 or len(list(gather.outputs[0].uses())) != 1:
        return False
    ids = gather.inputs[1]
    params = [v for v in node.inputs[1:3] if v is not None]
    lookups = [_lookup(v) for v in params]
    axis, block_size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if all(found is not None and found.inputs[1] is ids for found in lookups):
        given = [graph.constant(found.inputs[0]) for found in lookups if found is not None]
        last = bool(block_size)
    else:
        given = [graph.constant(v) for v in params]
        rank = None if ids is None or ids.shape is None else len(ids.shape) + 1
        last = axis == -1 or (rank is not None and axis == rank - 1)
        last = not block_size and (last or all(d is not None and math.prod(d.shape) == 1 for d in given))
    if not last or any(d is None for d in given):
        return False
    scale, zeros = [*given, None][:2]
    width = codes.shape[1]
    found = encoded(codes, scale, zeros, 1, min(block_size, width)) if scale is not None else None
    if not isinstance(found, QuantizedData):
        return False
    weight = _become(graph, gather.inputs[0], _whole_rows(found))
    made = ir.node("Gather", [weight, ids], name=gather.name, num_outputs=1)
    graph.model.graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    _replace(graph, node.outputs[0], made.outputs[0])
    return True


def _integer_matmul(graph: OnnxGraph, node: ir.Node) -> bool:
    """``Mul(Cast(MatMulInteger(q, codes, zero, zeros)), Mul(x scale, scale))`` behind DynamicQuantizeLinear."""
    quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    stored = _stored(graph, node.inputs[1])
    if quantize is None or quantize.op_type != "DynamicQuantizeLinear" or stored is None:
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
    axis = 0 if stored.turned else len(stored.data.shape) - 1
    data = encoded(stored.data, _flat(weight_scale), zeros, axis, 0)
    if not isinstance(data, QuantizedData):
        return False
    activation = e.ActivationQuant(e.UINT8, "tensor", dynamic=True, symmetric=False)
    weight = _become(graph, stored.value, dataclasses.replace(data, activation=activation))
    x = quantize.inputs[0]
    value = _turned(graph, node, weight) if stored.turned else weight
    kind = "Gemm" if stored.turned and x is not None and x.shape is not None and len(x.shape) == 2 else "MatMul"
    made = ir.node(kind, [x, value], name=node.name, num_outputs=1)
    graph.model.graph.insert_before(node, made)
    made.outputs[0].shape, made.outputs[0].type = result.shape, result.type
    _replace(graph, result, made.outputs[0])
    return True


def _absorb_transposes(graph: OnnxGraph) -> None:
    """A Gemm transposes its weight on its own."""
    for node in list(graph.model.graph):
        stored = _stored(graph, node.inputs[1]) if node.op_type == "Gemm" and len(node.inputs) > 1 else None
        if stored is not None and stored.turned:
            node.attributes["transB"] = ir.AttrInt64("transB", 1 - attribute(node, "transB", 0))
            node.replace_input_with(1, stored.value)


@dataclass(frozen=True)
class _Stored:
    """An initializer, and whether the graph turns it before it takes it."""

    value: ir.Value
    data: Data
    turned: bool


def _stored(graph: OnnxGraph, value: ir.Value | None) -> _Stored | None:
    if value is None:
        return None
    node = value.producer()
    turned = node is not None and node.op_type == "Transpose"
    if node is not None and turned:
        perm = node.attributes.get("perm")
        if isinstance(perm, ir.Attr) and list(perm.as_ints()) != [1, 0]:
            return None
        value = node.inputs[0]
    data = graph.constant(value)
    if value is None or data is None or (turned and len(data.shape) != 2):
        return None
    return _Stored(value, data, turned)


def _lookup(value: ir.Value | None) -> ir.Node | None:
    """The Gather of rows that makes a value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "Gather" and not attribute(node, "axis", 0) else None


def _whole_rows(data: QuantizedData) -> QuantizedData:
    """Blocks that are whole rows, spelled so."""
    block = data.encoding.block
    if len(block) == 2 and block[0] == 1 and block[1] == data.shape[1]:
        encoding = dataclasses.replace(data.encoding, block=(1, e.FULL))
        return dataclasses.replace(data, encoding=encoding)
    return data


def _turned(graph: OnnxGraph, before: ir.Node, weight: ir.Value) -> ir.Value:
    """The weight, transposed by a node, as the codes were."""
    made = ir.node("Transpose", [weight], {"perm": [1, 0]}, num_outputs=1)
    graph.model.graph.insert_before(before, made)
    value = made.outputs[0]
    value.name = graph.free_name(f"{weight.name}_transposed")
    assert weight.shape is not None
    value.shape, value.type = ir.Shape(list(reversed(weight.shape.dims))), weight.type
    return value


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
    if [d.dtype for d in ours if d is not None] != [d.dtype for d in theirs if d is not None]:
        return False
    (scale, zero), other = ([number(d) for d in pair if d is not None] for pair in (ours, theirs))
    if (scale, zero) != tuple(other):
        return False
    element = ELEMENTS.get(ours[1].dtype if ours[1] is not None else "")
    source = quantize.inputs[0]
    if element is None or element.kind != "int" or source is None or source.name is None:
        return False
    if not 0 < scale < math.inf:
        return False
    low, high = element.code_range
    graph.ranges[source.name] = (scale * (low - zero), scale * (high - zero))
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


def _dequantized(
    graph: OnnxGraph, node: ir.Node, codes: Data, axis: int, turned: bool
) -> QuantizedData | BiasData | None:
    """What a DequantizeLinear makes of codes; with ``turned`` of their transpose, and so are blocks' parameters."""
    params: list[Data | None] = []
    for given in [*node.inputs, None][1:3]:
        cast = given.producer() if given is not None else None
        # Powers of two are no floats to DequantizeLinear.
        value = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else given
        stored = _stored(graph, value)
        if value is not None and (stored is None or stored.turned != (turned and len(stored.data.shape) == 2)):
            return None
        params.append(stored.data if stored is not None else None)
    scale, zeros = params
    if scale is None:
        return None
    if codes.dtype == "int32" and zeros is not None and is_zero(zeros):
        zeros = None
    rank = max(1, len(codes.shape))
    axis = rank - 1 - axis % rank if turned else axis
    return encoded(codes, scale, zeros, axis, attribute(node, "block_size", 0))


def _become(graph: OnnxGraph, codes: ir.Value | None, data: QuantizedData | BiasData) -> ir.Value:
    """Make an initializer of the dequantized weight, under the name that the codes have without their suffix."""
    assert codes is not None
    if isinstance(data, QuantizedData):
        for name, known in graph.data.items():  # a table that is looked up, and multiplied with as well
            if isinstance(known, QuantizedData) and (known.codes, known.encoding) == (data.codes, data.encoding):
                return graph.model.graph.initializers[name]
    old = codes.name or ""
    wanted = _SUFFIX.sub("", old)
    if wanted == old and old in graph.model.graph.initializers:
        name = old  # the codes give their name away, and go once nothing uses them
        codes.name = graph.free_name(f"{old}_codes")
        if old in graph.data:
            graph.data[codes.name] = graph.data.pop(old)
    else:
        name = wanted if wanted not in graph.model.graph.initializers else graph.free_name(wanted)
    if isinstance(data, QuantizedData):
        data = dataclasses.replace(data, where=tensor_at(graph.name, name))
    graph.bind(name, data)
    return graph.model.graph.initializers[name]


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

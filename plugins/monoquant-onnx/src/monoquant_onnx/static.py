"""Values that are quantized with calibrated ranges: where QuantizeLinear and DequantizeLinear go.

Convolutional nets are quantized from one convolution to the next, as onnxruntime joins a node, its activation function
and the pairs around it into QLinearConv, QLinearAdd and others. Matrix products only have their inputs quantized: what
lies between them in a transformer (masks, softmax, norms) does not stand it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from monoquant_onnx.editing import Editor

Range = tuple[float, float]
FindRange = Callable[[ir.Value], "Range | None"]

FUSED = ("Relu", "Clip")  #: part of the node before them: onnxruntime drops them where the codes' range says the same
#: move values and make no new ones, but for zeros
SAME = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad")
OWN = ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")  #: one input, with a range of their own behind them
JOINED = ("Add", "Mul", "Concat")  #: where an input is quantized, the others are, too


@dataclass(slots=True)
class Pairs:
    """Which values get a pair of QuantizeLinear and DequantizeLinear."""

    made: dict[ir.Value, Range] = field(default_factory=dict)  #: for everything that takes the value
    taken: dict[ir.Value, tuple[Range, list[tuple[ir.Node, int]]]] = field(default_factory=dict)  #: for these inputs
    same: dict[ir.Value, ir.Value] = field(default_factory=dict)  #: value with the scale of another
    missing: list[str] = field(default_factory=list)  #: values that would have one, if their range were known

    def range_of(self, value: ir.Value) -> Range | None:
        """The range that a value is quantized with."""
        if value in self.made:
            return self.made[value]
        return self.taken[value][0] if value in self.taken else None


def find_pairs(graph: ir.Graph, layers: Mapping[ir.Node, str], find: FindRange) -> Pairs:
    """Where pairs go.

    :param layers: nodes that are computed in integers, with their weight.
    :param find: the range of a value.
    """
    pairs = Pairs()
    for node in graph:
        if node in layers:
            _take(pairs, node, 0, find)
            if node.op_type == "Conv":
                _make(pairs, behind(node.outputs[0]), find)
        elif node.domain in ("", "ai.onnx") and node.op_type in (*SAME, *OWN, *JOINED):
            _pass_on(pairs, node, find)
    return pairs


def behind(value: ir.Value) -> ir.Value:
    """The value behind an activation function that is part of the node before it."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type in FUSED and uses[0].idx == 0 and not value.is_graph_output():
        return uses[0].node.outputs[0]
    return value


def insert_pairs(edit: Editor, pairs: Pairs) -> None:
    """Insert them."""
    params: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def pair(value: ir.Value, owner: ir.Value, found: Range) -> tuple[ir.Node, ir.Node]:
        if owner not in params:
            scale, point = scale_and_zero_point(found)
            params[owner] = (
                edit.constant(edit.free_name(f"{owner.name}_scale"), scale),
                edit.constant(edit.free_name(f"{owner.name}_zero_point"), point),
            )
        inputs = params[owner]
        codes = edit.op(
            "QuantizeLinear", [value, *inputs], [f"{value.name}_quantized"], [ir.DataType.UINT8], shape=value.shape
        )
        floats = edit.op(
            "DequantizeLinear",
            [codes.outputs[0], *inputs],
            [f"{value.name}_dequantized"],
            [ir.DataType.FLOAT],
            shape=value.shape,
        )
        edit.after(value, codes, floats)
        return codes, floats

    for value, found in pairs.made.items():
        owner = value
        while owner in pairs.same:
            owner = pairs.same[owner]
        codes, floats = pair(value, owner, found)
        edit.redirect(value, floats.outputs[0], keep=(codes,))
    for value, (found, uses) in pairs.taken.items():
        _, floats = pair(value, value, found)
        for node, index in uses:
            node.replace_input_with(index, floats.outputs[0])


def scale_and_zero_point(
    found: Range,
) -> tuple[np.ndarray[tuple[()], np.dtype[np.float32]], np.ndarray[tuple[()], np.dtype[np.uint8]]]:
    """uint8, asymmetric: 0 to 255 are the ends of the range, which is widened to hold zero exactly."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    if scale == 0:  # smaller than float32 holds
        scale = np.finfo(np.float32).tiny
    point = min(255, max(0, round(-low / float(scale))))
    return np.asarray(scale, np.float32), np.asarray(point, np.uint8)


def _take(pairs: Pairs, node: ir.Node, index: int, find: FindRange) -> None:
    value = node.inputs[index]
    assert value is not None
    if value in pairs.made:
        return
    if value in pairs.taken:
        pairs.taken[value][1].append((node, index))
    elif (found := find(value)) is not None:
        pairs.taken[value] = (found, [(node, index)])
    else:
        pairs.missing.append(value.name or "")


def _make(pairs: Pairs, value: ir.Value, find: FindRange) -> None:
    found = find(value)
    if found is None:
        pairs.missing.append(value.name or "")
    else:
        pairs.made[value] = found


def _pass_on(pairs: Pairs, node: ir.Node, find: FindRange) -> None:
    """Quantize what a node makes of quantized values."""
    count = len(node.inputs) if node.op_type in JOINED else 1
    inputs = [(index, value) for index, value in enumerate(node.inputs[:count]) if value is not None]
    known = [value for _, value in inputs if value in pairs.made]
    if not known or (node.op_type == "Pad" and not _pads_zeros(node)):
        return
    if node.op_type in SAME:
        pairs.made[node.outputs[0]] = pairs.made[known[0]]
        pairs.same[node.outputs[0]] = known[0]
        return
    others = [(index, value) for index, value in inputs if value not in pairs.made]
    if any(value.is_initializer() or (value not in pairs.taken and find(value) is None) for _, value in others):
        return
    for index, _ in others:
        _take(pairs, node, index, find)
    _make(pairs, behind(node.outputs[0]), find)


def _pads_zeros(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    if filler is not None and (filler.const_value is None or float(filler.const_value.numpy()) != 0):
        return False
    return mode is None or mode.value == "constant"

"""The graph that goes into the file: a copy of the source's, with every tensor as the plan decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from monoquant_core.exporters import Placed
from monoquant_core.rows import row_length
from monoquant_onnx import static, types
from monoquant_onnx.editing import Editor, Streamed
from monoquant_onnx.layouts import Layout, layout_of, stored_arrays
from monoquant_onnx.roles import Role
from monoquant_onnx.weights import FLOAT, Weight, cast, dequantize, look_up, multiply

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph
    from monoquant_onnx.ranges import Ranges

DYNAMIC, STATIC, ROWS, WEIGHTS = "MatMulInteger", "QDQ", "Gather+DequantizeLinear", "DequantizeLinear"
PRODUCER = "monoquant"


@dataclass(slots=True)
class Rewritten:
    """A finished graph."""

    model: ir.Model
    streamed: dict[str, Streamed]  #: initializers whose data the core writes, in the order of the plan
    source: ir.Model  #: as it was
    data: set[str]  #: initializers of the source that are large
    missing: list[str] = field(default_factory=list)  #: values that stayed floats because their range is not known


def rewrite(
    graph: OnnxGraph,
    placed: Sequence[Placed],
    roles: Mapping[str, Role],
    arrays: Mapping[tuple[str, str], str],
    ranges: Ranges,
) -> Rewritten:
    """Rewrite a copy of a graph.

    :param roles: of specs, by name.
    :param arrays: (output, label) -> name of the array in the file.
    """
    from monoquant_onnx.opsets import needed, raised

    edit = Editor(raised(graph, needed(placed)))
    edit.model.producer_name, edit.model.producer_version = PRODUCER, ""
    weights: dict[str, tuple[Weight, list[tuple[ir.Node, int]]]] = {}
    layers: dict[ir.Node, str] = {}
    biases: list[tuple[str, list[tuple[ir.Node, int]]]] = []
    for item in placed:
        out, encoding = item.output, item.held.encoding
        initializer = edit.graph.initializers.get(arrays.get((out.name, ""), out.name))
        uses = [(use.node, use.idx) for use in initializer.uses()] if initializer is not None else []
        dtype = initializer.dtype if initializer is not None and initializer.dtype is not None else FLOAT
        if encoding is None:
            (part,) = item.parts
            number = types.NUMBER[out.dtype]
            value = edit.stream(Streamed(part.name, number, out.shape, out.name, part.name, part.nbytes))
            if out.dtype == "int32" and out.transform is not None:
                biases.append((out.name, uses))
            elif initializer is not None and value.dtype != dtype:
                cast(edit, value, dtype, uses)
            continue
        layout = layout_of(out.shape, encoding)
        assert isinstance(layout, Layout)
        values = {}
        gathered = item.held.layout == ROWS
        for stored in stored_arrays(out.shape, encoding, layout, gathered=gathered):
            name = arrays[out.name, stored.label]
            found = Streamed(name, stored.number, stored.shape, out.name, name, stored.nbytes)
            values[stored.label] = edit.stream(found)
        name = arrays[out.name, ""]
        if item.held.layout == STATIC and roles[out.name].what == "gemm":
            # Without them, onnxruntime does not join the pairs around a Gemm into QGemm.
            zeros = np.zeros(layout.params_shape, np.int8)
            values["_zero_point"] = edit.constant(edit.free_name(f"{name}_zero_point"), zeros)
        weight = Weight(name, roles[out.name], encoding, layout, dtype, values, row_length(out.shape))
        weights[out.name] = (weight, uses)
        if item.held.layout == STATIC:
            layers.update((node, out.name) for node, _ in uses)
    pairs = static.find_pairs(edit.graph, layers, ranges.find)
    static.insert_pairs(edit, pairs)
    quantized: dict[str, list[ir.Value]] = {}
    for item in placed:
        if item.output.name in weights:
            weight, uses = weights[item.output.name]
            _place(edit, item.held.layout, weight, uses, quantized)
    for name, uses in biases:
        _place_bias(edit, arrays[name, ""], arrays[name, "_scale"], uses)
    return Rewritten(edit.model, edit.streamed, graph.model, set(graph.data), sorted(set(pairs.missing)))


def _place(
    edit: Editor,
    layout: str,
    weight: Weight,
    uses: list[tuple[ir.Node, int]],
    quantized: dict[str, list[ir.Value]],
) -> None:
    if layout == DYNAMIC:
        multiply(edit, weight, quantized, uses)
        return
    lookups = [node for node, index in uses if layout == ROWS and node.op_type == "Gather" and index == 0]
    rest = [(node, index) for node, index in uses if node not in lookups]
    if lookups:
        look_up(edit, weight, lookups)
    if rest:
        dequantize(edit, weight, rest)


def _place_bias(edit: Editor, name: str, scale: str, uses: list[tuple[ir.Node, int]]) -> None:
    codes, steps = edit.graph.initializers[name], edit.graph.initializers[scale]
    axis = {"axis": 0} if steps.shape is not None and len(steps.shape) else {}
    made = edit.op("DequantizeLinear", [codes, steps], [f"{name}_dequantized"], [FLOAT], shape=codes.shape, **axis)
    edit.at_start(made)
    for node, index in uses:
        node.replace_input_with(index, made.outputs[0])

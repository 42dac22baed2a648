"""What a finished file should compute: the original's graph with the file's dequantized weights, in floats.

Activations are rounded where the file rounds them, by QuantizeLinear and DequantizeLinear around float operators, so
that nothing of it depends on how a runtime computes with integers, or on which nodes it joins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_core import rows as r
from monoquant_core.containers.entries import shown, tensor_at
from monoquant_core.errors import ExecutionError
from monoquant_onnx import types
from monoquant_onnx.data import Data, QuantizedData, stored_bytes, whole
from monoquant_onnx.graph import OnnxGraph, array_tensor, parse, values
from monoquant_onnx.opsets import raised
from monoquant_onnx.wire import read_structure

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_onnx.source import OnnxSource

CHUNK = 1 << 22  #: elements that are compared at once
EXCESS = 1.001  #: of the squared norm of a channel, which is what zeros in its place would be off by


def simulated(original: OnnxGraph, finished: OnnxSource, path: Path) -> OnnxGraph:
    """A graph of floats that computes what the file should.

    :param original: is not changed.
    :param finished: the file as a source.
    :raises ExecutionError: where the file is none of this graph, naming the tensor or the value.
    """
    graph = OnnxGraph(raised(original, finished.graph.opset).clone(), original.data, original.name)
    for spec in finished.specs():
        name = finished.graph.names[spec.name]
        data, own = finished.graph.data[name], graph.data.get(name)
        if own is None or own.shape != data.shape:
            if isinstance(data, QuantizedData):
                there = "has none of this name" if own is None else f"has {list(own.shape)} there"
                raise ExecutionError(f"{tensor_at(str(path), name)} {list(data.shape)}: the original {there}")
            continue
        if isinstance(data, QuantizedData):
            _check_near(own, data, tensor_at(str(path), name))
            if data.activation is not None and data.activation.dynamic:
                _round_at_run_time(graph.model.graph, name)
        graph.bind(name, data if data.dtype == own.dtype else _As(data, own.dtype))
    _round(graph, path)
    return graph


@dataclass(frozen=True, slots=True, eq=False)
class _As:
    """Data in another dtype: a graph of half floats casts what it dequantizes."""

    base: Data
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.base.shape

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows."""
        from monoquant_core.tensor import dtype_of

        return self.base.read(rows, scratch).to(dtype_of(self.dtype))


def _check_near(own: Data, data: QuantizedData, where: str) -> None:
    """Refuse a weight of which a channel is further from the original's than zeros would be.

    No rounding does that, and neither do searches and compensation of errors: what does is a scale that was changed, or
    the weight of another model.
    """
    axis = next((i for i, extent in enumerate(data.encoding.block) if extent == 1), None)
    noise: dict[int, float] = {}
    signal: dict[int, float] = {}
    from monoquant_core.containers.strided import first_index

    for rows in r.chunks(data.shape, r.quantum(data.shape, data.encoding), CHUNK):
        a, b = own.read(rows).double(), data.read(rows).double()
        first = first_index(data.shape, rows)[axis] if axis is not None else 0
        for sums, squares in ((noise, (b - a).square()), (signal, a.square())):
            found = squares.transpose(0, axis).flatten(1).sum(1) if axis is not None and squares.ndim > 1 else squares
            for index, value in enumerate((found if axis is not None else found.sum().reshape(1)).tolist()):
                sums[first + index] = sums.get(first + index, 0.0) + value
    far = next((i for i, square in noise.items() if square > EXCESS * signal[i]), None)
    if far is not None:
        channel = "" if axis is None else f"channel {far} of axis {axis} "
        raise ExecutionError(
            f"{where}: {channel}is further from the original's values than zeros would be",
            hint="a scale was changed, or the file was made of another model",
        )


def _round_at_run_time(graph: ir.Graph, weight: str) -> None:
    """Quantize the input of a weight's products when the graph runs, one range for the tensor."""
    for use in list(graph.initializers[weight].uses()):
        value = use.node.inputs[0]
        if use.idx != 1 or value is None:
            continue
        codes = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        floats = ir.node("DequantizeLinear", codes.outputs)
        graph.insert_before(use.node, (codes, floats))
        use.node.replace_input_with(0, floats.outputs[0])


def _round(graph: OnnxGraph, path: Path) -> None:
    """Insert the pairs of QuantizeLinear and DequantizeLinear with which the file rounds values."""
    main = graph.model.graph
    known = {value.name: value for value in values(main)}
    makers = {node.outputs[0].name: node for node in main.all_nodes()}
    structure = read_structure(path)
    try:
        theirs = parse(structure, path)
        for floats in theirs.model.graph:
            codes = _quantized_value(theirs, floats)
            if codes is not None:
                _insert(graph, theirs, (codes, floats), known, makers, path)
    finally:
        structure.close()


def _quantized_value(graph: OnnxGraph, node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear of a value before its DequantizeLinear; None for other nodes."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    codes = node.inputs[0].producer()
    made = codes is not None and codes.op_type == "QuantizeLinear" and graph.constant(codes.inputs[0]) is None
    return codes if made else None


def _insert(
    graph: OnnxGraph,
    theirs: OnnxGraph,
    pair: tuple[ir.Node, ir.Node],
    known: dict[str | None, ir.Value],
    makers: Mapping[str | None, ir.Node],
    path: Path,
) -> None:
    main = graph.model.graph
    codes, floats = pair
    result = floats.outputs[0]
    assert codes.inputs[0] is not None
    name = result.name if result.is_graph_output() else codes.inputs[0].name
    value = known.get(name)
    if value is None:
        raise ExecutionError(f"{path}: rounds {shown(name or '')}, which the original's graph does not have")
    made: list[ir.Node] = []
    inputs: list[ir.Value | None] = [value]
    for node in pair:
        params = [_constant(graph, theirs, given, path) for given in node.inputs[1:]]
        copy = ir.node(node.op_type, [*inputs, *params], dict(node.attributes))
        made.append(copy)
        inputs = [copy.outputs[0]]
    producer = value.producer()
    if producer is not None:
        main.insert_after(producer, made)
    elif (first := next(iter(main), None)) is not None:
        main.insert_before(first, made)
    rounded = made[1].outputs[0]
    known[result.name] = rounded
    for use in result.uses():
        maker = makers.get(use.node.outputs[0].name)
        if use.node.op_type == "QuantizeLinear":
            continue  # it rounds again, under the name of what this pair gives
        if maker is None or maker.inputs[use.idx] is not value:
            raise ExecutionError(
                f"{path}: node {shown(use.node.name or use.node.op_type)} takes {shown(name or '')}, "
                "and the original's takes something else"
            )
        maker.replace_input_with(use.idx, rounded)
    if result.is_graph_output():
        for index, output in enumerate(main.outputs):
            if output is value:
                main.outputs[index] = rounded
                rounded.type, rounded.shape = value.type, value.shape
                value.name, rounded.name = f"{name}_raw", name


def _constant(graph: OnnxGraph, theirs: OnnxGraph, value: ir.Value | None, path: Path) -> ir.Value | None:
    """A scale or zero point of the file as an initializer of the graph."""
    if value is None:
        return None
    data = theirs.constant(value)
    if data is None or stored_bytes(data) > CHUNK:
        raise ExecutionError(f"{path}: {shown(value.name or '')} is not a number that the file gives")
    name = graph.free_name(f"{value.name}:range")
    tensor = array_tensor(whole(data), ir.DataType(types.NUMBER[data.dtype]), name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
    graph.model.graph.register_initializer(made)
    return made

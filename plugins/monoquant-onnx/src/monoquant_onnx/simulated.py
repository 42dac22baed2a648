"""What a finished file should compute: the original's graph with the file's dequantized weights, in floats.

Where the file rounds a value to 8 bits, so does this, by QuantizeLinear and DequantizeLinear around float operators:
nothing of it depends on how a runtime computes with integers, or on which nodes it joins. But float32 sums in another
order take some values to the next step of a rounding, these take others in the next layer, and after six layers of an
encoder two correct computations differ by nearly as much as rounding costs. So there is a second form in which
every rounded value is an input and comes from the file: each stretch between two roundings is compared for itself.
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
from monoquant_onnx.graph import OnnxGraph, array_tensor, values
from monoquant_onnx.opsets import raised
from monoquant_onnx.parsing import parse
from monoquant_onnx.wire import read_structure

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_onnx.source import OnnxSource

CHUNK = 1 << 22  #: elements that are compared at once
EXCESS = 1.001  #: of the squared norm of a channel, which is what zeros in its place would be off by


@dataclass(frozen=True, slots=True)
class Site:
    """A value that the file rounds."""

    value: str  #: before, in the simulated graph
    before: str  #: the same in the file
    rounded: tuple[str, ...]  #: in the file: floats; or codes, scale and zero point
    given: str  #: the graph's input for what comes of it

    def floats(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the file made of the value, from values of a run."""
        if len(self.rounded) == 1:
            return found[self.rounded[0]]
        codes, scale, zero_point = (found[name] for name in self.rounded)
        return (codes.int() - zero_point.int()) * scale


def simulated(
    original: OnnxGraph, finished: OnnxSource, path: Path, *, given: bool = False
) -> tuple[OnnxGraph, list[Site]]:
    """A graph of floats that computes what the file should, and where it rounds.

    :param original: is not changed.
    :param finished: the file as a source.
    :param given: rounded values are inputs, and the values before them outputs as well.
    :raises ExecutionError: where the file is none of this graph, naming the tensor or the value.
    """
    graph = OnnxGraph(raised(original, finished.graph.opset).clone(), original.data, original.name)
    dynamic = _bind_weights(graph, finished, path)
    rounding = _Rounding(graph, path, given)
    structure = read_structure(path)
    try:
        theirs = parse(structure, path)
        for node in theirs.model.graph:
            if node.op_type == "DynamicQuantizeLinear":
                rounding.at_run_time(node, dynamic)
            elif node.op_type == "DequantizeLinear" and (codes := _quantized_value(theirs, node)) is not None:
                rounding.with_range(theirs, codes, node)
    finally:
        structure.close()
    if dynamic - rounding.done:
        raise ExecutionError(f"{path}: how it rounds the input of {min(dynamic - rounding.done)} is not understood")
    return graph, rounding.sites()


def _bind_weights(graph: OnnxGraph, finished: OnnxSource, path: Path) -> set[str]:
    """Put the file's values in the places of the graph's own.

    :return: the weights whose inputs are rounded at run time.
    """
    dynamic = set()
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
                dynamic.add(name)
        graph.bind(name, data if data.dtype == own.dtype else _As(data, own.dtype))
    return dynamic


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


class _Rounding:
    """Rounds values of a graph as a file does."""

    def __init__(self, graph: OnnxGraph, path: Path, given: bool) -> None:
        self._graph, self._main, self._path, self._given = graph, graph.model.graph, path, given
        self._known = {value.name: value for value in values(self._main)}
        self._makers = {node.outputs[0].name: node for node in self._main.all_nodes()}
        self._sites: list[tuple[ir.Value, Site]] = []
        self.done: set[str] = set()  #: weights whose inputs are rounded at run time

    def sites(self) -> list[Site]:
        """Where it rounds, in the order of the file."""
        return [Site(value.name or "", site.before, site.rounded, site.given) for value, site in self._sites]

    def at_run_time(self, node: ir.Node, weights: set[str]) -> None:
        """As a DynamicQuantizeLinear of the file does, for the products with these weights."""
        before = node.inputs[0]
        assert before is not None
        value = self._value(_original_name(before))
        made: list[ir.Node] = []
        if not self._given:
            codes = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
            made = [codes, ir.node("DequantizeLinear", codes.outputs)]
        result = self._rounded(value, before.name or "", tuple(v.name or "" for v in node.outputs), made)
        for use in list(value.uses()):
            weight = use.node.inputs[1].name if len(use.node.inputs) > 1 and use.node.inputs[1] is not None else None
            if use.idx == 0 and weight in weights:
                use.node.replace_input_with(0, result)
                self.done.add(weight or "")

    def with_range(self, theirs: OnnxGraph, codes: ir.Node, floats: ir.Node) -> None:
        """As a pair of QuantizeLinear and DequantizeLinear of the file does."""
        before, end = codes.inputs[0], floats.outputs[0]
        assert before is not None
        name = end.name if end.is_graph_output() else _original_name(before)
        value = self._value(name)
        made: list[ir.Node] = []
        if not self._given:
            inputs: list[ir.Value | None] = [value]
            for node in (codes, floats):
                params = [self._constant(theirs, given) for given in node.inputs[1:]]
                made.append(ir.node(node.op_type, [*inputs, *params], dict(node.attributes)))
                inputs = [made[-1].outputs[0]]
        result = self._rounded(value, before.name or "", (end.name or "",), made)
        for use in end.uses():
            maker = self._makers.get(_name_of_result(use.node))
            if use.node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                continue  # rounds again, under the name of what this pair gives
            if maker is None or maker.inputs[use.idx] is not value:
                raise ExecutionError(
                    f"{self._path}: node {shown(use.node.name or use.node.op_type)} takes {shown(name or '')}, "
                    "and the original's takes something else"
                )
            maker.replace_input_with(use.idx, result)
        self._known[end.name] = result
        if end.is_graph_output():
            self._put_out(value, result, name)

    def _put_out(self, value: ir.Value, result: ir.Value, name: str | None) -> None:
        """Make what comes of an output the output."""
        index = next((i for i, output in enumerate(self._main.outputs) if output is value), None)
        if index is None:
            return
        if self._given:  # both are outputs: what comes of the value, and the value
            copy = ir.node("Identity", [result])
            self._main.append(copy)
            self._main.outputs.append(value)
            result = copy.outputs[0]
        result.type, result.shape = value.type, value.shape
        value.name, result.name = f"{name}:before", name
        self._main.outputs[index] = result

    def _value(self, name: str | None) -> ir.Value:
        found = self._known.get(name)
        if found is None:
            raise ExecutionError(f"{self._path}: rounds {shown(name or '')}, which the original's graph does not have")
        return found

    def _rounded(self, value: ir.Value, before: str, rounded: tuple[str, ...], made: list[ir.Node]) -> ir.Value:
        """What comes of a value: of these nodes, or an input."""
        if self._given:
            result = ir.Value(name=self._graph.free_name(f"{value.name}:rounded"), type=value.type)
            self._main.inputs.append(result)
            if not value.is_graph_input() and value not in self._main.outputs:
                self._main.outputs.append(value)
        else:
            result = made[-1].outputs[0]
            producer, first = value.producer(), next(iter(self._main), None)
            if producer is not None:
                self._main.insert_after(producer, made)
            elif first is not None:
                self._main.insert_before(first, made)
        self._sites.append((value, Site("", before, rounded, result.name or "")))
        return result

    def _constant(self, theirs: OnnxGraph, value: ir.Value | None) -> ir.Value | None:
        """A scale or zero point of the file as an initializer of the graph."""
        if value is None:
            return None
        data = theirs.constant(value)
        if data is None or stored_bytes(data) > CHUNK:
            raise ExecutionError(f"{self._path}: {shown(value.name or '')} is not a number that the file gives")
        name = self._graph.free_name(f"{value.name}:range")
        tensor = array_tensor(whole(data), ir.DataType(types.NUMBER[data.dtype]), name)
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
        self._main.register_initializer(made)
        return made


def _name_of_result(node: ir.Node) -> str | None:
    """What the original calls the result of a node: an output that is rounded has its name behind the rounding."""
    for use in node.outputs[0].uses():
        if use.node.op_type == "QuantizeLinear":
            ends = [after.node.outputs[0] for after in use.node.outputs[0].uses()]
            if (end := next((end for end in ends if end.is_graph_output()), None)) is not None:
                return end.name
    return node.outputs[0].name


def _original_name(value: ir.Value) -> str | None:
    """What the original calls a value: rows that are dequantized after a Gather have the Gather's name there."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        rows = node.inputs[0].producer()
        if rows is not None and rows.op_type == "Gather":
            return rows.outputs[0].name
    return value.name


def _quantized_value(graph: OnnxGraph, node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear of a value before its DequantizeLinear; None for other nodes."""
    codes = node.inputs[0].producer() if node.inputs[0] is not None else None
    made = codes is not None and codes.op_type == "QuantizeLinear" and graph.constant(codes.inputs[0]) is None
    return codes if made else None

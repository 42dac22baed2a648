"""Changing a copy of a graph: new nodes, small constants, and initializers whose data the core will write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from monoquant_core.rows import Shape

if TYPE_CHECKING:
    from collections.abc import Container


@dataclass(frozen=True, slots=True)
class Streamed:
    """An initializer whose data the core writes."""

    name: str
    number: int  #: TensorProto.DataType
    shape: Shape
    output: str  #: of the plan
    part: str
    nbytes: int


class Editor:
    """A copy of a model that is being rewritten. The data of large initializers are never read."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        # Where the exporter of torch was, and which files it came from, is nobody's business.
        passes.ClearMetadataAndDocStringPass()(self.model)
        self.graph = self.model.graph
        self.streamed: dict[str, Streamed] = {}
        self.values = {value.name: value for value in _values(self.graph) if value.name}
        self._last_of_start: ir.Node | None = None

    def free_name(self, wanted: str) -> str:
        """A name that no value has."""
        name, number = wanted, 0
        while name in self.values:
            number += 1
            name = f"{wanted}_{number}"
        return name

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small initializer."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        self.values[name] = value
        return value

    def stream(self, found: Streamed) -> ir.Value:
        """The initializer whose data come from a part of the plan; the one that is there is given the part's type."""
        dtype = ir.DataType(found.number)
        value = self.graph.initializers.get(found.name)
        if value is None:
            tensor = ir.LazyTensor(_unread, dtype, ir.Shape(found.shape), name=found.name)
            value = ir.Value(
                name=found.name, type=ir.TensorType(dtype), shape=ir.Shape(found.shape), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.values[found.name] = value
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(found.shape)
        self.streamed[found.name] = found
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        dtypes: Sequence[ir.DataType],
        *,
        shape: ir.Shape | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Node:
        """A node, not yet in the graph, whose outputs have names that are free."""
        outputs = []
        for name, dtype in zip(names, dtypes, strict=True):
            value = ir.Value(name=self.free_name(name), type=ir.TensorType(dtype), shape=shape)
            assert value.name is not None
            self.values[value.name] = value
            outputs.append(value)
        return ir.node(op_type, inputs, attributes, outputs=outputs, name=self.free_name(f"{outputs[0].name}_node"))

    def at_start(self, *nodes: ir.Node) -> None:
        """Put nodes before all others: those that take initializers only."""
        first = next(iter(self.graph), None)
        if self._last_of_start is not None:
            self.graph.insert_after(self._last_of_start, nodes)
        elif first is not None:
            self.graph.insert_before(first, nodes)
        else:
            self.graph.extend(nodes)
        self._last_of_start = nodes[-1]

    def after(self, value: ir.Value, *nodes: ir.Node) -> None:
        """Put nodes behind the one that makes a value, or at the start."""
        producer = value.producer()
        if producer is None or producer.graph is not self.graph:
            self.at_start(*nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def redirect(self, old: ir.Value, new: ir.Value, *, keep: Container[ir.Node] = ()) -> None:
        """Make everything that takes a value take another, which gets its name where it is an output of the graph."""
        for use in list(old.uses()):
            if use.node not in keep:
                use.node.replace_input_with(use.idx, new)
        if old in self.graph.outputs:
            for index, value in enumerate(self.graph.outputs):
                if value is old:
                    self.graph.outputs[index] = new
            assert old.name is not None
            name, old.name = old.name, self.free_name(f"{old.name}_raw")
            new.name, new.type, new.shape = name, old.type, old.shape
            self.values[old.name], self.values[name] = old, new

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value another, free name."""
        value.name = self.free_name(name)
        self.values[value.name] = value


def _values(graph: ir.Graph) -> list[ir.Value]:
    found = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        found += node.outputs
    return found


def _unread() -> ir.TensorProtocol:
    raise AssertionError("the core writes these data")

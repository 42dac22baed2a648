"""Graphs without data, for the conformance kit and the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from monoquant_core.model import TensorSpec
from monoquant_onnx import types
from monoquant_onnx.graph import OnnxGraph

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch

OUT = ":out"


@dataclass(frozen=True, slots=True)
class NoData:
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """Nothing to read."""
        raise NotImplementedError


def sample_graph(specs: Sequence[TensorSpec]) -> OnnxGraph:
    """A graph whose initializers are these tensors; each is an output, under its name and ``:out``."""
    nodes, outputs = [], []
    for spec in specs:
        number = types.NUMBER.get(spec.dtype, int(ir.DataType.FLOAT))
        kind, shape = ir.TensorType(ir.DataType(number)), ir.Shape(spec.shape)
        value = ir.Value(name=spec.name, type=kind, shape=shape)
        out = ir.Value(name=f"{spec.name}{OUT}", type=kind, shape=shape)
        nodes.append(ir.node("Identity", [value], outputs=[out], name=f"{spec.name}:node"))
        outputs.append(out)
    graph = ir.Graph([], outputs, nodes=nodes, opset_imports={"": 21}, name="sample")
    found = OnnxGraph(ir.Model(graph, ir_version=10), {}, "sample")
    for spec, node in zip(specs, nodes, strict=True):
        found.bind(f"{spec.name}:data", NoData(spec.shape, spec.dtype))
        found.model.graph.initializers[f"{spec.name}:data"].name = f"{spec.name}:data"
        node.replace_input_with(0, found.model.graph.initializers[f"{spec.name}:data"])
        found.rename(f"{spec.name}:data", spec.name)
        found.names[spec.name] = spec.name
    return found


def product_graph(spec: TensorSpec) -> OnnxGraph:
    """``y = x @ weight``, for a weight ``[inputs, outputs]``."""
    graph = sample_graph([spec])
    node = next(iter(graph.model.graph))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", spec.shape[0]]))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", spec.shape[1]]))
    product = ir.node("MatMul", [x, node.inputs[0]], outputs=[y], name="product")
    main = graph.model.graph
    main.inputs.append(x)
    main.append(product)
    main.outputs[0] = y
    main.remove(node, safe=True)
    return graph

"""Optimizations of onnxruntime, stretch by stretch between the places where a file rounds values.

Optimized or not, both are right within float32, but where values are rounded to 8 bits the small differences become
steps, and add up over the layers of an encoder until they are nearly as large as what rounding costs. So the file is
cut where it rounds, each stretch gets what came before it from a run without optimizations, and only what the kernels
themselves do differently is left: nothing, or an overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from monoquant_core.agreement import Agreement
from monoquant_core.verification import ALONE, Sums
from monoquant_onnx.data import number
from monoquant_onnx.runner import graph_inputs
from monoquant_onnx.sessions import FileRunner, described, feeds, open_session, run_session, structure_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from monoquant_onnx.graph import OnnxGraph


@dataclass(frozen=True, slots=True)
class _Cut:
    """A value between two stretches: codes, or floats that are quantized at run time."""

    value: ir.Value
    dtype: int
    zero_point: float
    takes: str  #: the operator that begins the next stretch

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def given(self) -> str:
        """The input in its place."""
        return f"{self.name}:given"


def stretches(path: Path, batches: Sequence[Mapping[str, torch.Tensor]], bound: float) -> list[Agreement]:
    """Each value at which a file is cut, and each output: computed with optimizations, against without.

    :param bound: largest relative error of each.
    :return: in the order of the graph; none for a file that does not round values.
    :raises ExecutionError: when onnxruntime does not run it.
    """
    graph = structure_of(path)
    cuts = _cuts(graph)
    if not cuts:
        return []
    names = {cut.name: described(cut.value) for cut in cuts}
    names |= {value.name or "": described(value) for value in graph.model.graph.outputs if value.producer()}
    points = {cut.name: cut.zero_point for cut in cuts}
    session = open_session(_cut(path, cuts), path, optimized=True)
    inputs, sums = graph_inputs(graph), {name: Sums() for name in names}
    with FileRunner(path, optimized=False, also=list(names)) as exact:
        for batch in batches:
            expected = exact.run(batch)
            given = {cut.given: expected[cut.name] for cut in cuts}
            found = run_session(session, feeds(batch, inputs, str(path)) | given, list(names), path)
            for name, total in sums.items():
                zero = points.get(name, 0.0)
                total.add(expected[name].double() - zero, found[name].double() - zero)
    return [total.agreement(names[name], ALONE, bound) for name, total in sums.items()]


def _cuts(graph: OnnxGraph) -> list[_Cut]:
    found: dict[str, _Cut] = {}
    for node in graph.model.graph:
        value = node.inputs[0] if node.inputs else None
        producer = value.producer() if value is not None else None
        if value is None or producer is None or value.name is None:
            continue
        if node.op_type == "DynamicQuantizeLinear":
            found[value.name] = _Cut(value, onnx.TensorProto.FLOAT, 0.0, node.op_type)
        elif node.op_type == "DequantizeLinear" and producer.op_type == "QuantizeLinear":
            point = graph.constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
            dtype = onnx.TensorProto.INT8 if point is not None and point.dtype == "int8" else onnx.TensorProto.UINT8
            zero = number(point) if point is not None and point.shape in ((), (1,)) else 0.0
            if point is None or point.dtype in ("int8", "uint8"):
                found[value.name] = _Cut(value, dtype, zero, node.op_type)
    return list(found.values())


def _cut(path: Path, cuts: Sequence[_Cut]) -> bytes:
    """The file with inputs in the places of the values at which it is cut, and these as outputs."""
    proto = onnx.load(str(path), load_external_data=False)
    known = {cut.name: cut for cut in cuts}
    for node in proto.graph.node:
        cut = known.get(node.input[0]) if node.input else None
        if cut is not None and node.op_type == cut.takes:
            node.input[0] = cut.given
    present = {value.name for value in proto.graph.output}
    for cut in cuts:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(cut.given, cut.dtype, None))
        if cut.name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=cut.name))
    serialized: bytes = proto.SerializeToString()
    return serialized

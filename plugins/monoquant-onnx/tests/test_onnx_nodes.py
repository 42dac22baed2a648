"""The node tests of the onnx package for QuantizeLinear and DequantizeLinear, through our reader, IR and packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as cases
import onnx.backend.test.case.node.dequantizelinear
import onnx.backend.test.case.node.quantizelinear
import pytest
import torch
from monoquant_onnx.exporter import OnnxExporter
from monoquant_onnx.plugin import OnnxOptions
from monoquant_onnx.source import open_onnx
from onnx import TensorProto, helper, numpy_helper

from monoquant_core.blocks import in_steps
from monoquant_core.exporters import Holds, Output
from monoquant_core.rows import all_rows
from monoquant_core.schemes import Proposal
from monoquant_core.tensor import QuantizedTensor, expand, param_values

CASES = {
    case.name: case
    for case in cases._NodeTestCases
    if case.name.startswith(("test_quantizelinear", "test_dequantizelinear")) and "expanded" not in case.name
}
Value = Any  #: an array, or a proto where numpy has no type


def as_proto(value: Value, name: str) -> TensorProto:
    """A constant, from what a node test has."""
    proto = TensorProto()
    proto.CopyFrom(value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value)))
    proto.name = name
    return proto


def read(codes: TensorProto, params: list[TensorProto], attributes: dict[str, int], path: Path) -> QuantizedTensor:
    """The constants as a quantized tensor, through a file in which DequantizeLinear takes them."""
    node = helper.make_node("DequantizeLinear", [t.name for t in (codes, *params)], ["y"], **attributes)
    add = helper.make_node("Identity", ["y"], ["z"])
    out = helper.make_tensor_value_info("z", params[0].data_type, None)
    graph = helper.make_graph([node, add], "g", [], [out], [codes, *params])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13), path)
    source = open_onnx(path)
    try:
        (spec,) = source.specs()
        assert spec.encoding is not None, "the reader does not take it for a quantized tensor"
        value = source.read(spec.name, all_rows(spec.shape))
        assert isinstance(value, QuantizedTensor)
        return value.clone()
    finally:
        source.close()


def floats(value: Value) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@pytest.mark.parametrize("name", sorted(CASES))
def test_node(name: str, tmp_path: Path) -> None:
    inputs, outputs = CASES[name].data_sets[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in CASES[name].model.graph.node[0].attribute}
    attributes.pop("output_dtype", None)
    quantizes = name.startswith("test_quantizelinear")
    codes = as_proto(outputs[0] if quantizes else inputs[0], "w")
    params = [as_proto(value, f"p{index}") for index, value in enumerate(inputs[1:])]
    if name == "test_dequantizelinear_e4m3fn_zero_point" or (
        quantizes and params[1:] and params[1].data_type in FLOATS
    ):
        params = params[:1]  # zero points of floats are 0
    tensor = read(codes, params, attributes, tmp_path / "node.onnx")
    if quantizes:
        assert_nearest(tensor, floats(inputs[0]))
    else:
        assert torch.equal(tensor.dequantize(), floats(outputs[0]))
    if tensor.encoding.scale == "float32" and codes.data_type not in SHIFTED.get(name, ()):
        assert_packs(tensor, codes)


#: types whose zero points are no codes of theirs
FLOATS = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1}

#: tests of signed codes with zero points: the IR has them unsigned, so their bits are others
SHIFTED = {
    "test_dequantizelinear_int16": {TensorProto.INT16},
    "test_dequantizelinear_int4": {TensorProto.INT4},
    "test_dequantizelinear_int2": {TensorProto.INT2},
    "test_quantizelinear_int16": {TensorProto.INT16},
    "test_quantizelinear_int4": {TensorProto.INT4},
    "test_quantizelinear_int2": {TensorProto.INT2},
}


def assert_nearest(tensor: QuantizedTensor, x: torch.Tensor) -> None:
    """The codes are what we round to with the same scale and zero point; of floats, the nearest values there are."""
    encoding = tensor.encoding
    scale = param_values(tensor.scale, encoding.scale)
    wide = expand(scale, tuple(x.shape), encoding.block)
    if encoding.element.table is not None:
        table = torch.tensor([v for v in encoding.element.table if np.isfinite(v)])
        best = (table - (x / wide).clamp(table.min(), table.max()).unsqueeze(-1)).abs().amin(-1)
        assert torch.allclose((tensor.dequantize() / wide - (x / wide).clamp(table.min(), table.max())).abs(), best)
        return
    zero = torch.zeros(())
    if tensor.zero_point is not None:
        assert encoding.zero_point is not None
        zero = expand(param_values(tensor.zero_point, encoding.zero_point), tuple(x.shape), encoding.block)
    steps = in_steps(x.reshape(-1, 1), wide.reshape(-1)).view(x.shape)
    low, high = encoding.element.code_range
    assert torch.equal((steps.round() + zero).clamp(low, high), tensor.codes.float())


def assert_packs(tensor: QuantizedTensor, codes: TensorProto) -> None:
    """What we write of the codes is what the test has."""
    out = Output("w", tensor.shape, "float32", ("w",))
    exporter = OnnxExporter(OnnxOptions())
    held = exporter.verdict(out, Proposal(tensor.encoding))
    assert isinstance(held, Holds)
    packed = exporter.pack(tensor, out, held, 0)
    assert bytes(packed["w"].numpy().tobytes()) == raw(codes)
    assert exporter.unpack(packed, out, held, 0).equal(tensor)  # type: ignore[union-attr]


def raw(proto: TensorProto) -> bytes:
    """raw_data of a proto that may hold its values otherwise."""
    if proto.raw_data:
        return bytes(proto.raw_data)
    dtype = np.uint16 if proto.data_type in (TensorProto.INT16, TensorProto.UINT16) else np.uint8
    return np.array(proto.int32_data, dtype=np.int32).astype(dtype).tobytes()

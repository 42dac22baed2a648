"""Finished files: quantized graphs read back as onnx.reference decodes them, and codes of other formats on a graph."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_onnx.finished import GraphedSource, cut, transposed, turn
from monoquant_onnx.source import OnnxSource, open_onnx
from monoquant_onnx.tracing import trace
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

import monoquant_core as mq
from monoquant_core import rows as r
from monoquant_core.encoding import FULL, INT8, Encoding
from monoquant_core.errors import SourceError
from monoquant_core.model import Source
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor

TYPES = {
    "int8": (TensorProto.INT8, -128, 127),
    "uint8": (TensorProto.UINT8, 0, 255),
    "int4": (TensorProto.INT4, -8, 7),
    "uint4": (TensorProto.UINT4, 0, 15),
}


def save(path: Path, nodes: list[onnx.NodeProto], tensors: list[TensorProto], inputs: list[Any], rank: int = 2) -> Path:
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)], tensors
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def tensor(name: str, kind: int, array: np.ndarray[Any, Any]) -> TensorProto:
    return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())


def read(source: Source, name: str) -> QuantizedTensor:
    spec = next(s for s in source.specs() if s.name == name)
    value = source.read(name, r.all_rows(spec.shape))
    assert isinstance(value, QuantizedTensor)
    assert value.encoding == spec.encoding
    return value


def in_chunks(source: Source, name: str, elements: int = 64) -> torch.Tensor:
    spec = next(s for s in source.specs() if s.name == name)
    pieces = []
    for rows in r.chunks(spec.shape, r.quantum(spec.shape, spec.encoding), elements):
        value = source.read(name, rows)
        pieces.append((value.dequantize() if isinstance(value, QuantizedTensor) else value.clone()).flatten())
    return torch.cat(pieces).view(spec.shape)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dequantized_weights_read_back_as_the_reference_decodes_them(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, low, high = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    shape = (data.draw(st.integers(1, 5)) * 16, data.draw(st.integers(2, 40)))
    seed = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    granularity = data.draw(st.sampled_from(["tensor", "axis 0", "axis 1", "blocks 0", "blocks 1"]))
    axis = int(granularity[-1]) if granularity[-1].isdigit() else 1
    block = 16 if granularity.startswith("blocks") else 0
    param = {"tensor": (), "axis 0": shape[:1], "axis 1": shape[1:]}.get(granularity)
    if param is None:
        param = tuple(-(-n // 16) if i == axis else n for i, n in enumerate(shape))
    codes = seed.integers(low, high, shape, endpoint=True)
    scale = seed.uniform(0.01, 1, param).astype(np.float32)
    zero = seed.integers(low, high, param, endpoint=True)
    if data.draw(st.booleans()):
        zero = np.zeros_like(zero)
    tensors = [
        tensor("w_quantized", kind, codes),
        numpy_helper.from_array(np.asarray(scale), "s"),
        tensor("z", kind, zero),
    ]
    inputs = ["w_quantized", "s"] + (["z"] if data.draw(st.booleans()) or low == 0 else [])
    attributes = {} if granularity == "tensor" else {"axis": axis, **({"block_size": block} if block else {})}
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["w"], **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, shape[0]])
    path = save(tmp_path_factory.mktemp("dq") / "x.onnx", nodes, tensors, [x])
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": np.eye(shape[0], dtype=np.float32)})
    source = open_onnx(path)
    (spec,) = source.specs()
    assert (spec.name, spec.shape, spec.kind) == ("w", shape, "linear_transposed")
    assert np.array_equal(read(source, "w").dequantize().numpy(), expected)
    assert np.array_equal(in_chunks(source, "w").numpy(), expected)
    assert [n.op_type for n in source.graph.model.graph] == ["MatMul"]
    source.close()


def test_embeddings_of_which_rows_are_dequantized(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (12, 32))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"])
    for blocks in (1, 2):
        scale = rng.uniform(0.1, 1, (12, blocks)).astype(np.float32)
        nodes = [
            helper.make_node("Gather", ["w", "ids"], ["g"]),
            helper.make_node("Gather", ["s", "ids"], ["gs"]),
            helper.make_node("DequantizeLinear", ["g", "gs"], ["y"], axis=-1, block_size=32 // blocks),
        ]
        tensors = [tensor("w", TensorProto.INT8, codes), numpy_helper.from_array(scale, "s")]
        source = open_onnx(save(tmp_path / "x.onnx", nodes, tensors, [ids], 3))
        (spec,) = source.specs()
        assert spec.kind == "embedding"
        assert spec.encoding is not None
        assert spec.encoding.block == ((1, FULL) if blocks == 1 else (1, 16))
        expected = codes.reshape(12, blocks, -1) * scale[..., None]
        assert np.array_equal(read(source, "w").dequantize().numpy(), expected.reshape(12, 32).astype(np.float32))
        with source.graph.runner(()) as runner:
            (found,) = runner.run(torch.tensor([[3, 5]])).values()
        assert np.array_equal(found.numpy()[0], expected.reshape(12, 32)[[3, 5]].astype(np.float32))
        source.close()


def test_transposed_codes_stay_as_they_are_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-8, 8, (24, 32)), rng.uniform(0.1, 1, (24, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("Transpose", ["s"], ["st"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["wt", "st"], ["d"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 32])
    tensors = [tensor("w", TensorProto.INT4, codes), numpy_helper.from_array(scale, "s")]
    path = save(tmp_path / "x.onnx", nodes, tensors, [x])
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": np.eye(32, dtype=np.float32)})
    source = open_onnx(path)
    (spec,) = source.specs()
    assert (spec.shape, spec.kind) == ((24, 32), "linear")
    assert spec.encoding is not None
    assert spec.encoding.block == (1, 16)
    assert np.array_equal(read(source, "w").dequantize().numpy().T, expected)
    source.close()


@functools.cache
def net() -> tuple[nn.Module, OnnxSource]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    return module, trace(open_source(module), torch.randn(2, 3, 64))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weights", [QuantType.QInt8, QuantType.QUInt8])
def test_what_onnxruntimes_own_tool_quantized_reads_back(tmp_path: Path, per_channel: bool, weights: QuantType) -> None:
    from monoquant_onnx.runner import write_copy

    module, traced = net()
    write_copy(traced.graph, tmp_path / "float.onnx")
    quantize_dynamic(
        str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"), per_channel=per_channel, weight_type=weights
    )
    source = open_onnx(tmp_path / "q.onnx")
    quantized = [s for s in source.specs() if s.encoding is not None]
    assert {s.name for s in quantized} == {"0.weight", "2.weight", "4.weight"}
    assert all(s.activation is not None and s.activation.dynamic for s in quantized)
    state = module.state_dict()
    for spec in quantized:
        value = read(source, spec.name).dequantize()
        step = 2 * state[spec.name].abs().max() / 250
        assert (value - state[spec.name].T).abs().max() <= step
    x = torch.randn(4, 3, 64)
    with source.graph.runner(()) as runner:
        (ours,) = runner.run(x).values()
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"))
    (theirs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.nn.functional.cosine_similarity(ours.flatten(), torch.tensor(theirs).flatten(), 0) > 0.999
    source.close()


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}),
        ("int8", {"granularity": "tensor"}),
        ("int4", {"group_size": 32}),
        ("int4", {"group_size": 32, "symmetric": False}),
        ("fp8", {}),
    ],
)
def test_a_finished_file_on_a_graph_has_the_same_values(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    module, traced = net()
    with mq.quantize(module, scheme=scheme, options=options) as model:
        model.save(tmp_path / "q", format_options={"convention": "generic"})
    finished = mq.open_source(tmp_path / "q")
    source = GraphedSource(traced, finished)
    for name in ("0.weight", "2.weight"):  # square, and not
        spec = next(s for s in source.specs() if s.name == name)
        assert spec.encoding is not None
        assert spec.kind == "linear_transposed"
        expected = read(finished, name).dequantize().T
        assert torch.equal(in_chunks(source, name), expected)
        assert torch.equal(in_chunks(source, name, 10**6), expected)
    bias = source.read("0.bias", range(1))
    assert isinstance(bias, torch.Tensor)
    assert torch.equal(bias, module.state_dict()["0.bias"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_on_a_graph(tmp_path: Path, kind: str) -> None:
    """Also under names that the graph does not have: then by what the tensors hold."""
    module, traced = net()
    names = {"0.weight": "blk.0.ffn_up.weight", "2.weight": "blk.1.ffn_up.weight", "4.weight": "4.weight"}
    state = {names.get(n, n): t for n, t in module.state_dict().items()}
    with mq.quantize(state, scheme=kind) as model:
        model.save(tmp_path / "q.gguf", "gguf", format_options={"architecture": "generic"})
    finished = mq.open_source(tmp_path / "q.gguf")
    source = GraphedSource(traced, finished)
    encoded = {s.name for s in source.specs() if s.encoding is not None}
    assert encoded >= {"0.weight", "2.weight"}
    for name in encoded:
        assert torch.equal(in_chunks(source, name), read(finished, names[name]).dequantize().T)


def test_a_folded_batch_norm_goes_into_the_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    traced = trace(open_source(module), torch.randn(2, 3, 8, 8))
    with mq.quantize(module, scheme="int8") as model:
        model.save(tmp_path / "q", format_options={"convention": "generic"})
        model.apply_to(module)
    source = GraphedSource(traced, mq.open_source(tmp_path / "q"))
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    assert (factor < 0).any()
    weight = module[0].weight
    expected = (weight * factor[:, None, None, None]).detach()
    torch.testing.assert_close(in_chunks(source, "0.weight"), expected, rtol=1e-5, atol=1e-7)
    assert read(source, "0.weight").scale.min() > 0  # type: ignore[union-attr]
    with mq.quantize(module, scheme="int8", options={"granularity": "tensor"}) as model:
        model.save(tmp_path / "t", format_options={"convention": "generic"})
    with pytest.raises(SourceError, match=r"'0.weight': the graph has the BatchNorm behind it folded in") as caught:
        GraphedSource(traced, mq.open_source(tmp_path / "t"))
    assert "--granularity channel" in caught.value.hint


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    _, traced = net()
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    with mq.quantize(other, scheme="int8") as model:
        model.save(tmp_path / "q", format_options={"convention": "generic"})
    source = GraphedSource(traced, mq.open_source(tmp_path / "q"))
    with pytest.raises(SourceError, match=r"tensor '2.weight': is not 2.weight of the graph Sequential") as caught:
        source.read("2.weight", range(64))
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="holds no quantized tensors"):
        GraphedSource(traced, open_source(other))
    smaller = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with mq.quantize(smaller, scheme="int8") as model:
        model.save(tmp_path / "s", format_options={"convention": "generic"})
    with pytest.raises(SourceError, match="none of its 2 quantized tensors is one of Sequential"):
        GraphedSource(traced, mq.open_source(tmp_path / "s"))


def test_transposing_blocks() -> None:
    encoding = Encoding(INT8, (1, 4), Encoding(INT8, (1, FULL), "float32"))
    turned = transposed(encoding)
    assert (turned.block, turned.scale.block) == ((4, 1), (FULL, 1))  # type: ignore[union-attr]
    with pytest.raises(SourceError, match="cannot be transposed"):
        transposed(Encoding(INT8, (4,), "float32"), "f: tensor 'w'")
    scale = QuantizedTensor(encoding.scale, torch.randint(-8, 8, (6, 2), dtype=torch.int8), torch.rand(6, 1))  # type: ignore[arg-type]
    value = QuantizedTensor(encoding, torch.randint(-8, 8, (6, 8), dtype=torch.int8), scale)
    assert torch.equal(turn(value, turned).dequantize(), value.dequantize().T)
    assert torch.equal(cut(turn(value, turned), range(4, 8)).dequantize(), value.dequantize().T[4:8])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_quantized_graphs_that_make_no_sense_are_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parameters of any shape and type: an error is one line, and what is taken for a weight can be read."""
    path = tmp_path_factory.mktemp("odd") / "x.onnx"
    shapes = st.sampled_from([(), (1,), (16,), (32,), (2, 32), (16, 2), (16, 32), (32, 16), (3, 1, 1)])
    weight = data.draw(st.sampled_from([TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.INT32]))

    outer = data.draw(shapes)
    fitting = [(), (1,), outer[:1], outer[-1:], (*outer[:-1], 2), (2, *outer[1:])]

    def odd(name: str, usual: int) -> TensorProto:
        kind = data.draw(st.sampled_from([usual] * 6 + [TensorProto.INT8, TensorProto.FLOAT]))
        shape = outer if name == "w" else data.draw(st.sampled_from(fitting) | shapes)
        values = np.random.default_rng(0).integers(0, 7, shape)
        special = data.draw(st.sampled_from([1.0, 1.0, 0.0, float("nan"), float("inf")])) if kind == 1 else 1
        with np.errstate(invalid="ignore"):
            return helper.make_tensor(name, kind, shape, (values * special if kind == 1 else values).ravel().tolist())

    attributes = data.draw(
        st.fixed_dictionaries(
            {}, optional={"axis": st.integers(-3, 4), "block_size": st.sampled_from([-16, 0, 1, 16, 1 << 40])}
        )
    )
    perm = data.draw(st.sampled_from([[1, 0], [0, 1], None]))
    nodes = [helper.make_node("Transpose", ["w"], ["wt"], **({"perm": perm} if perm else {}))]
    codes = data.draw(st.sampled_from(["w", "wt", "g", "xq"]))
    nodes += [
        helper.make_node("Gather", ["w", "ids"], ["g"]),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", [codes, "s", "z"][: data.draw(st.integers(2, 3))], ["d"], **attributes),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "as", "az"]),
        helper.make_node("MatMulInteger", ["a", data.draw(st.sampled_from(["w", "wt"])), "az", "z"], ["m"]),
        helper.make_node("Cast", ["m"], ["mf"], to=1),
        helper.make_node("Mul", ["as", "s"], ["ms"]),
        helper.make_node("Mul", ["mf", "ms"], ["y2"]),
        helper.make_node("Add", ["y", "y2"], ["sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 16]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [3]),
        ],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
        [odd("w", weight), odd("s", TensorProto.FLOAT), odd("z", weight)],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    message = ""
    try:
        source = open_onnx(path)
        for spec in source.specs():
            value = source.read(spec.name, r.all_rows(spec.shape))
            assert (value.shape if isinstance(value, QuantizedTensor) else tuple(value.shape)) == spec.shape
        source.close()
    except SourceError as exc:
        message = str(exc)
        assert message.startswith(str(path))
    assert "\n" not in message

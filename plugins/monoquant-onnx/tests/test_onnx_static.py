"""Static quantization: where the pairs go, what onnxruntime makes of them, and biases that int32 holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))

from monoquant_onnx import biases
from monoquant_onnx.static import scale_and_zero_point
from onnx_kit import calibrated, check_quantizing_nodes, cnn, cosine, encoder, normal, operators, run, save_model

import monoquant_core as mq
from monoquant_core.encoding import INT8, Encoding
from monoquant_core.errors import QuantizationError
from monoquant_core.tensor import QuantizedTensor

IMAGES = {"x": normal(8, 3, 16, 16, seed=9, scale=1.0)}
IDS = {"ids": np.random.default_rng(0).integers(0, 600, (3, 7))}
ALL = ("fc.weight=w8a8",)  # the head, too, which the default recipe keeps


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cnn(tmp_path_factory.mktemp("images") / "cnn.onnx")


@pytest.fixture(scope="module")
def stats(images: Path) -> Any:
    return calibrated(images, [IMAGES])


def save(source: Path, path: Path, stats: Any, scheme: str = "w8a8", **options: Any) -> mq.Report:
    format_options = options.pop("format_options", {})
    with mq.quantize(source, scheme=scheme, stats=stats, **options) as model:
        return model.save(path, "onnx", force=True, format_options=format_options)


def initializers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_convolutional_nets_are_joined_from_one_end_to_the_other(images: Path, stats: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    report = save(images, path, stats, set=ALL)
    onnx.checker.check_model(path, full_check=True)
    found = operators(path, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (3, 1, 1), found
    assert found["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "Add", "Relu", "Gemm"} & set(found)
    assert found["QuantizeLinear"] + found["DequantizeLinear"] <= 2, "one at each end"
    assert check_quantizing_nodes(path, IMAGES) > 16
    exact, fast, floats = run(path, IMAGES, optimized=False), run(path, IMAGES), run(images, IMAGES)
    assert cosine(exact, fast) > 0.9999
    assert cosine(fast, floats) > 0.998
    assert not any("stay floats" in note for note in report.notes)


def test_weights_have_seven_bits_unless_the_target_can_add_eight(images: Path, stats: Any, tmp_path: Path) -> None:
    largest = {}
    for target in ("auto", "x86", "vnni", "arm", "gpu"):
        report = save(images, tmp_path / "q.onnx", stats, format_options={"target": target})
        largest[target] = max(int(np.abs(initializers(tmp_path / "q.onnx")[f"{n}.weight"]).max()) for n in "ab")
        assert any("7 bits" in note for note in report.notes) == (target in ("auto", "x86"))
    assert largest == {"auto": 63, "x86": 63, "vnni": 127, "arm": 127, "gpu": 127}
    save(images, tmp_path / "q.onnx", None)
    assert np.abs(initializers(tmp_path / "q.onnx")["a.weight"]).max() == 127, "nothing is added in weights alone"


@pytest.mark.parametrize("calibrator", ["minmax", "mse"])  # mse has other ranges before and after the pooling
def test_biases_are_steps_of_the_inputs_scale_times_the_weights(images: Path, tmp_path: Path, calibrator: str) -> None:
    path = tmp_path / "q.onnx"
    save(images, path, calibrated(images, [IMAGES], calibrator), set=ALL)
    found, floats = initializers(path), initializers(images)
    nodes = {n.output[0]: n for n in onnx.load(path).graph.node}
    for name in ("stem", "a", "b", "fc"):
        layer = next(n for n in nodes.values() if n.op_type in ("Conv", "Gemm") and n.input[1].startswith(f"{name}."))
        scale = found[nodes[layer.input[0]].input[1]] * found[f"{name}.weight_scale"]
        assert found[f"{name}.bias"].dtype == np.int32
        assert np.array_equal(found[f"{name}.bias_scale"], scale)
        wanted = np.round(floats[f"{name}.bias"].astype(np.float64) / scale.astype(np.float64))
        assert np.array_equal(found[f"{name}.bias"], wanted.astype(np.int32))


def test_a_finished_file_reads_back_and_is_written_again_as_it_was(images: Path, stats: Any, tmp_path: Path) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    save(images, first, stats, set=ALL)
    with mq.load(first) as model:
        found = dict(model.tensors())
        activations = {s.name: s.activation for s in model.source.specs() if s.activation is not None}
    codes = initializers(first)
    for name in ("stem", "a", "b", "fc"):
        tensor = found[f"{name}.weight"]
        assert isinstance(tensor, QuantizedTensor)
        assert np.array_equal(tensor.codes.numpy(), codes[f"{name}.weight"])
        assert np.array_equal(np.ravel(tensor.scale), codes[f"{name}.weight_scale"])
        assert not activations[f"{name}.weight"].dynamic
    report = mq.export(first, again, "onnx")
    assert {t.action for t in report.tensors if t.name.endswith(".weight")} == {"repack"}
    assert operators(again, tmp_path) == operators(first, tmp_path)
    assert cosine(run(again, IMAGES, optimized=False), run(first, IMAGES, optimized=False)) > 0.99999
    again_codes = initializers(again)
    for name in ("stem", "a", "b", "fc"):
        assert np.array_equal(again_codes[f"{name}.weight"], codes[f"{name}.weight"])


def test_channels_that_are_nothing_beside_their_bias_keep_it(tmp_path: Path) -> None:
    """BatchNorm leaves such channels: at their own scale the bias would take more than 32 bits."""
    node, weight, bias = helper.make_node, normal(16, 8, 3, 3, seed=1), normal(16, seed=2)
    weight[3], weight[7], bias[3], bias[7] = weight[3] * 1e-11, 0, 0.8, -0.3
    nodes = [node("Conv", ["x", "c.weight", "c.bias"], ["y"], pads=[1] * 4)]
    inputs = {"x": (TensorProto.FLOAT, ["n", 8, 6, 6])}
    source = save_model(tmp_path / "m.onnx", nodes, {"c.weight": weight, "c.bias": bias}, inputs, ["y"])
    feeds = {"x": normal(2, 8, 6, 6, seed=3, scale=1.0)}
    save(source, tmp_path / "q.onnx", calibrated(source, [feeds]))
    found, floats = run(tmp_path / "q.onnx", feeds), run(source, feeds)
    step = (floats.max() - floats.min()) / 255
    assert np.abs(found - floats)[:, [3, 7]].max() <= step
    assert np.abs(found - floats).max() <= 4 * step


def test_names_that_are_taken_are_not_taken_again(tmp_path: Path) -> None:
    """A graph whose own weights are called as our parameters would be."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "c.weight", "c.bias"], ["h"], pads=[1] * 4),
        node("Mul", ["h", "c.bias_scale"], ["i"]),
        node("Add", ["i", "x_scale"], ["y"]),
    ]
    weights = {
        "c.weight": normal(8, 8, 3, 3, seed=1),
        "c.bias": normal(8, seed=2),
        "c.bias_scale": normal(8, 1, 1, seed=3, scale=1.0),
        "x_scale": normal(8, 1, 1, seed=4),
    }
    inputs = {"x": (TensorProto.FLOAT, ["n", 8, 6, 6])}
    source = save_model(tmp_path / "m.onnx", nodes, weights, inputs, ["y"])
    feeds = {"x": normal(2, 8, 6, 6, seed=5, scale=1.0)}
    save(source, tmp_path / "q.onnx", calibrated(source, [feeds]))
    found = initializers(tmp_path / "q.onnx")
    assert np.array_equal(found["c.bias_scale"], weights["c.bias_scale"])
    assert np.array_equal(found["x_scale"], weights["x_scale"])
    assert cosine(run(tmp_path / "q.onnx", feeds), run(source, feeds)) > 0.999


def test_a_finished_weight_whose_bias_does_not_fit_is_refused() -> None:
    """Its codes must not change, so the layer has to stay as it is."""
    with pytest.raises(QuantizationError, match=r"bias\[1\] is .* steps of its weight's scale, more than int32 holds"):
        biases.codes(0.01)([torch.tensor([0.5, 0.5]), torch.tensor([1e-3, 1e-12])])
    made = biases.codes(0.01)([torch.tensor([0.5, -0.5]), torch.tensor([1e-3, 1e-3])])
    assert made.tolist() == [50_000, -50_000]


def test_lifting_changes_nothing_else() -> None:
    from monoquant_onnx.data import MemoryData

    weight, bias = torch.randn(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4])
    weight[2] *= 1e-12
    for axis, matrix in ((0, weight), (1, weight.T.contiguous())):
        block = (1, -1) if axis == 0 else (-1, 1)
        lift = biases.lifted(0.02, MemoryData(bias), Encoding(INT8, block, "float32", clip=(-63, 63)), axis)
        made = lift([matrix]).movedim(axis, 0)
        assert torch.equal(made[[0, 1, 3]], weight[[0, 1, 3]])
        assert made[2].count_nonzero() == 1
        assert bias[2] / (0.02 * made[2].max() / 63) < 2**31
        assert torch.equal(matrix.movedim(axis, 0)[2], weight[2]), "the source is not written to"


def test_products_of_transformers_only_have_their_inputs_quantized(tmp_path: Path) -> None:
    text, path = encoder(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    save(text, path, calibrated(text, [IDS]))
    graph = onnx.load(path).graph
    quantized = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert quantized == {"x", "product", "mean"}, "shared by query, key and value; sums and products stay floats"
    found = operators(path, tmp_path)
    assert found["MatMulIntegerToFloat"] == 4, found
    assert not {"MatMul", "Gemm"} & set(found)
    assert check_quantizing_nodes(path, IDS) == 13
    assert cosine(run(path, IDS), run(text, IDS)) > 0.99
    assert cosine(run(path, IDS), run(path, IDS, optimized=False)) > 0.999


def test_statistics_of_modules_alone_leave_other_values_as_floats(images: Path, tmp_path: Path) -> None:
    """As hooks on a torch module give them: what a layer takes and makes, and nothing between."""
    points = [f"{n}:{side}" for n in ("stem", "a", "b", "fc") for side in ("input", "output")]
    report = save(images, tmp_path / "q.onnx", calibrated(images, [IMAGES], points=points))
    (note,) = [n for n in report.notes if "stay floats" in n]
    assert "sum_relu" in note
    assert cosine(run(tmp_path / "q.onnx", IMAGES), run(images, IMAGES)) > 0.998
    assert operators(tmp_path / "q.onnx", tmp_path)["QLinearConv"] == 3


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ranges_hold_zero_and_their_ends(low: float, high: float) -> None:
    scale, point = scale_and_zero_point((min(low, high), max(low, high)))
    assert 0 <= int(point) <= 255
    assert scale > 0
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    step = float(scale)
    assert (0 - int(point)) * step <= low + 0.51 * step + 1e-30
    assert (255 - int(point)) * step >= high - 0.51 * step - 1e-30


def test_the_command_calibrates_and_writes(images: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "q.onnx"
    np.savez(data, x=normal(120, 3, 16, 16, seed=9, scale=1.0))
    line = [
        sys.executable,
        "-m",
        "monoquant_core.cli",
        "quantize",
        images,
        "-o",
        out,
        "--scheme",
        "w8a8",
        "--data",
        data,
    ]
    done = subprocess.run([*map(str, line), "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == out.stat().st_size
    assert operators(out, tmp_path)["QLinearConv"] == 3
    assert cosine(run(out, IMAGES), run(images, IMAGES)) > 0.99

"""Finished files in onnxruntime: what is compared, what is found, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))

from monoquant_onnx import runtime, stretches
from onnx_kit import calibrated, cnn, encoder, normal, save_model

import monoquant_core as mq
from monoquant_core.agreement import Verification
from monoquant_core.errors import ExecutionError, MonoquantError

IDS = [{"ids": torch.arange(i, i + 24).reshape(3, 8) % 600} for i in (0, 100)]
IMAGES = [{"x": torch.from_numpy(normal(4, 3, 16, 16, seed=i, scale=1.0))} for i in (20, 21)]
RANGES = ([{"ids": IDS[0]["ids"].numpy()}], [{"x": batch["x"].numpy()} for batch in IMAGES])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("text") / "text.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cnn(tmp_path_factory.mktemp("images") / "images.onnx")


def saved(source: Any, path: Path, scheme: str, options: dict[str, Any] | None = None, **more: Any) -> Path:
    format_options = more.pop("format_options", None)
    with mq.quantize(source, scheme=scheme, options=options, **more) as model:
        model.save(path, "onnx", format_options=format_options)
    return path


def rows(found: Verification, against: str) -> list[float]:
    return [a.relative_error for a in found.agreements if a.against == against]


def changed(path: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(path)
    change(model.graph)
    made = path.with_name(f"changed-{path.name}")
    onnx.save(model, made)
    return made


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monoquant_core.cli", "verify", *map(str, words)], capture_output=True, text=True
    )


# --- it agrees ---


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {}), ("int4", {"group_size": 32}), ("int4", {"group_size": 32, "symmetric": False}), ("w8a8", {})],
)
def test_an_encoder_computes_what_the_file_holds(
    scheme: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    found = mq.verify(saved(text, tmp_path / "q.onnx", scheme, options), text, IDS)
    assert found.runtime == "onnxruntime"
    rounds = ["unoptimized, alone"] if scheme == "w8a8" else []
    assert [a.against for a in found.agreements] == ["IR", "unoptimized", *rounds, "original"]
    judged = [a.against for a in found.agreements if a.bound is not None]
    assert judged == ["IR", *(rounds or ["unoptimized"])]
    assert rows(found, "IR")[0] < 1e-5
    assert rows(found, "original")[0] > 1e-3
    assert found.passed, found


@pytest.mark.parametrize("which", ["text", "images"])
def test_calibrated_ranges_round_where_the_file_rounds(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, data = request.getfixturevalue(which), {"text": IDS, "images": IMAGES}[which]
    stats = calibrated(source, RANGES[which == "images"])
    path = saved(source, tmp_path / "q.onnx", "w8a8", stats=stats)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    found = mq.verify(path, source, data)
    assert rows(found, "IR")[0] < 1e-5
    assert rows(found, "unoptimized, alone")[0] < 2e-3
    assert found.passed, found


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16)
        self.head = torch.nn.Linear(16, 8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.norm(self.conv(images)))
        return self.head(hidden.mean((2, 3))), hidden


def test_a_modules_outputs_are_those_of_its_graph_in_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().train()
    net(torch.randn(64, 3, 8, 8))  # statistics for the BatchNorm
    net.eval()
    batch = torch.randn(4, 3, 8, 8)
    path = saved(net, tmp_path / "net.onnx", "int8", example=batch)
    found = mq.verify(path, net, [batch, {"images": batch * 2}])
    assert len(rows(found, "IR")) == len(rows(found, "original")) == 2
    assert max(rows(found, "IR")) < 1e-5
    with torch.no_grad():
        expected = net(batch)[0]
    assert rows(found, "original")[0] < 0.05 < float(expected.norm())
    labels = {"images": batch, "labels": expected.argmax(1)}
    (quality,) = mq.verify(path, net, [labels]).qualities
    assert (quality.metric, quality.count, quality.before) == ("accuracy", 4, 1.0)


class Tied(torch.nn.Module):
    """The rows of an embedding, dequantized after they were looked up, go into a product as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = torch.nn.Embedding(300, 64), torch.nn.Linear(64, 64)
        self.out = torch.nn.Linear(64, 300, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.out(torch.tanh(self.first(self.embed(ids))))
        return hidden


class Up(torch.nn.Module):
    """A convolution whose result is an output, behind a concatenation and a resize."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 3, padding=1)
        self.last = torch.nn.Conv2d(19, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        low = self.mid(torch.relu(self.down(images)))
        high = torch.nn.functional.interpolate(low, scale_factor=2.0)
        result: torch.Tensor = self.last(torch.cat([images, high], 1))
        return result


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", [Tied, Up])
def test_values_that_the_file_calls_otherwise(kind: type[torch.nn.Module], static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    batch = torch.arange(24).reshape(3, 8) if kind is Tied else torch.randn(4, 3, 8, 8)
    stats = mq.calibrate(net, [batch, batch.flip(0)], format="onnx") if static else None
    found = mq.verify(saved(net, tmp_path / "q.onnx", "w8a8", stats=stats, example=batch), net, [batch])
    assert rows(found, "IR")[0] < 1e-5
    assert found.passed, found


def test_data_beside_the_file(text: Path, tmp_path: Path) -> None:
    path = saved(text, tmp_path / "q.onnx", "w8a8", format_options={"max_inline": 0})
    (data,) = tmp_path.glob("*.data")
    done = command(path, "--against", text, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    data.unlink()
    done = command(path, "--against", text)
    assert done.returncode == 2
    assert data.name in done.stderr
    assert "Traceback" not in done.stderr


# --- it does not ---


def test_a_file_with_the_wrong_wiring_is_out_of_tolerance(text: Path, tmp_path: Path) -> None:
    """The values are right, tensor by tensor: only what the file computes shows that two of them changed places."""
    path = saved(text, tmp_path / "q.onnx", "int8")

    def swap(graph: onnx.GraphProto) -> None:
        first, second = (
            next(n for n in graph.node if n.op_type == "MatMul" and n.output[0] == o) for o in ("query", "value")
        )
        first.input[1], second.input[1] = second.input[1], first.input[1]

    done = command(changed(path, swap), "--against", text, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["agreements"][0]["relative_error"] > 0.01
    assert found["agreements"][1]["passed"]  # "unoptimized": with and without optimizations it is wrong in the same way


def test_the_first_value_that_differs_is_named_where_inputs_are_rounded(text: Path, tmp_path: Path) -> None:
    path = saved(text, tmp_path / "q.onnx", "w8a8")

    def shift(graph: onnx.GraphProto) -> None:
        next(n for n in graph.node if n.op_type == "Tanh").op_type = "Softsign"

    found = mq.verify(changed(path, shift), text, IDS)
    assert not found.passed
    assert "first value that differs from the IR's" in found.notes[0]
    assert "'x'" in found.notes[0]


def test_a_scale_that_was_changed_is_refused(text: Path, tmp_path: Path) -> None:
    path = saved(text, tmp_path / "q.onnx", "int8")

    def scale(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == "down.weight_scale")
        values = numpy_helper.to_array(tensor).copy()
        values[7] *= 4
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    done = command(changed(path, scale), "--against", text)
    assert done.returncode == 2
    assert "tensor 'down.weight': channel 7 of axis 1 is further from the original's values than zeros" in done.stderr
    with pytest.raises(ExecutionError, match="further from"):
        mq.verify(changed(path, scale), text, IDS)


def test_what_optimizations_change_is_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's products with 4-bit weights round their inputs, which no bound of 1e-6 allows."""
    path = saved(text, tmp_path / "q.onnx", "int4", {"group_size": 32})
    monkeypatch.setattr(runtime.OnnxRuntime, "optimized_bound", 1e-6)
    found = mq.verify(path, text, IDS)
    assert not found.passed
    assert [a.passed for a in found.agreements] == [True, False, True]
    assert found.notes[0].endswith("(MatMul)")
    assert any(f"'{name}'" in found.notes[0] for name in ("query", "key", "value"))


def test_the_first_stretch_that_kernels_compute_differently_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overflow would be: the second convolution has other codes when onnxruntime optimizes."""
    path = saved(images, tmp_path / "q.onnx", "w8a8", stats=calibrated(images, RANGES[1]))
    cut = stretches._cut

    def overflowing(*given: Any) -> bytes:
        model = onnx.load_from_string(cut(*given))
        tensor = next(t for t in model.graph.initializer if t.name == "a.weight")
        codes = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.minimum(codes, 31), tensor.name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(stretches, "_cut", overflowing)
    found = mq.verify(path, images, IMAGES)
    assert not found.passed
    assert [a.against for a in found.agreements if not a.passed] == ["unoptimized, alone"]
    assert "a_relu_quantized" in found.notes[0]
    assert "(Conv)" in found.notes[0]


def test_products_that_overflow_are_found(tmp_path: Path) -> None:
    """Two codes of 127 times inputs of 255 are more than an int16 holds: silent on x86 processors without VNNI."""
    probes = pytest.importorskip("monoquant_probes.instructions")
    sets, _ = probes.instruction_sets()
    if "avx2" not in sets or set(probes.INT8_PRODUCTS) & set(sets):
        pytest.skip("this processor does not overflow")
    weights = {"w": np.full((32, 32, 3, 3), 0.1, np.float32)}
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    source = save_model(tmp_path / "m.onnx", [node], weights, {"x": (TensorProto.FLOAT, ["n", 32, 8, 8])}, ["y"])
    ones = np.ones((2, 32, 8, 8), np.float32)
    stats = calibrated(source, [{"x": ones}])
    path = saved(source, tmp_path / "q.onnx", "w8a8", stats=stats, format_options={"target": "vnni"})
    found = mq.verify(path, source, [{"x": torch.from_numpy(ones)}])
    assert not found.passed
    assert "(Conv)" in found.notes[0]


# --- refusals ---


def test_files_that_onnx_or_onnxruntime_do_not_take(text: Path, tmp_path: Path) -> None:
    path = saved(text, tmp_path / "q.onnx", "int8")

    def twice(graph: onnx.GraphProto) -> None:
        next(n for n in graph.node if n.op_type == "Tanh").input.append("rows")

    def foreign(graph: onnx.GraphProto) -> None:
        next(n for n in graph.node if n.op_type == "Tanh").domain = "com.nobody"

    done = command(changed(path, twice), "--against", text)
    assert (done.returncode, "onnx.checker" in done.stderr) == (2, True), done.stderr
    with pytest.raises(MonoquantError, match=r"com\.nobody"):
        mq.verify(changed(path, foreign), text, IDS)


def test_an_original_of_other_shapes_is_refused(images: Path, tmp_path: Path) -> None:
    path = saved(images, tmp_path / "q.onnx", "int8")
    with pytest.raises(ExecutionError, match=r"'stem\.weight' \[16, 3, 3, 3\]: the original has \[8, 3, 3, 3\] there"):
        mq.verify(path, cnn(tmp_path / "other.onnx", width=8), IMAGES)


def test_a_batch_without_an_input_is_refused(text: Path, tmp_path: Path) -> None:
    path = saved(text, tmp_path / "q.onnx", "int8")
    with pytest.raises(MonoquantError, match="the batch has no ids"):
        mq.verify(path, text, [{"tokens": IDS[0]["ids"], "mask": IDS[0]["ids"]}])

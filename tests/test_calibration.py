"""Calibration from end to end: what is learned, what is said of the data, what is kept, and what it changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import monoquant_core as mq
from monoquant_core.calibration import Collector, bind, data_key
from monoquant_core.errors import CalibrationError, DeviceError, MonoquantError, PlanError, SourceError
from monoquant_core.model import TensorSpec
from monoquant_core.module_runner import ModuleGraph
from monoquant_core.statistics import Key, Statistics, model_key
from monoquant_core.stats import TensorStats, column_importance


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 128, seed: int = 0) -> torch.Tensor:
    """Unlike noise: each has a colour of its own. Between -2.5 and 2.5."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 4 - 2
    return colour + torch.rand(count, 3, 6, 6, generator=generator) - 0.5


def batches(x: torch.Tensor, size: int = 16) -> list[torch.Tensor]:
    return list(x.split(size))


def kinds(stats: Statistics) -> list[str]:
    return [finding.kind for finding in stats.findings]


def test_what_is_learned_is_what_numpy_says() -> None:
    module, x = net(), images()
    stats = mq.calibrate(module, batches(x), calibrator="minmax")
    with torch.no_grad():
        conv = module.conv(x)
        pooled = conv.relu().mean((2, 3)).double().numpy()
    assert set(stats) == {"conv:input", "conv:output", "fc:input", "fc:output"}
    assert (stats.samples, stats.calibrator, kinds(stats)) == (128, "minmax", [])
    fc, values = stats["fc:input"], x.double().numpy()
    assert fc.count == 128
    np.testing.assert_allclose(fc.minimum, pooled.min(0), rtol=1e-6)
    np.testing.assert_allclose(fc.maximum, pooled.max(0), rtol=1e-6)
    assert fc.importance is not None
    np.testing.assert_allclose(fc.importance, (pooled**2).mean(0), rtol=1e-6)
    image = stats["conv:input"]
    assert image.count == 128 * 36
    assert image.importance is not None
    np.testing.assert_allclose(image.importance, (values**2).mean((0, 2, 3)), rtol=1e-6)
    assert image.low is not None
    assert image.high is not None
    assert (image.low.item(), image.high.item()) == (x.min().item(), x.max().item())


def test_percentiles_are_numpys() -> None:
    x = images()
    stats = mq.calibrate(net(), batches(x), calibrator="percentile", options={"percentile": 99.0})
    assert stats.calibrator == "percentile percentile=99.0"
    low, high = stats["conv:input"].low, stats["conv:input"].high
    assert low is not None
    assert high is not None
    expected = np.percentile(x.numpy(), [1, 99])
    np.testing.assert_allclose([low.item(), high.item()], expected, rtol=0.01)


def test_a_program_in_a_file_gives_the_same(tmp_path: Path) -> None:
    module, x = net(), images()
    program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    expected = mq.calibrate(module, batches(x))
    for source in (str(tmp_path / "net.pt2"), program):
        found = mq.calibrate(source, batches(x))
        assert found.model == expected.model
        assert found.data == expected.data
        assert same(found, expected)


def test_an_onnx_file_tells_the_same_of_its_modules(tmp_path: Path) -> None:
    """onnxruntime computes otherwise than torch, by rounding only."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = net(), images(32)
    shapes = ({0: torch.export.Dim("n")},)
    exported = torch.onnx.export(module, (x[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "net.onnx")
    expected = mq.calibrate(module, batches(x), calibrator="minmax")
    found = mq.calibrate(tmp_path / "net.onnx", batches(x), calibrator="minmax")
    assert found.data == expected.data
    for point in ("conv:input", "fc:input"):
        assert found[point].count == expected[point].count
        for label in ("minimum", "maximum", "importance", "low", "high"):
            torch.testing.assert_close(
                getattr(found[point], label), getattr(expected[point], label), rtol=1e-4, atol=1e-5
            )


def same(a: Statistics, b: Statistics) -> bool:
    return a.to_bytes() == b.to_bytes()


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
def test_two_halves_merged_are_the_whole(calibrator: str) -> None:
    """As two processes would do it: each sees half of the data."""
    make, _ = bind(mq.load_registry().calibrator(calibrator), {})
    x = images()

    def collect(*parts: torch.Tensor) -> Collector:
        collector = Collector(make)
        with ModuleGraph(net()).runner() as runner:
            collector.run(runner, parts)
        return collector

    first, second = collect(*batches(x[:64])), collect(*batches(x[64:]))
    first.merge(second)
    merged, whole = first.statistics(), collect(*batches(x)).statistics()
    assert merged.samples == whole.samples
    for point, stats in whole.items():
        for label in ("count", "minimum", "maximum", "low", "high", "importance"):
            torch.testing.assert_close(getattr(merged[point], label), getattr(stats, label), rtol=1e-6, atol=0)


# --- what is said of the data ---


def test_good_data_is_not_spoken_of() -> None:
    assert kinds(mq.calibrate(net(), batches(images()))) == []


def test_few_samples_and_duplicates() -> None:
    x = images()
    assert kinds(mq.calibrate(net(), batches(x[:4], 1)))[:1] == ["few"]
    twice = mq.calibrate(net(), batches(torch.cat([x, x[:7]])))
    (finding,) = [f for f in twice.findings if f.kind == "duplicates"]
    assert "7 of 135 samples" in finding.text


def test_noise_is_seen() -> None:
    noise = torch.randn(128, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    class Wide(Net):
        """A bias, so that what all samples have in common is most of the answer."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    torch.manual_seed(0)
    assert "alike" in kinds(mq.calibrate(Wide(), batches(noise)))


def test_outliers_clipping_and_ranges_that_move() -> None:
    x = images()
    x[5, 0, 0, 0] = 1e4
    wide = mq.calibrate(net(), batches(x), calibrator="minmax")
    assert "outlier" in kinds(wide)
    # One sample of 128 is cut off.
    cut_off: dict[str, Any] = {"calibrator": "percentile", "options": {"percentile": 98.0}}
    assert "outlier" not in kinds(mq.calibrate(net(), batches(x), **cut_off))
    narrow = mq.calibrate(net(), batches(images()), **cut_off)
    clipped = next(f for f in narrow.findings if f.kind == "clipped")
    assert "conv:input" in clipped.points
    growing = images() * torch.linspace(0.1, 3, 128).view(-1, 1, 1, 1)
    assert "moved" in kinds(mq.calibrate(net(), batches(growing)))


def test_dead_units_and_modules_that_nothing_reached() -> None:
    class Dead(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = torch.nn.Linear(8, 2)
            torch.nn.init.constant_(self.conv.bias, -100.0)  # type: ignore[arg-type]

    stats = mq.calibrate(Dead(), batches(images()))
    dead = next(f for f in stats.findings if f.kind == "constant")
    assert dead.points[0] == "fc:input"
    unreached = next(f for f in stats.findings if f.kind == "unreached")
    assert unreached.points == ("aux:input",)


def test_what_calibration_refuses() -> None:
    module = net()
    bad = images()
    bad[3, 1, 2, 2] = float("nan")
    with pytest.raises(CalibrationError, match="conv:input: NaN or infinity was observed"):
        mq.calibrate(module, batches(bad))
    with pytest.raises(CalibrationError, match="there are no samples"):
        mq.calibrate(module, [])
    with pytest.raises(CalibrationError, match=r"it fails on a batch of float32\[16, 4\]"):
        mq.calibrate(module, [torch.ones(16, 4)])
    with pytest.raises(CalibrationError, match="nothing that says how to run them"):
        mq.calibrate(module.state_dict(), batches(images()))
    with pytest.raises(DeviceError):
        mq.calibrate(module, batches(images()), device="cuda:99")
    with pytest.raises(MonoquantError, match="no calibrator 'percentil'"):
        mq.calibrate(module, batches(images()), calibrator="percentil")
    with pytest.raises(CalibrationError, match="no point 'fk:input'"):
        mq.calibrate(module, batches(images()), points=["fk:input"])


def test_batches_as_people_have_them() -> None:
    module, x = net(), images()
    expected = mq.calibrate(module, batches(x))
    assert same(mq.calibrate(module, [part.numpy() for part in batches(x)]), expected)
    for one in (x, x.numpy(), {"x": x}):
        with pytest.raises(CalibrationError, match="data is a list of batches, and this is one") as caught:
            mq.calibrate(module, one)
        assert "[batch]" in caught.value.hint
    labelled = [(part, torch.zeros(len(part))) for part in batches(x)]
    with pytest.raises(CalibrationError, match="a batch of 2 inputs, and it takes 1") as caught:
        mq.calibrate(module, labelled)
    assert "leave out labels" in caught.value.hint


def test_data_of_a_file_is_named_in_errors(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", x=np.zeros((4, 3, 6, 6), np.uint8))
    program = torch.export.export(net(), (images(4),))
    with pytest.raises(CalibrationError) as caught:
        mq.calibrate(program, tmp_path / "bytes.npz")
    assert "bytes.npz" in str(caught.value)
    assert "input 'x' takes float32, and the data has uint8" in str(caught.value)
    np.savez(tmp_path / "double.npz", x=images(4).double().numpy())
    stats = mq.calibrate(program, tmp_path / "double.npz")
    assert "input 'x': float64 values are cast to float32" in stats.notes


# --- files of statistics ---


@pytest.fixture(scope="module")
def stats() -> Statistics:
    return mq.calibrate(net(), batches(images()[:50]))  # with a warning


def test_files_hold_everything(stats: Statistics, tmp_path: Path) -> None:
    stats.save(tmp_path / "a.safetensors")
    stats.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = Statistics.load(tmp_path / "a.safetensors")
    assert same(found, stats)
    assert dataclasses.replace(found, points={}) == dataclasses.replace(stats, points={})
    assert found.findings[0].kind == "few"
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "a.safetensors")["fc:input/importance"], stats["fc:input"].importance)  # type: ignore[arg-type]
    with pytest.raises(MonoquantError, match="already exists"):
        stats.save(tmp_path / "a.safetensors")


def test_damage_is_noticed_wherever_it_is(stats: Statistics, tmp_path: Path) -> None:
    stats.save(tmp_path / "good.safetensors")
    data, path = (tmp_path / "good.safetensors").read_bytes(), tmp_path / "bad.safetensors"
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CalibrationError) as caught:
            Statistics.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(data[:-1])
    with pytest.raises(CalibrationError):
        Statistics.load(path)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match="holds no statistics of monoquant"):
        Statistics.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"b\.safetensors"):
        Statistics.load(tmp_path / "b.safetensors")
    with pytest.raises(CalibrationError, match=r"c\.safetensors"):
        Statistics.load(tmp_path / "c.safetensors")


def test_statistics_of_another_model_are_refused(stats: Statistics, tmp_path: Path) -> None:
    stats.save(tmp_path / "s.safetensors")
    mq.quantize(net(), scheme="w8a8", stats=tmp_path / "s.safetensors").close()
    other = net()
    with torch.no_grad():
        other.fc.weight[0, 0] += 0.01
    for given in (stats, tmp_path / "s.safetensors"):
        with pytest.raises(CalibrationError, match="of another model than Net"):
            mq.quantize(other, scheme="w8a8", stats=given)
    mq.quantize(other, scheme="w8a8", stats=dict(stats)).close()  # whoever takes them out of it vouches for them


def test_the_key_of_a_model(tmp_path: Path) -> None:
    """The same weights have one key wherever they lie; any other value of a small tensor, another."""
    module = net()
    torch.save(module.state_dict(), tmp_path / "net.pt")
    keys = {model_key(mq.open_source(s)) for s in (module, module.state_dict(), tmp_path / "net.pt")}
    assert len(keys) == 1
    big = {"w": torch.randn(4000, 700)}
    before = model_key(mq.open_source(big))
    big["w"] = big["w"] * 1.001
    assert model_key(mq.open_source(big)) != before


class Counted(Net):
    runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.runs += 1
        return super().forward(x)


def test_a_cache_is_used_only_for_what_it_is_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x, cache = Counted().eval(), batches(images()), tmp_path / "cache.safetensors"

    def runs(data: Sequence[torch.Tensor], model: torch.nn.Module = module, **how: Any) -> tuple[int, Statistics]:
        Counted.runs = 0
        found = mq.calibrate(model, data, cache=cache, **how)
        return Counted.runs, found

    first = runs(x)
    assert first[0] == 8
    again = runs(x)
    assert again[0] == 0
    assert same(again[1], first[1]) or again[1].points.keys() == first[1].points.keys()
    assert runs(batches(images(), 32))[0] == 0  # the same samples in other batches
    content = cache.read_bytes()
    for stale in (
        runs(batches(images(seed=1))),
        runs(x, calibrator="minmax"),
        runs(x, calibrator="percentile", options={"percentile": 99.0}),
    ):
        assert stale[0] > 0
        assert any("is not used, and the model is calibrated anew" in note for note in stale[1].notes)
    with torch.no_grad():
        module.fc.weight += 0.1
    assert runs(x)[0] == 8
    assert cache.read_bytes() == content  # a file that the user named is never replaced
    with torch.no_grad():
        module.fc.weight -= 0.1
    cache.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    count, found = runs(x)
    assert count == 8
    assert any("damaged: its checksum is another" in note for note in found.notes)


def test_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path))
    torch.manual_seed(0)
    module, x = Counted().eval(), batches(images())
    Counted.runs = 0
    for damaged in (False, False, True):
        if damaged:
            (file,) = (tmp_path / "statistics").iterdir()
            file.write_bytes(b"\0" * 64)
        with mq.quantize(module, scheme="w8a8") as model:
            model.calibrate(x, keep=True)
            assert "static" in str(model.plan().steps[0].placed.proposal.activation)  # type: ignore[union-attr]
    assert Counted.runs == 16  # once, and once more for the damaged file
    (file,) = (tmp_path / "statistics").iterdir()
    Statistics.load(file)
    with pytest.raises(CalibrationError, match="read only once"):
        mq.calibrate(module, iter(x), cache=tmp_path / "c")


# --- what it changes ---


def test_static_activations_need_statistics(stats: Statistics) -> None:
    with pytest.raises(
        PlanError, match="w8a8 activations=static needs calibration statistics of what goes into conv"
    ) as e:
        mq.plan(net(), scheme="w8a8", options={"activations": "static"})
    assert "--data or --stats" in e.value.hint
    some = {point: found for point, found in stats.items() if point.startswith("conv")}
    with pytest.raises(PlanError, match="what goes into fc.weight") as e:
        mq.plan(net(), scheme="w8a8", options={"activations": "static"}, set=["fc=w8a8:activations=static"], stats=some)
    assert "--keep 'fc.weight'" in e.value.hint


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_activations_of_the_plan(scheme: str, stats: Statistics) -> None:
    def activation(activations: str, known: Statistics | None) -> mq.ActivationQuant | None:
        plan = mq.plan(net(), scheme=scheme, options={"activations": activations}, stats=known)
        step = next(s for s in plan.steps if s.placed.output.name == "conv.weight")
        assert step.placed.proposal is not None
        return step.placed.proposal.activation

    for known, chosen, dynamic in ((None, "auto", True), (stats, "auto", False), (stats, "dynamic", True)):
        found = activation(chosen, known)
        assert found is not None
        assert found.dynamic is dynamic
    static = activation("static", stats)
    assert static is not None
    measured = stats["conv:input"]
    assert (static.granularity, static.low, static.high) == ("tensor", measured.low, measured.high)


def test_importance_of_a_weights_columns() -> None:
    values = torch.arange(1.0, 7.0)
    stats = TensorStats(1, torch.tensor(0.0), torch.tensor(1.0), importance=values)

    def columns(kind: str, *shape: int) -> list[float] | None:
        found = column_importance(stats, TensorSpec("w", shape, "float32", kind=kind))
        return None if found is None else found.tolist()

    assert columns("linear", 3, 6) == values.tolist()
    assert columns("linear_transposed", 6, 3) == values.tolist()
    assert columns("conv", 2, 6, 1, 2) == values.repeat_interleave(2).tolist()
    assert columns("conv", 4, 3, 2) == [2.5, 2.5, 3.5, 3.5, 4.5, 4.5]  # two groups of three channels
    assert columns("conv_transpose", 6, 4, 3, 3) is None
    with pytest.raises(CalibrationError, match="statistics of 6 inputs: they are of another model"):
        columns("linear", 3, 5)


def weighted_error(model: mq.QuantizedModel, stats: Statistics) -> float:
    """Squared error of what layers give, as far as columns are independent: sum of importance times squared error."""
    error = 0.0
    for name, tensor in model.tensors():
        found = stats.get(f"{name.removesuffix('.weight')}:input")
        if isinstance(tensor, mq.QuantizedTensor) and found is not None and found.importance is not None:
            original = model.source.read(name, range(tensor.shape[0]))
            assert isinstance(original, torch.Tensor)
            error += float(((tensor.dequantize() - original).double().square() * found.importance).sum())
    return error


@pytest.mark.parametrize("scheme", ["int4", "Q4_K", "Q3_K"])
def test_calibration_lowers_the_error_that_matters(scheme: str, shared: Path) -> None:
    """On a trained Llama and text of its own domain."""
    pytest.importorskip("transformers")
    llama = shared / "models" / "tiny-llama"
    stats = llama_stats(shared)
    set_ = [f"re:layers\\.[05]\\.(self_attn\\.[qkvo]_proj|mlp\\.(gate|up|down)_proj)\\.weight={scheme}"]
    with mq.quantize(llama, set=set_) as plain, mq.quantize(llama, set=set_, stats=stats) as calibrated:
        before, after = weighted_error(plain, stats), weighted_error(calibrated, stats)
    assert after < 0.99 * before


_LLAMA: dict[str, Statistics] = {}


def llama_stats(shared: Path) -> Statistics:
    if "stats" not in _LLAMA:
        text = shared / "data" / "code_eval.txt"
        folder = shared / "models" / "tiny-llama"
        _LLAMA["stats"] = mq.calibrate(folder, text, samples=32, batch_size=8, length=64)
    return _LLAMA["stats"]


# --- a trained network ---


@pytest.fixture(scope="module")
def resnet(shared: Path) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("resnet_cifar", shared / "models" / "resnet_cifar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resnet_cifar"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["resnet_cifar"]


def calibrate_resnet(shared: Path, x: str | torch.Tensor, **how: Any) -> Statistics:
    data = x if isinstance(x, str) else list(x.split(32))
    weights = shared / "models" / "resnet20_cifar10.pt"
    return mq.calibrate("resnet_cifar:resnet20", data, weights=weights, **how)


def test_real_images_are_good_data_and_bad_ones_are_seen(shared: Path, resnet: Any) -> None:
    archive = f"{shared / 'data' / 'cifar10_subset.npz'}:calib_x"
    stats = calibrate_resnet(shared, archive, preprocess="resnet_cifar:preprocess")
    assert (stats.samples, kinds(stats)) == (256, [])
    assert len(stats) == 40
    few = calibrate_resnet(shared, archive, preprocess="resnet_cifar:preprocess", samples=4)
    assert "few" in kinds(few)
    assert kinds(calibrate_resnet(shared, torch.randn(256, 3, 32, 32))) == ["alike"]


def test_weights_that_do_not_fit_the_factory(shared: Path, resnet: Any, tmp_path: Path) -> None:
    state = torch.load(shared / "models" / "resnet20_cifar10.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "linear.bias"} | {"extra": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        mq.open_source("resnet_cifar:resnet20", weights=tmp_path / "w.pt")
    assert "it lacks linear.bias; the module has no extra" in str(caught.value)


def test_keys_ignore_where_they_are_run(stats: Statistics) -> None:
    key = Key(stats.model, stats.data, stats.calibrator)
    assert stats.differs(key) == ""
    assert "other data" in stats.differs(dataclasses.replace(key, data="x"))
    assert data_key(batches(images()[:50], 7)) == stats.data

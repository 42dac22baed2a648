"""``--device``: the same bytes as on the CPU, the same refusals, and what calibration sees there.

Runs where torch has an accelerator. Where it has none, ``test_far_device.py`` runs it on a device that is made up.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import monoquant_core as mq
from monoquant_core.encoding import Encoding
from monoquant_core.errors import DeviceError, QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.plugins import load_registry
from monoquant_core.reencode import reencode
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.testing.samples import fitting, quantized

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FOUND = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = FOUND.type if FOUND is not None else ""
pytestmark = pytest.mark.skipif(not DEVICE, reason="torch has no accelerator here")
cuda = pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA only")

REGISTRY = load_registry()
UP, GATE, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate", "down"))
Q4, ODD = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def awkward(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Heavy tails, blocks of zeros, of one value and of few levels, ties, outliers, tiny and large rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, columns), generator=generator)
    x = x / torch.randn((rows, columns), generator=generator).abs().clamp_(min=0.3).sqrt_() * 0.02
    x[0] = 0.0
    x[1, : columns // 2] = 0.0
    x[2] = 0.037
    x[3] = torch.randint(-1, 2, (columns,), generator=generator) * 0.05
    x[4] = torch.randint(-8, 8, (columns,), generator=generator) * 0.0125
    x[5, ::7] = -x[5, 3]
    x[6, columns // 3] = 0.5
    x[7] *= 0.1
    x[8] *= 30
    x[9] = x[9].abs()
    x[10] = -x[10].abs()
    x[11] = torch.linspace(-0.11, 0.13, columns)
    return x


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights of every float dtype; rows of whole super-blocks of 256, but for one."""
    folder = tmp_path_factory.mktemp("model")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": awkward(64, 256, 1).bfloat16(),
        UP: awkward(320, 256, 2).bfloat16(),
        GATE: awkward(320, 256, 3),
        DOWN: awkward(256, 512, 4).half(),
        Q4: awkward(48, 256, 5).double(),
        ODD: awkward(33, 96, 6),
        "model.norm.weight": torch.ones(256),
        "lm_head.weight": awkward(64, 256, 7),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def importance(columns: int) -> TensorStats:
    """Of squared inputs, over many orders of magnitude, some zero."""
    generator = torch.Generator().manual_seed(columns)
    squares = torch.randn(columns, generator=generator).mul_(2).exp_()
    squares[::9] = 0
    ends = torch.full((columns,), -3.0), torch.full((columns,), 4.0)
    return TensorStats(100, *ends, squares, torch.tensor(-2.5), torch.tensor(3.5))


STATS = {n: importance(c) for n, c in ((UP, 256), (GATE, 256), (DOWN, 512), (Q4, 256), (ODD, 96))}


def contents(path: Path) -> dict[str, bytes]:
    """All files of an output."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def same_files(quantized: mq.QuantizedModel, format: str, options: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """Written on the CPU and on the device, in chunks of different sizes: the same bytes, which are returned."""
    suffix = REGISTRY.exporter(format).suffix
    reports, found = [], []
    for device in ("cpu", DEVICE):
        place = folder / device
        place.mkdir(parents=True)
        reports.append(quantized.save(place / f"out{suffix}", format, format_options=options, device=device, threads=2))
        found.append(contents(place))
    assert found[0].keys() == found[1].keys()
    differ = [name for name in found[0] if found[0][name] != found[1][name]]
    assert not differ
    assert torch.device(reports[1].device).type == DEVICE
    # How far values are from their source is summed as it suits the device: not bytes, and equal to six digits.
    assert reports[1].sqnr_db == pytest.approx(reports[0].sqnr_db, abs=1e-4)
    return found[0]


def add_graph(source: mq.Source, format: str) -> None:
    """As in test_matrix.py."""
    declared = REGISTRY.exporter(format)
    if declared.needs == "graph":
        exporter = declared.load()(declared.options())
        source.info = dataclasses.replace(source.info, graph=exporter.sample_graph(source.specs()))


WIDTHS = range(2, 9) if DEVICE != "far" else (2, 4, 8)  # a device in Python takes its time
INTEGERS: list[tuple[str, dict[str, Any]]] = [
    *((f"int{bits}", {"rounding": rounding, "symmetric": symmetric}) for bits in WIDTHS
      for rounding in ("nearest", "search") for symmetric in (True, False)),
    *((f"int{bits}", {"granularity": "channel", "rounding": "search"}) for bits in (2, 4, 8)),
    *((f"int{b}", {"granularity": "tensor", "symmetric": symmetric}) for b in (4, 8) for symmetric in (True, False)),
    ("int4", {"group_size": 32}),
    ("int4", {"narrow_range": True}),
    ("int8", {"narrow_range": True, "rounding": "search"}),
    ("w8a8", {}),
    ("w8a8", {"granularity": "tensor"}),
]  # fmt: skip
FLOATS: list[tuple[str, dict[str, Any]]] = [
    ("fp8", {}),
    ("fp8", {"granularity": "tensor"}),
]
TYPES = sorted(d.name for d in REGISTRY.schemes.values() if d.target.startswith("monoquant_gguf.quantizer"))
#: with importance or without
SEARCHES = [
    ("search", True),
    ("llama.cpp", False),
    *([] if DEVICE == "far" else [("search", False), ("llama.cpp", True)]),
]


def label(value: Any) -> str:
    """Of a case."""
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize(("scheme", "options"), INTEGERS + FLOATS, ids=label)
def test_safetensors_has_the_same_bytes(
    scheme: str, options: dict[str, Any], weighed: bool, model: Path, tmp_path: Path
) -> None:
    if weighed and options.get("rounding") != "search":
        pytest.skip("has no use for importance")
    rules = [{"match": "*_proj.*", "scheme": scheme, "options": options}]
    if options.get("granularity", "group") == "group" and scheme not in ("int8", "w8a8", "fp8"):
        rules.insert(0, {"match": ODD, "scheme": scheme, "options": {**options, "group_size": 24}})
    recipe = {"base": "none", "rules": rules}
    with mq.quantize(model, scheme="", recipe=recipe, stats=STATS if weighed else None) as made:
        same_files(made, "safetensors", {"convention": "generic"}, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_have_the_same_bytes(dtype: str, model: Path, tmp_path: Path) -> None:
    rules = [{"match": name, "scheme": dtype} for name in (Q4, ODD, "lm_head.*", "*norm*")]
    with mq.quantize(model, scheme="", recipe={"base": "none", "rules": rules}) as made:
        same_files(made, "safetensors", {"convention": "generic"}, tmp_path)


@pytest.mark.parametrize("scheme", ["int4", "int8", "w8a8", "fp8"])
def test_compressed_tensors_has_the_same_bytes(scheme: str, model: Path, tmp_path: Path) -> None:
    with mq.quantize(model, scheme=scheme, keep=[ODD]) as made:
        same_files(made, "safetensors", {"convention": "compressed-tensors"}, tmp_path)


@pytest.mark.parametrize(
    ("rounding", "weighed"), SEARCHES, ids=["search-importance", "plain", "search", "importance"][: len(SEARCHES)]
)
@pytest.mark.parametrize("scheme", TYPES)
def test_gguf_has_the_same_bytes(scheme: str, rounding: str, weighed: bool, model: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.mlp.*", "scheme": scheme, "options": {"rounding": rounding, "allow_fallback": True}}]
    recipe = {"base": "none", "rules": rules}
    with mq.quantize(model, scheme="", recipe=recipe, stats=STATS if weighed else None) as made:
        same_files(made, "gguf", {"architecture": "generic"}, tmp_path)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {}), ("int4", {}), ("int4", {"symmetric": False}), ("fp8", {}), ("w8a8", {})],
    ids=label,
)
def test_onnx_has_the_same_bytes(scheme: str, options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    recipe = {"base": "none", "rules": [{"match": "*.mlp.*", "scheme": scheme, "options": options}]}
    with mq.quantize(model, scheme="", recipe=recipe) as made:
        add_graph(made.source, "onnx")
        same_files(made, "onnx", {}, tmp_path)


def test_a_finished_file_is_repacked_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for scheme, format, options in (
        ("int4", "gguf", {"architecture": "generic"}),
        ("Q4_0", "safetensors", {"convention": "generic"}),
        ("Q4_K", "safetensors", {"convention": "generic"}),
    ):
        first = tmp_path / scheme / "first.safetensors"
        first.parent.mkdir()
        given = {"group_size": 32} if scheme == "int4" else None
        mq.quantize(model, scheme=scheme, options=given, keep=[ODD]).save(
            first, format_options={"convention": "generic"}
        )
        with mq.load(first) as made:
            same_files(made, format, options, tmp_path / scheme)


SHAPES = [(8, 256), (4, 6, 32), (8, 4, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_converted_alike(shape: tuple[int, ...]) -> None:
    for name, encoding in fitting(shape):
        tensor = quantized(encoding, shape)
        for scale in ("float16", "bfloat16"):
            if isinstance(encoding.scale, str):
                wanted = dataclasses.replace(encoding, scale=scale)
                assert reencode(tensor.to(DEVICE), wanted).to("cpu").equal(reencode(tensor, wanted)), name
        there = tensor.to(DEVICE).dequantize().cpu()
        assert torch.equal(there.view(torch.int32), tensor.dequantize().view(torch.int32)), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("scheme", "options"), [("int8", {}), ("int4", {"rounding": "search"}), ("fp8", {})], ids=label
)
def test_magnitudes_at_the_ends_of_float32(scheme: str, options: dict[str, Any], dtype: str) -> None:
    """Subnormal numbers are not flushed to zero, and what overflows on the way does so everywhere."""
    declared = REGISTRY.scheme(scheme)
    quantizer = declared.load()(declared.options(**options))
    spec = TensorSpec("model.layers.0.w", (12, 256), dtype, kind="linear")
    encoding = quantizer.propose(spec).encoding
    assert isinstance(encoding, Encoding)
    x = awkward(12, 256, 8)
    rows = torch.stack(
        [
            x[7 + i % 4] * s
            for i, s in enumerate((1e-45, 1e-42, 1e-38, 3e-37, 1e-30, 1, 1e10, 1e20, 1e30, 1e37, 1e-7, 1e-3))
        ]
    )
    rows = rows.clamp_(-3e38, 3e38) if dtype != "float16" else rows.clamp_(-6e4, 6e4)
    rows = rows.to(getattr(torch, dtype))
    made = [
        quantizer.quantize(rows.to(d), encoding, Context(spec, range(12), Scratch())).to("cpu") for d in ("cpu", DEVICE)
    ]
    assert isinstance(made[0], QuantizedTensor)
    assert made[0].equal(made[1])


@pytest.mark.parametrize("rounding", ["search", "llama.cpp"])
@pytest.mark.parametrize("scheme", TYPES)
def test_magnitudes_at_the_ends_of_float16(scheme: str, rounding: str) -> None:
    """Scales that become zero, and sums of what is so small that quotients are NaN on the way."""
    declared = REGISTRY.scheme(scheme)
    quantizer = declared.load()(declared.options(rounding=rounding))
    spec = TensorSpec("model.layers.0.w", (12, 256), "float32", kind="linear")
    encoding = quantizer.propose(spec).encoding
    sizes = (1e-45, 1e-43, 1e-38, 1e-30, 1e-20, 1e-15, 1e-9, 1e-7, 1e-5, 1.0, 100.0, 0.0)
    rows = awkward(12, 256, 8) * torch.tensor(sizes).unsqueeze(1)
    rows[:, 128:] = rows[torch.randperm(12, generator=torch.Generator().manual_seed(0)), 128:]
    for stats in (None, STATS[UP].importance):
        made = []
        for device in ("cpu", DEVICE):
            given = stats if stats is None else stats.to(device)
            context = Context(spec, range(12), Scratch(), None, given)
            made.append(quantizer.quantize(rows.to(device), encoding, context).to("cpu"))
        assert made[0].equal(made[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "Q4_K", "float16"])
def test_what_is_not_finite_is_refused_with_its_index(scheme: str, bad: float, model: Path, tmp_path: Path) -> None:
    x = awkward(320, 256, 2)
    x[301, 17] = bad
    source = {UP: x, GATE: awkward(320, 256, 3)}
    format, options = ("gguf", {"architecture": "generic"}) if scheme == "Q4_K" else ("safetensors", {})
    made = mq.quantize(source, scheme="", recipe={"base": "none", "rules": [{"match": "*", "scheme": scheme}]})
    with pytest.raises(QuantizationError, match=rf"up_proj.weight ?\[301, 17\](:| is) {bad}"):
        made.save(tmp_path / f"o{REGISTRY.exporter(format).suffix}", format, format_options=options, device=DEVICE)
    assert not list(tmp_path.iterdir())


@cuda
def test_a_source_on_the_device_gives_the_same_bytes(tmp_path: Path) -> None:
    state = {UP: awkward(320, 256, 2), "b": torch.arange(5.0)}
    there = {name: value.to(DEVICE) for name, value in state.items()}
    found = []
    for source, device in ((state, "cpu"), (there, "cpu"), (there, DEVICE)):
        path = tmp_path / f"{len(found)}.safetensors"
        mq.quantize(source, scheme="int4").save(path, device=device)
        found.append(path.read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"no device '{DEVICE}:99' here: ") as refused:
        mq.quantize({UP: awkward(16, 256, 2)}, scheme="int8").save(tmp_path / "o.safetensors", device=f"{DEVICE}:99")
    assert f"{DEVICE}:0" in refused.value.hint


def test_a_device_without_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr("monoquant_int.search._to_grid", refuse)
    with pytest.raises(DeviceError, match=f"^{DEVICE}.*: {UP}: has no float64, which int4.* searches with") as refused:
        mq.quantize({UP: awkward(16, 256, 2)}, scheme="int4").save(tmp_path / "o.safetensors", device=DEVICE)
    assert "--rounding nearest" in refused.value.hint
    assert not list(tmp_path.iterdir())


class Net(nn.Module):
    """Two layers and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.gelu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@cuda
def test_a_module_there_is_quantized_and_stays_there(net: Net) -> None:
    there = copy.deepcopy(net).to(DEVICE)
    expected = mq.quantize(net, scheme="int8").state_dict()
    made = mq.quantize(there, scheme="int8").state_dict()
    assert all(torch.equal(made[k].cpu(), v) for k, v in expected.items())
    twin = copy.deepcopy(there)
    mq.quantize(net, scheme="int8").apply_to(twin)
    assert all(p.device.type == DEVICE for p in twin.parameters())
    assert all(torch.equal(v.cpu(), expected[k]) for k, v in twin.state_dict().items())


@cuda
@pytest.mark.parametrize("calibrator", sorted(d.name for d in REGISTRY.calibrators.values()))
def test_calibration_there_learns_the_same(calibrator: str, net: Net) -> None:
    """Up to what sums in another order do to activations: a few units of float32's last place, of a layer's norm."""
    batches = list(torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = (mq.calibrate(net, batches, calibrator=calibrator, device=d) for d in ("cpu", DEVICE))
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert here.keys() == there.keys()
    for point in here:
        a, b = here[point], there[point]
        assert a.count == b.count
        for name in ("minimum", "maximum", "importance", "low", "high"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                # A range may fall into the next bin of a histogram, which is a part in 2^7 or more of a value.
                loose = name in ("low", "high") and calibrator != "minmax"
                torch.testing.assert_close(y, x, rtol=5e-2 if loose else 1e-4, atol=1e-5, msg=f"{point}: {name}")


@cuda
def test_calibration_of_a_module_that_is_there(net: Net) -> None:
    batches = list(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(16))
    there = copy.deepcopy(net).to(DEVICE)
    found = mq.calibrate(there, batches)
    assert all(p.device.type == DEVICE for p in there.parameters())
    assert found.keys() == mq.calibrate(net, batches).keys()


@cuda
def test_out_of_memory_is_one_line(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(DeviceError, match="out of memory for w") as refused:
            mq.quantize({"w": torch.randn(4096, 4096)}, scheme="int8").save(tmp_path / "o.safetensors", device="cuda")
        assert "--threads" in refused.value.hint
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not list(tmp_path.iterdir())


@cuda
def test_command(run: Run, model: Path, tmp_path: Path) -> None:
    for scheme in ("int4", "Q4_K"):
        paths = []
        for device in ("cpu", "cuda"):
            paths.append(tmp_path / f"{scheme}-{device}{'.gguf' if scheme == 'Q4_K' else ''}")
            extra = ["--set", f"{ODD}=float16"] if scheme == "Q4_K" else ["--keep", ODD]
            extra += ["--architecture", "generic"] if scheme == "Q4_K" else []
            done = run("quantize", model, "-o", paths[-1], "--scheme", scheme, "--device", device, "--json", *extra)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["device"].startswith(device)
        assert contents(paths[0]) == contents(paths[1])
    absent = run("quantize", model, "-o", tmp_path / "absent", "--device", "cuda:99")
    assert absent.returncode == 2
    error, hint = absent.stderr.splitlines()[-2:]
    assert error.startswith("error: no device 'cuda:99' here: ")
    assert hint.startswith("hint: ")
    assert "cuda:0" in hint
    assert not (tmp_path / "absent").exists()


@cuda
def test_doctor_knows_the_device(run: Run) -> None:
    properties = torch.cuda.get_device_properties(0)
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert properties.name in " ".join(done.stdout.split())
    assert f"compute capability {properties.major}.{properties.minor}" in " ".join(done.stdout.split())
    told = json.loads(run("doctor", "--json").stdout)
    text = json.dumps(told)
    assert properties.name in text
    probe = REGISTRY.probes["cuda"].load()
    result = probe(REGISTRY.probes["cuda"].options()).probe()
    assert result.present
    assert (result.findings["scheme:fp8"].speed == "fast") == ((properties.major, properties.minor) >= (8, 9))
    assert result.memory_bytes <= properties.total_memory

"""The Python API on models in memory and on disk: what it promises, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import RawExporter, read_back

import monoquant_core as mq
from monoquant_core.declarations import ExporterDeclaration
from monoquant_core.errors import (
    CalibrationError,
    MonoquantError,
    OptionError,
    OutputError,
    PlanError,
    PluginError,
    QuantizationError,
    RecipeError,
    SourceError,
    UnknownNameError,
)
from monoquant_core.model import ModelInfo
from monoquant_core.planner import make_plan
from monoquant_core.sources import StateDictSource
from monoquant_core.tensor import QuantizedTensor, same_bits


class Net(nn.Module):
    """Every kind of layer that the standard schemes take, and some they keep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.up = nn.ConvTranspose1d(48, 32, 2)
        self.proj = nn.Linear(32, 64)
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.register_buffer("steps", torch.arange(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids)).transpose(1, 2)
        return self.lm_head(self.proj(self.up(self.conv(x)).transpose(1, 2)))


class Tied(nn.Module):
    """Embeddings that are the output head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mid = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def actions(plan: mq.Plan) -> dict[str, str]:
    return {d.spec.name: d.action for d in plan.decisions}


def test_a_module_is_quantized_and_never_modified(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = mq.quantize(net, scheme="int8")
    state = model.state_dict()
    assert all(same_bits(v, before[k]) for k, v in net.state_dict().items())
    assert list(state) == list(before)
    changed = [k for k in state if not same_bits(state[k], before[k])]
    assert changed == ["conv.weight", "up.weight", "proj.weight"]
    for name in changed:  # at most half a step of the channel's own scale
        axis = 1 if name == "up.weight" else 0
        channels = before[name].transpose(0, axis).flatten(1)
        half = channels.abs().amax(1) / 127 / 2
        assert ((state[name].transpose(0, axis).flatten(1) - channels).abs().amax(1) <= half * 1.0001).all()


def test_apply_to_gives_the_quantized_models_outputs(net):
    ids = torch.arange(12).view(1, 12)
    expected = net(ids)
    twin = copy.deepcopy(net)
    mq.quantize(net, scheme="int8").apply_to(twin)
    difference = (twin(ids) - expected).norm() / expected.norm()
    assert 0 < difference < 0.02
    other = nn.Linear(3, 3)
    weight = other.weight.clone()
    with pytest.raises(SourceError, match="does not fit Linear: it lacks bias, weight; the module has no conv.bias"):
        mq.quantize(net, scheme="int8").apply_to(other)
    with pytest.raises(SourceError, match=r"does not fit Linear: other shapes: weight \[4, 3\] for \[3, 3\]"):
        mq.quantize({"weight": torch.ones(4, 3), "bias": torch.ones(3)}, scheme="int8").apply_to(other)
    assert torch.equal(other.weight, weight)


def test_apply_to_leaves_out_what_models_compute_and_names_of_tied_tensors():
    """Old checkpoints hold buffers that newer models do not, or the other way round; one name of a tie is enough."""
    module = Tied()
    module.register_buffer("position_ids", torch.arange(4))
    weights = {"embed.weight": torch.randn(32, 16), "mid.weight": torch.randn(16, 16), "mid.bias": torch.randn(16)}
    old = {"rotary_emb.inv_freq": torch.ones(3), "attn.bias": torch.ones(1, 1, 4, 4)}
    with mq.quantize(weights | old, scheme="int8", keep=["rotary_emb.inv_freq", "attn.bias"]) as model:
        model.apply_to(module)
        expected = model.state_dict()
    assert all(same_bits(v, expected[k]) for k, v in module.state_dict().items() if k in weights)
    assert same_bits(module.lm_head.weight.detach(), expected["embed.weight"])
    with pytest.raises(SourceError, match=r"the module has no attn\.bias$"):  # of a layer
        mq.quantize(weights | {"attn.bias": torch.ones(4)}, scheme="int8").apply_to(module)
    attention = nn.ModuleDict({"attn": nn.Linear(16, 16)})
    with pytest.raises(SourceError, match=r"it lacks attn\.bias$"):
        mq.quantize({"attn.weight": torch.randn(16, 16)}, scheme="int8").apply_to(attention)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(16, 16, device="meta"), "weight.*has no data"),
        (nn.LazyLinear(16), "weight.*is not initialized"),
        ({"weight": torch.ones(16, 16)}, "dict: a module is wanted"),
    ],
)
def test_apply_to_refuses_what_holds_no_data(module, words):
    layer = nn.Linear(16, 16)
    with pytest.raises(SourceError, match=words):
        mq.quantize(layer, scheme="int8").apply_to(module)


def test_module_and_its_state_dict_give_the_same_tensors(net):
    # A state_dict knows no module classes: names tell it the same here, but for the transposed convolution.
    a = mq.quantize(net, scheme="int8", keep=["up.weight"]).state_dict()
    b = mq.quantize(net.state_dict(), scheme="int8", keep=["up.weight"]).state_dict()
    assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "float16", "bfloat16", "w8a8", "int3"])
def test_saved_and_loaded_is_what_state_dict_says(net, tmp_path, scheme):
    grouped = scheme in ("int4", "int3")  # rows of a transposed convolution have no groups
    model = mq.quantize(
        net, scheme=scheme, options={"group_size": 16} if grouped else None, keep=["up"] if grouped else []
    )
    report = model.save(tmp_path / "m.safetensors")
    assert report.files == {"": (tmp_path / "m.safetensors").stat().st_size}
    assert report.nbytes == model.plan("safetensors", destination="m.safetensors").bytes_after
    loaded = mq.load(tmp_path / "m.safetensors")
    expected, got = model.state_dict(), loaded.state_dict()
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert same_bits(got[name], value), name
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_tied_tensors_are_one_on_disk_and_two_again_in_the_state_dict(tmp_path):
    net = Tied()
    plan = mq.plan(net, scheme="int8", destination="m.safetensors")
    assert actions(plan)["lm_head.weight"] == "drop"
    mq.quantize(net, scheme="int8").save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 32 * 16 * 4 + 16 * 16 * 4 + 3000
    state = mq.load(tmp_path / "m.safetensors").state_dict()
    assert set(state) == set(net.state_dict())
    assert same_bits(state["lm_head.weight"], net.embed.weight.detach())


def test_progress_and_reports_are_measured(net, tmp_path):
    events: list[mq.Progress] = []
    report = mq.quantize(net, scheme="int8").save(tmp_path / "m.safetensors", progress=events.append)
    assert [e.stage for e in events][-2:] == ["sync", "done"]
    assert events[-1].done_bytes == events[-1].total_bytes
    assert all(a.done_bytes <= b.done_bytes for a, b in itertools.pairwise(events) if a.stage == b.stage)
    assert report.peak_bytes >= report.start_bytes > 0
    before = net.state_dict()
    after = mq.load(tmp_path / "m.safetensors").state_dict()
    for found in report.worst(5):
        signal = before[found.name].double().square().sum()
        noise = (before[found.name].double() - after[found.name].double()).square().sum()
        assert found.sqnr_db == pytest.approx(float(10 * (signal / noise).log10()), rel=1e-4)


def test_compare_puts_the_worst_first(net, tmp_path):
    mq.quantize(net, scheme="int8", set=["proj.weight=int4:group_size=32"]).save(tmp_path / "q.safetensors")
    found = mq.compare(net, tmp_path / "q.safetensors")
    assert found[0].name == "proj.weight"
    assert found[0].sqnr_db < 30 < found[1].sqnr_db
    assert found[-1].sqnr_db == float("inf")
    smaller = {k: v for k, v in net.state_dict().items() if k != "norm.bias"}
    statuses = {c.name: c.status for c in mq.compare(net, smaller)}
    assert statuses["norm.bias"] == "only in A"


def test_float_checkpoints_are_exported_as_floats(net, tmp_path):
    mq.export(net, tmp_path / "m.safetensors", "safetensors")
    written = load_file(tmp_path / "m.safetensors")
    assert all(same_bits(written[k], v) for k, v in net.state_dict().items())


def test_an_existing_output_needs_force(net, tmp_path):
    model = mq.quantize(net, scheme="int8")
    path = tmp_path / "m.safetensors"
    model.save(path)
    first = path.read_bytes()
    with pytest.raises(OutputError, match="m.safetensors") as caught:
        mq.quantize(net, scheme="int4", options={"granularity": "channel"}).save(path)
    assert "--force" in caught.value.hint
    assert path.read_bytes() == first
    mq.quantize(net, scheme="int4", options={"granularity": "channel"}).save(path, force=True)
    assert path.read_bytes() != first


def test_names_are_refused_early_and_sizes_when_the_format_is_known(net):
    with pytest.raises(UnknownNameError, match="no scheme 'int88'"):
        mq.quantize(net, scheme="int88")
    with pytest.raises(RecipeError, match="matches none"):
        mq.quantize(net, scheme="int8", keep=["nothing.*"])
    model = mq.quantize(net, scheme="int4", options={"group_size": 100})
    with pytest.raises(PlanError, match=r"proj.weight \[64, 32\]"):
        model.plan()


WEIGHT = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def edge(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"layer.weight": WEIGHT, **tensors}


KEPT = {
    "zero size": torch.empty(0, 32),
    "no columns": torch.empty(8, 0),
    "0-dim": torch.tensor(3.5),
    "bool": torch.ones(4, 4, dtype=torch.bool),
    "int64": torch.arange(16).view(4, 4),
    "uint8": torch.arange(16, dtype=torch.uint8).view(4, 4),
    "complex64": torch.randn(4, 4, dtype=torch.complex64),
    "float8_e4m3fn": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "float8_e5m2": torch.randn(4, 4).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_cannot_be_quantized_is_kept_bit_for_bit(tmp_path, what):
    source = edge(other=KEPT[what])
    plan = mq.plan(source, scheme="int8", destination="m.safetensors")
    assert actions(plan) == {"layer.weight": "quantize", "other": "keep"}
    mq.quantize(source, scheme="int8").save(tmp_path / "m.safetensors")
    assert same_bits(mq.load(tmp_path / "m.safetensors").state_dict()["other"], KEPT[what])
    assert same_bits(load_file(tmp_path / "m.safetensors")["other"], KEPT[what])


QUANTIZED = {
    "all zero": torch.zeros(4, 32),
    "1e-41": torch.full((4, 32), 1e-41),
    "1e30": torch.full((4, 32), 1e30) * torch.linspace(-1, 1, 32),
    "1e38": torch.full((4, 32), 1e38),
    "float64": torch.randn(4, 32, dtype=torch.float64),
    "bfloat16": torch.randn(4, 32).bfloat16(),
    "float16": torch.randn(4, 32).half(),
    "non-contiguous": torch.randn(32, 4).t(),
    "strided": torch.randn(8, 64)[::2, ::2],
    "one element": torch.tensor([[2.0]]),
    "one element of many": torch.arange(8.0)[1::4][:1].view(1, 1),
}


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("what", QUANTIZED)
def test_extreme_values_quantize_to_within_half_a_step(tmp_path, what, scheme):
    value = QUANTIZED[what]
    # Said by a rule: by default a tensor with one number for each row stays as it is.
    model = mq.quantize({"w": value}, set=f"w={scheme}" + (":granularity=channel" if scheme == "int4" else ""))
    model.save(tmp_path / "m.safetensors")
    got = mq.load(tmp_path / "m.safetensors").state_dict()["w"].double()
    assert got.isfinite().all()
    assert same_bits(got, model.state_dict()["w"].double())
    levels = {"int8": 127, "int4": 7, "fp8": 16}[scheme]
    bound = value.double().abs().amax(1, keepdim=True) / levels
    assert ((got - value.double()).abs() <= bound).all()
    if what == "all zero":
        assert (got == 0).all()


@pytest.mark.parametrize(
    ("source", "scheme", "error", "words"),
    [
        ({"w": torch.tensor([[1.0, float("nan")]])}, "int8", QuantizationError, ["w[0, 1]", "nan"]),
        ({"w": torch.tensor([[1.0, 2.0], [float("inf"), 1.0]])}, "int4", QuantizationError, ["w[1, 0]", "inf"]),
        (edge(bias=torch.tensor([1.0, float("nan")])), "int8", MonoquantError, ["bias", "1", "nan"]),
        # 127 steps of the largest float32 / 127, rounded up, are infinite.
        ({"w": torch.full((2, 2), torch.finfo(torch.float32).max)}, "int8", MonoquantError, ["w[0, 0]", "--keep"]),
        ({"w": torch.tensor([[1e38, 70000.0]])}, "float16", QuantizationError, ["w", "float16"]),
        ({"w": torch.tensor([[0.0, 1e-9], [2e-9, 0.0]])}, "float16", QuantizationError, ["w[0, 1]", "zero in float16"]),
        ({"w": torch.full((4, 4), 1e-41)}, "bfloat16", QuantizationError, ["w[0, 0]", "zero in bfloat16", "--keep"]),
        (
            {"w": torch.full((4, 4), 1e-99, dtype=torch.float64)},
            "int8",
            QuantizationError,
            ["w[0, 0]", "zero in float32", "--keep"],
        ),
        ({"w": torch.ones(4, 4, device="meta")}, "int8", SourceError, ["w", "meta"]),
        ({"w": torch.eye(4).to_sparse()}, "int8", SourceError, ["w", "sparse"]),
        ({"w": "text"}, "int8", SourceError, ["w"]),
        ({}, "int8", MonoquantError, ["no tensors"]),
        ({"w": torch.ones(4, 4, dtype=torch.complex128)}, "int8", MonoquantError, ["nothing would be quantized"]),
        (edge(z=torch.ones(4, 4, dtype=torch.complex128)), "int8", MonoquantError, ["z", "complex128"]),
    ],
)
def test_refusals_name_the_tensor_and_leave_nothing(tmp_path, source, scheme, error, words):
    options = {"granularity": "channel"} if scheme == "int4" else None
    with pytest.raises(error) as caught:
        mq.quantize(source, scheme=scheme, options=options).save(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)
    assert all(word in f"{caught.value} {caught.value.hint}" for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nonfinite_kept_tensors_stay_when_allowed(tmp_path):
    mask = torch.tensor([0.0, float("-inf")])
    source = edge(mask=mask)
    mq.quantize(source, scheme="int8").save(tmp_path / "m.safetensors", nonfinite="allow")
    assert same_bits(mq.load(tmp_path / "m.safetensors").state_dict()["mask"], mask)
    bad = mq.quantize({"w": torch.full((2, 2), float("nan"))}, scheme="int8")
    with pytest.raises(QuantizationError, match="w"):
        bad.save(tmp_path / "n.safetensors", nonfinite="allow")


def test_closed_models_let_go_of_their_files(tmp_path):
    save_file({"w": WEIGHT}, tmp_path / "m.safetensors")
    with mq.load(tmp_path / "m.safetensors") as model:
        assert same_bits(model.state_dict()["w"], WEIGHT)
    with pytest.raises(SourceError, match=r"m.safetensors: tensor 'w': read after close"):
        model.state_dict()
    with mq.load({"w": WEIGHT}) as model:
        pass
    with pytest.raises(SourceError, match="state_dict: tensor 'w': read after close"):
        model.state_dict()


class Graph:
    """What the format below makes of a module: its weights, transposed."""

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.module, self.example = module, example


class GraphExporter:
    """A format that needs a graph of its own kind."""

    made = 0

    def __init__(self, options: object) -> None:
        self.inner = RawExporter()

    def read_graph(self, source: mq.Source, example: object) -> mq.Source:
        if isinstance(source.info.graph, Graph):
            return source
        if not isinstance(example, torch.Tensor):
            raise PlanError(f"{source.info.name}: cannot be traced without inputs", hint="give a batch with --data")
        type(self).made += 1
        made = StateDictSource({"w.T": source.info.graph.weight.detach().T.contiguous()})
        made.info = ModelInfo("graph of it", graph=Graph(source.info.graph, example))
        return made

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_a_format_makes_the_graph_that_it_needs_of_a_module(tmp_path, monkeypatch):
    registry = copy.copy(mq.api.installed())
    monkeypatch.setitem(sys.modules, "graph_format", types.SimpleNamespace(GraphExporter=GraphExporter))
    declared = ExporterDeclaration("graph", "one", "graph_format:GraphExporter", suffix=".g", needs="graph")
    registry.exporters = {**registry.exporters, "graph": declared}
    layer = nn.Linear(32, 16, bias=False)
    with (
        mq.quantize(layer, scheme="int8", registry=registry) as model,
        pytest.raises(PlanError, match="without inputs"),
    ):
        model.plan("graph")
    GraphExporter.made = 0
    with mq.quantize(layer, scheme="int8", registry=registry, example=torch.zeros(1, 32)) as model:
        plan = model.plan("graph")
        assert [(s.placed.output.name, s.placed.output.shape) for s in plan.steps] == [("w.T", (32, 16))]
        assert isinstance(plan.info.graph, Graph)
        model.save(tmp_path / "out", "graph")
        assert GraphExporter.made == 1
        made = read_back(plan, tmp_path / "out.g", "w.T")
        assert {name for name, _ in model.tensors()} == {"weight"}
    assert isinstance(made, QuantizedTensor)
    error = (made.dequantize() - layer.weight.detach().T).abs()
    assert (error <= made.scale * 0.5001).all()
    with pytest.raises(PlanError, match="needs the model's graph"):
        make_plan(StateDictSource({"w": torch.zeros(4, 4)}), registry=registry, scheme="int8", format="graph")


REFUSED = {
    "threads": ({"threads": 2.5}, PlanError, "threads"),
    "negative threads": ({"threads": -1}, PlanError, "threads is a number, or 0"),
    "nonfinite": ({"nonfinite": "ignore"}, PlanError, "nonfinite is one of refuse, allow"),
    "on_unsupported": ({"on_unsupported": "requantise"}, PlanError, "one of error, requantize, dequantize"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_values_that_no_parameter_allows_are_refused(net, tmp_path, what):
    given, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        mq.quantize(net, scheme="int8").save(tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["proj.weight=int99", "proj.weight=int4:group_size=x", "proj.weight=int4:bits=3"])
def test_rules_are_refused_at_once_and_named(net, rule):
    with pytest.raises(MonoquantError, match=re.escape(f"--set {rule!r}")):
        mq.quantize(net, scheme="int8", set=[rule])
    with pytest.raises(MonoquantError, match=re.escape(f"--set {rule!r}")):  # though another one comes first
        mq.quantize(net, scheme="int8", keep=["proj"], set=[rule])


def test_one_pattern_or_rule_needs_no_list(net):
    plan = mq.plan(net, scheme="int8", keep="conv", set="proj.weight=int4:group_size=16")
    assert (actions(plan)["conv.weight"], actions(plan)["up.weight"]) == ("keep", "quantize")
    assert next(d for d in plan.decisions if d.spec.name == "proj.weight").scheme == "int4 group_size=16"


def test_export_refuses_a_scheme_that_nothing_would_get(net, tmp_path):
    with pytest.raises(OptionError, match="export does not quantize"):
        mq.export(net, tmp_path / "m", scheme="int8")
    assert not list(tmp_path.iterdir())


def test_weights_and_statistics_of_other_kinds_are_refused(net):
    with pytest.raises(SourceError, match="OrderedDict: weights are a file or a folder"):
        mq.quantize(net, weights=net.state_dict())
    for stats in (5, {"proj:input": 5}):
        with pytest.raises(CalibrationError, match=f"stats: {type(stats).__name__}: no statistics"):
            mq.quantize(net, scheme="w8a8", stats=stats)


def test_no_file_has_a_nul_in_its_name(net, tmp_path):
    with pytest.raises(PlanError, match="not a name for an output"):
        mq.quantize(net, scheme="int8").save(f"{tmp_path}/a\0b")


def test_data_are_batches_and_there_are_some(tmp_path):
    layer = nn.Linear(32, 16)
    for data in (torch.ones(4, 32), {"input": torch.ones(4, 32)}, 5):
        with pytest.raises(CalibrationError, match=f"a list of batches, and this is one {type(data).__name__}"):
            mq.calibrate(layer, data)
    with pytest.raises(OptionError, match="^percentile: percentile is 50 to 100"):  # before anything is run
        mq.calibrate(layer, [torch.ones(4, 32)], calibrator="percentile", options={"percentile": 200.0})
    with pytest.raises(TypeError, match="sample"), mq.quantize(layer) as model:  # a misspelled parameter
        model.calibrate([torch.ones(4, 32)], sample=3)


@pytest.mark.parametrize("error", [SourceError("a", hint="b"), PlanError("c"), PluginError("int", "broken")])
def test_errors_of_other_processes_arrive_whole(error):
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.hint) == (type(error), str(error), error.hint)
    assert vars(found) == vars(error)

"""Plans: selection, negotiation with a format, and refusals that name everything at once.

The scheme and the format here are small and complete, so that each branch can be driven from a test.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from monoquant_core.declarations import ExporterDeclaration, SchemeDeclaration
from monoquant_core.encoding import FULL, INT4, INT8, UINT4, ActivationQuant, Encoding, per_group, per_row
from monoquant_core.errors import (
    OptionError,
    PlanError,
    RecipeError,
    UnknownNameError,
    UnsupportedEncodingError,
)
from monoquant_core.exporters import Drop, FilePlan, Holds, Output, Part, PartAt, Refuses, Repacks, Transform
from monoquant_core.hookspecs import hookimpl
from monoquant_core.kinds import annotate
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.options import option
from monoquant_core.planner import make_plan
from monoquant_core.planning import collapsed, listing
from monoquant_core.plugins import load_registry
from monoquant_core.recipe import Recipe, Rule, keep_rule, load_recipe, parse_set
from monoquant_core.schemes import Proposal, Refusal


@dataclass(frozen=True)
class Options:
    group_size: int = option(0, "0 is a whole row.", minimum=0)
    refuse: str = option("", "Refuse tensors whose name holds this.")
    activations: bool = option(False, "Quantize activations too.")


class Scheme:
    keeps_zero = idempotent = nearest = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        if self.options.refuse and self.options.refuse in spec.name:
            return Refusal("rows of 8 are not a multiple of 5", hint="sizes that fit: 8, 4")
        n = len(spec.shape)
        block = per_group(n, self.options.group_size) if self.options.group_size else per_row(n)
        activation = ActivationQuant(INT8, "token", dynamic=True) if self.options.activations else None
        return Proposal(Encoding(INT8, block, "float32"), activation)

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        return encoding.element == INT8 and encoding.zero_point is None


class Cast:
    keeps_zero = idempotent = nearest = True

    def __init__(self, options: object) -> None: ...

    def propose(self, spec: TensorSpec) -> Proposal:
        return Proposal("float16")

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        return False


@dataclass(frozen=True)
class FormatOptions:
    half_scales: bool = option(False, "Scales are float16.")
    only_rows: bool = option(False, "One scale per row.")


class Format:
    """Holds int8 per row or group; float32 and float16; nothing else."""

    def __init__(self, options: FormatOptions) -> None:
        self.options = options

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo):
        for spec in specs:
            if spec.name.endswith("position_ids"):
                yield Drop(spec.name, "computed by the runtime")
            elif spec.name.endswith(".plus_one"):
                plus = Transform(lambda ts: ts[0] + 1, "rows", "+1: the runtime expects it")
                yield Output(spec.name, spec.shape, spec.dtype, (spec.name,), transform=plus)
            else:
                yield Output(spec.name, spec.shape, spec.dtype, (spec.name,))

    def verdict(self, out, proposal):
        if proposal is None:
            return Holds(out.dtype, None) if out.dtype in ("float32", "float16") else Refuses(f"dtype {out.dtype}")
        if proposal.activation is not None:
            return Refuses("weights only", instead=Proposal(proposal.encoding))
        encoding = proposal.encoding
        if encoding.element != INT8:
            return Refuses(f"no layout for {encoding.element.name}")
        if self.options.only_rows and encoding.block[-1] != FULL:
            instead = Proposal(replace(encoding, block=per_row(len(encoding.block))))
            return Refuses("one scale per row", instead=instead)
        if self.options.half_scales and encoding.scale != "float16":
            return Repacks("q8", replace(encoding, scale="float16"), exact=False)
        return Holds("q8", encoding, notes=("only this test reads it",))

    def parts(self, out, held):
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        return [Part(f"{out.name}.q", "int8", out.shape), Part(f"{out.name}.s", "float32", (*out.shape[:-1], 1))]

    def files(self, layout):
        offset, placed = 16, []
        for p in layout.outputs:
            for part in p.parts:
                placed.append(PartAt(p.output.name, part.name, offset, part.nbytes))
                offset += part.nbytes
        yield FilePlan("", b"0" * 16, tuple(placed), b"end")

    def notes(self, layout):
        return [f"{len(layout.outputs)} outputs for {layout.destination}"]


class Plugin:
    __name__ = "testing"

    @hookimpl
    def monoquant_register_schemes(self):
        return [
            SchemeDeclaration("Eight", "rows of int8", "planning_parts:Scheme", Options, aliases=("E8",)),
            SchemeDeclaration("half", "a cast", "planning_parts:Cast"),
        ]

    @hookimpl
    def monoquant_register_exporters(self):
        return [ExporterDeclaration("raw", "raw bytes", "planning_parts:Format", FormatOptions)]


class Source:
    def __init__(self, specs: Sequence[TensorSpec], config: dict | None = None) -> None:
        self.info = ModelInfo("model dir", config)
        self._specs = annotate(specs, self.info)

    def specs(self) -> Sequence[TensorSpec]:
        return self._specs

    def read(self, name, rows, scratch=None):
        raise AssertionError("a plan reads no data")


@pytest.fixture
def registry(monkeypatch):
    # Declarations name their targets by module, and a test module's name depends on how pytest imports it.
    parts = types.SimpleNamespace(Scheme=Scheme, Cast=Cast, Format=Format)
    monkeypatch.setitem(sys.modules, "planning_parts", parts)
    loaded = load_registry((Plugin(),), found=())
    assert not loaded.problems
    return loaded


def weight(name: str, *shape: int, dtype: str = "float32", **more) -> TensorSpec:
    return TensorSpec(name, shape or (8, 8), dtype, **more)


LAYER = "model.layers.0.self_attn"
MODEL = [
    weight("model.embed_tokens.weight", 100, 8),
    *(weight(f"{LAYER}.{x}_proj.weight") for x in "qkvo"),
    weight(f"{LAYER}.o_proj.bias", 8),
    weight("model.norm.weight", 8),
    weight("model.position_ids", 1, 8, dtype="int64"),
    weight("lm_head.weight", 100, 8),
]


def decide(registry, specs=MODEL, **kwargs):
    kwargs.setdefault("scheme", "eight")
    return make_plan(Source(specs), registry=registry, **kwargs)


def actions(plan):
    return {d.spec.name: d.action for d in plan.decisions}


def test_default_recipe_keeps_what_is_small_or_sensitive(registry):
    plan = decide(registry)
    quantized = [name for name, action in actions(plan).items() if action == "quantize"]
    assert quantized == [f"{LAYER}.{x}_proj.weight" for x in "qkvo"]
    assert all(d.reason for d in plan.decisions)
    assert {d.scheme for d in plan.decisions if d.action == "quantize"} == {"Eight"}


def test_first_rule_that_matches_decides(registry):
    rules = [keep_rule("*.o_proj"), parse_set("*.o_proj=eight:group_size=4"), parse_set("lm_head=eight:group-size=2")]
    plan = decide(registry, rules=rules)
    by_name = {d.spec.name: d for d in plan.decisions}
    assert by_name[f"{LAYER}.o_proj.weight"].action == "keep"
    head = by_name["lm_head.weight"]
    assert (head.action, head.scheme, head.chosen) == ("quantize", "Eight group_size=2", "rule")
    assert head.proposal.encoding.block == (1, 2)


def test_a_plan_can_be_repeated_from_its_recipe(registry, tmp_path):
    rules = [parse_set("lm_head=e8:group_size=2"), keep_rule("*.o_proj")]
    plan = decide(registry, scheme="E8", scheme_options={"group_size": 4}, rules=rules)
    assert plan.recipe["scheme"] == "Eight"
    again = decide(registry, scheme="", recipe=load_recipe(plan.recipe))
    facts = [(d.spec.name, d.action, d.scheme, d.proposal) for d in plan.decisions]
    assert facts == [(d.spec.name, d.action, d.scheme, d.proposal) for d in again.decisions]
    assert again.recipe == plan.recipe


def test_a_rule_that_matches_nothing_names_near_names(registry):
    with pytest.raises(RecipeError, match="--keep '\\*.o_porj' matches none of the 9") as caught:
        decide(registry, rules=[keep_rule("*.o_porj")])
    assert "o_proj" in caught.value.hint
    with pytest.raises(RecipeError, match="kind conv") as caught:
        decide(registry, recipe=Recipe(rules=(Rule("eight", kind="conv"),)))
    assert "linear" in caught.value.hint
    with pytest.raises(RecipeError, match="o_proj and kind conv") as caught:  # though the names match
        decide(registry, recipe=Recipe(rules=(Rule("eight", ("*.o_proj",), kind="conv"),)))
    assert caught.value.hint == "its pattern takes kind: linear"
    with pytest.raises(RecipeError, match="o_proj and module Linear") as caught:
        decide(registry, recipe=Recipe(rules=(Rule("eight", ("*.o_proj",), module="Linear"),)))
    assert caught.value.hint.startswith("no module is known of its tensors")


def test_refusals_of_the_scheme_are_one_error_that_names_all(registry):
    with pytest.raises(PlanError) as caught:
        decide(registry, scheme_options={"refuse": "self_attn"})
    text = str(caught.value)
    assert text.startswith("model dir: the scheme refuses 4 of the tensors")
    assert all(f"{LAYER}.{x}_proj.weight [8, 8]" in text for x in "qkvo")
    assert "sizes that fit: 8, 4" in caught.value.hint
    assert "--keep" in caught.value.hint


def test_names_that_differ_in_a_number_are_one_line():
    names = ["h.0.up", "h.2.up", "h.1.up", "head", "h.5.up", "h.7.down", "x.1.h.1.up"]
    assert collapsed(names) == ["h.{0-2,5}.up", "head", "h.7.down", "x.1.h.1.up"]


def test_a_fuse_group_gets_one_scheme(registry):
    with pytest.raises(PlanError, match="self_attn.qkv: runtimes join these") as caught:
        decide(registry, rules=[keep_rule("*.q_proj.weight")])
    assert "k_proj" in str(caught.value)
    plan = decide(registry, rules=[keep_rule("re:[qkv]_proj")])
    assert actions(plan)[f"{LAYER}.o_proj.weight"] == "quantize"


def test_nothing_to_quantize_is_an_error(registry):
    with pytest.raises(PlanError, match="nothing would be quantized: 2 x") as caught:
        decide(registry, [weight("a.bias", 8), weight("b.bias", 8)])
    assert "--set" in caught.value.hint
    assert decide(registry, [weight("a.bias", 8)], quantizing=False, scheme="").count("keep") == 1


def test_unknown_scheme_and_options_are_named(registry):
    with pytest.raises(UnknownNameError, match="no scheme 'eigth'") as caught:
        decide(registry, scheme="eigth")
    assert "Eight" in caught.value.hint
    with pytest.raises(UnknownNameError, match=r"--set '\*=nope': no scheme"):
        decide(registry, rules=[parse_set("*=nope")])
    with pytest.raises(OptionError, match="Eight has no option 'groupsize'"):
        decide(registry, rules=[parse_set("*.o_proj=eight:groupsize=4")])
    with pytest.raises(OptionError, match="group_size wants int, got 'x'"):
        decide(registry, rules=[parse_set("*.o_proj=eight:group_size=x")])


def test_integers_stay_and_a_rule_that_names_one_is_refused(registry):
    assert actions(decide(registry))["model.position_ids"] == "keep"
    with pytest.raises(PlanError, match="position_ids: int64 is not a float"):
        decide(registry, rules=[parse_set("model.position_ids=eight")])


def test_tied_tensors_are_one_and_the_head_keeps_the_embedding(registry):
    specs = [
        weight("emb.weight", 10, 8, kind="linear"),
        weight("lm_head.weight", 10, 8, tied_to="emb.weight"),
        *MODEL[1:5],
    ]
    plan = decide(registry, specs)
    by_name = {d.spec.name: d for d in plan.decisions}
    assert by_name["emb.weight"].action == "keep"
    assert "tied to lm_head.weight" in by_name["emb.weight"].reason
    assert by_name["lm_head.weight"].action == "drop"
    assert sum(s.placed.output.name in ("emb.weight", "lm_head.weight") for s in plan.steps) == 1
    plan = decide(registry, specs, rules=[parse_set("lm_head=eight")])
    assert {d.spec.name: d.action for d in plan.decisions}["emb.weight"] == "quantize"
    with pytest.raises(PlanError, match="are one tensor"):
        decide(registry, specs, rules=[parse_set("lm_head=eight"), keep_rule("emb.weight")])


def test_files_are_exact_and_drops_have_reasons(registry):
    specs = [s for s in MODEL if s.name != "model.position_ids"] + [weight("x.position_ids", 1, 8)]
    plan = decide(registry, specs, format="raw", destination="out.raw")
    assert plan.format == "raw"
    parts = sum(s.nbytes for s in plan.steps)
    assert plan.bytes_after == 16 + parts + 3
    assert {d.spec.name: d.reason for d in plan.decisions}["x.position_ids"] == "computed by the runtime"
    assert plan.notes == ("only this test reads it", "8 outputs for out.raw")
    data = plan.to_dict()
    assert data["bytes_after"] == plan.bytes_after
    assert data["tensors"][1]["to"] == "int8[1x*]*float32"
    assert data["tensors"][1]["bytes_after"] == 64 + 32
    assert plan.bits_per_weight == 8 * parts / sum(s.placed.output.numel for s in plan.steps)


def test_what_the_format_cannot_hold_is_one_error(registry):
    specs = [*MODEL, weight("model.table", 4, dtype="int32")]
    with pytest.raises(UnsupportedEncodingError, match="cannot hold 1 of 10 tensors: model.table: dtype int32") as e:
        decide(registry, specs, format="raw")
    assert "--keep" not in e.value.hint  # it is kept


FLOATS = [s for s in MODEL if s.dtype == "float32"]


def test_negotiation_takes_the_formats_encoding_and_says_so(registry):
    plan = decide(registry, FLOATS, format="raw", format_options={"half_scales": True})
    step = next(s for s in plan.steps if s.action == "quantize")
    assert step.placed.held.encoding.scale == "float16"
    assert step.placed.proposal.encoding == step.placed.held.encoding
    assert any("int8[1x*]*float32 is quantized as int8[1x*]*float16" in n for n in plan.notes)
    options = {"group_size": 4}
    plan = decide(registry, FLOATS, scheme_options=options, format="raw", format_options={"only_rows": True})
    assert next(s for s in plan.steps if s.action == "quantize").placed.held.encoding.block == (1, FULL)
    plan = decide(registry, FLOATS, scheme_options={"activations": True}, format="raw")
    assert next(s for s in plan.steps if s.action == "quantize").placed.proposal.activation is None
    assert any("weights only" in n for n in plan.notes)


def test_casts_and_transforms(registry):
    plan = decide(
        registry, [*FLOATS, weight("n.plus_one")], scheme="half", format="raw", rules=[keep_rule("*plus_one")]
    )
    by_name = {s.placed.output.name: s for s in plan.steps}
    assert by_name[f"{LAYER}.q_proj.weight"].action == "cast"
    assert by_name[f"{LAYER}.q_proj.weight"].placed.output.dtype == "float16"
    assert by_name["n.plus_one"].action == "derive"
    assert by_name["n.plus_one"].reason == "+1: the runtime expects it"


FOUR = Encoding(UINT4, (1, 4), "float32", zero_point=UINT4)
EIGHT = Encoding(INT8, (1, FULL), "float32")


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"scheme": "None"}, RecipeError, "'None' is no scheme: it is a base"),
        ({"rules": [Rule("default", ("a.weight",))]}, RecipeError, "'default' is no scheme: it is a base"),
        ({"recipe": Recipe(base="nome")}, UnknownNameError, "no recipe 'nome'; .*built in: default, none"),
        ({"rules": [Rule("int8", module="Linear")]}, RecipeError, "module Linear matches none of the 1 tensors"),
    ],
)
def test_names_of_another_kind_are_told_apart(registry, choice, error, message):
    with pytest.raises(error, match=message) as caught:
        decide(registry, [weight("a.weight")], **choice)
    assert caught.value.hint


def test_finished_files_are_repacked_never_requantized(registry):
    specs = [weight("a.weight", encoding=EIGHT)]
    plan = decide(registry, specs, scheme="", format="raw", format_options={"half_scales": True}, quantizing=False)
    assert [(s.action, s.placed.held.encoding.scale) for s in plan.steps] == [("keep", "float16")]
    assert any("are rounded to" in n for n in plan.notes)
    with pytest.raises(PlanError, match="nothing would be quantized: 1 x already quantized"):
        decide(registry, specs)


def test_on_unsupported(registry):
    specs = [weight("a.weight", encoding=FOUR), weight("b.weight", encoding=EIGHT)]
    base = {"quantizing": False, "format": "raw"}
    with pytest.raises(
        UnsupportedEncodingError, match="cannot hold 1 of 2 tensors: a.weight: no layout for uint4"
    ) as e:
        decide(registry, specs, scheme="", **base)
    assert "--on-unsupported" in e.value.hint
    plan = decide(registry, specs, scheme="", on_unsupported="dequantize", **base)
    assert [(s.action, s.placed.held.layout) for s in plan.steps] == [("dequantize", "float32"), ("keep", "q8")]
    floats = [weight("c.weight"), weight("n.weight", 8), weight("c.bias", 8)]
    plan = decide(registry, [*specs, *floats], on_unsupported="requantize", recipe=Recipe(base="none"), **base)
    assert [s.action for s in plan.steps] == ["quantize", *["keep"] * 4]  # floats stay floats
    assert {d.reason for d in plan.decisions[2:]} == {"a float, and it stays one"}
    head = weight("lm_head.weight", encoding=FOUR)
    plan = decide(registry, [*specs, head], on_unsupported="requantize", **base)
    assert [s.action for s in plan.steps] == ["quantize", "keep", "dequantize"]  # the recipe keeps heads
    assert "a float here: output head" in plan.decisions[2].reason
    with pytest.raises(PlanError, match="needs the scheme"):
        decide(registry, specs, scheme="", on_unsupported="requantize", **base)


def test_an_activation_of_a_finished_file_is_left_out_only_with_a_note(registry):
    activation = ActivationQuant(INT8, "token", dynamic=True)
    specs = [weight("a.weight", encoding=EIGHT, activation=activation)]
    plan = decide(registry, specs, scheme="", format="raw", quantizing=False)
    assert plan.steps[0].placed.proposal.activation is None
    assert any("are left out" in note for note in plan.notes)


def test_a_plugin_may_change_a_decision(registry):
    class Decider:
        @hookimpl
        def monoquant_decide(self, proposed):
            if proposed.spec.name.endswith("o_proj.weight"):
                return replace(proposed, action="keep", reason="decider: this machine is slow at it")
            return None

    registry.manager.register(Decider(), name="decider")
    by_name = {d.spec.name: d for d in decide(registry).decisions}
    assert by_name[f"{LAYER}.o_proj.weight"].reason == "decider: this machine is slow at it"
    assert by_name[f"{LAYER}.q_proj.weight"].action == "quantize"


def test_int4_is_signed_without_a_zero_point():
    with pytest.raises(Exception, match="signed without one"):
        Proposal(Encoding(UINT4, (1, 4), "float32"))
    assert Proposal(Encoding(INT4, (1, 4), "float32"))


def test_long_lists_are_cut_and_say_so():
    text = listing("{count} of {odd} names", [f"t{i}" for i in range(25)])
    assert text.startswith("25 of {odd} names:\n  t0\n")
    assert text.endswith("... and 5 more")

"""What a plan says of the two conventions: verdicts, config.json, names, sizes. No tensor is read here."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from monoquant_safetensors import plugin
from monoquant_safetensors.compressed_tensors import CompressedTensorsExporter
from monoquant_safetensors.exporter import SafetensorsExporter
from monoquant_safetensors.generic import GenericExporter
from monoquant_safetensors.plugin import SafetensorsOptions
from monoquant_safetensors.recipe import REASON, LinearRecipe
from monoquant_safetensors.sizes import parse_size

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FULL,
    INT4,
    INT8,
    UINT4,
    UINT8,
    ActivationQuant,
    Encoding,
    codebook,
    integer,
)
from monoquant_core.errors import OptionError, PlanError, UnsupportedEncodingError
from monoquant_core.exporters import Drop, Holds, Output, Refuses, Repacks
from monoquant_core.kinds import annotate
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planner import make_plan
from monoquant_core.plugins import load_registry
from monoquant_core.recipe import Recipe
from monoquant_core.schemes import Proposal
from monoquant_core.testing.samples import ENCODINGS

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "eps": 1e-05}
CHANNEL = Encoding(INT8, (1, FULL), "float32")
GROUP = Encoding(INT4, (1, 32), "float32")
FP8 = Encoding(FLOAT8_E4M3FN, (1, FULL), "float32")
TOKEN = ActivationQuant(INT8, "token", dynamic=True)
TOKEN8 = ActivationQuant(FLOAT8_E4M3FN, "token", dynamic=True)
STATIC = ActivationQuant(INT8, "tensor", dynamic=False, low=-1.0, high=2.0)


def spec(name: str, *shape: int, dtype: str = "float32", **more) -> TensorSpec:
    return TensorSpec(name, shape or (64, 64), dtype, **more)


def layer(i: int, encoding: Encoding | None = CHANNEL, **more) -> list[TensorSpec]:
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return [spec(f"model.layers.{i}.{n}.weight", encoding=encoding, **more) for n in names]


EMBEDDINGS = spec("model.embed_tokens.weight", 100, 64)
HEAD = spec("lm_head.weight", 100, 64)
NORM = spec("model.norm.weight", 64)
MODEL = [EMBEDDINGS, *layer(0), *layer(1), NORM, HEAD]


class Source:
    def __init__(self, specs, info: ModelInfo) -> None:
        self.info, self._specs = info, annotate(specs, info)

    def specs(self):
        return self._specs

    def read(self, name, rows, scratch=None):
        raise AssertionError("a plan reads no data")

    def close(self):
        pass


REGISTRY = load_registry((plugin,), found=())


def plan(specs=MODEL, config=CONFIG, destination="out", quantizing=False, **options):
    return make_plan(
        Source(specs, ModelInfo("model dir", config)),
        registry=REGISTRY,
        recipe=Recipe(base="" if quantizing else "none"),
        format="safetensors",
        format_options=options,
        destination=destination,
        quantizing=quantizing,
    )


def config_of(made) -> dict:
    return json.loads(next(f for f in made.files if f.path == "config.json").prefix)


def quantization(*args, **kwargs) -> dict:
    return config_of(plan(*args, **kwargs))["quantization_config"]


def exporter(*specs: TensorSpec, config=CONFIG) -> CompressedTensorsExporter:
    info = ModelInfo("model dir", config)
    return CompressedTensorsExporter(1 << 40, annotate(specs, info), info)


def verdict(encoding, activation=None, *, shape=(64, 256), dtype="float32", name="model.layers.0.mlp.up_proj.weight"):
    made = exporter(spec(name, *shape, dtype=dtype))
    return made.verdict(Output(name, shape, dtype, (name,)), Proposal(encoding, activation))


def u(bits: int) -> Encoding:
    return Encoding(integer(bits, signed=False), (1, 32), "float32", zero_point=integer(bits, signed=False))


HELD = {
    **{f"int{bits}": (Encoding(integer(bits), (1, 32), "float32"), None, "pack-quantized") for bits in range(2, 9)},
    **{f"uint{bits}": (u(bits), None, "pack-quantized") for bits in range(2, 9)},
    "channel": (CHANNEL, None, "pack-quantized"),
    "tensor": (Encoding(INT8, (FULL, FULL), "float32"), None, "pack-quantized"),
    "w8a8": (CHANNEL, TOKEN, "int-quantized"),
    "w8a8 static": (CHANNEL, STATIC, "int-quantized"),
    "w4a8": (GROUP, TOKEN, "pack-quantized"),
    "w4afp8": (GROUP, TOKEN8, "pack-quantized"),
    "fp8": (FP8, TOKEN8, "float-quantized"),
    "fp8 weights": (FP8, None, "float-quantized"),
    "fp8 blocks": (Encoding(FLOAT8_E4M3FN, (128, 128), "float32"), None, "float-quantized"),
    "mxfp4": (Encoding(FLOAT4_E2M1FN, (1, 32), FLOAT8_E8M0FNU), None, "mxfp4-pack-quantized"),
}


@pytest.mark.parametrize("case", HELD)
def test_holds(case):
    encoding, activation, layout = HELD[case]
    answer = verdict(encoding, activation)
    assert isinstance(answer, Holds)
    assert (answer.layout, answer.encoding) == (layout, encoding)


NO = {
    "one bit": (Encoding(integer(1), (1, 32), "float32"), "integers of 2 to 8 bits"),
    "ragged groups": (Encoding(INT4, (1, 48), "float32"), "rows of 256 are not a multiple of the group size 48"),
    "columns": (Encoding(INT8, (FULL, 1), "float32"), r"no scales per block of \*x1"),
    "flattened": (Encoding(INT8, (64,), "float32"), "no scales per block of 64"),
    "integer blocks": (Encoding(INT8, (16, 32), "float32"), "its integers have no blocks"),
    "e5m2": (Encoding(FLOAT8_E5M2, (1, FULL), "float32"), "not float8_e5m2"),
    "codebook": (Encoding(codebook("layout_test", (0.0, 1.0)), (1, 64), "float32"), "not layout_test"),
    "fp8 groups": (Encoding(FLOAT8_E4M3FN, (1, 32), "float32"), "not per group"),
    "offset": (ENCODINGS["Q4_1"], "zero points and no offsets"),
    "nested": (ENCODINGS["Q6_K"], "its scales are numbers"),
    "nvfp4": (ENCODINGS["nvfp4"], "its scales are numbers"),
    "float zeros": (ENCODINGS["hqq"], "zero points are integers of the weight's 4 bits"),
    "wide zeros": (Encoding(UINT4, (1, 32), "float32", zero_point=UINT8), "integers of the weight's 4 bits"),
    "one zero": (Encoding(UINT4, (FULL, FULL), "float32", zero_point=UINT4), "per channel or group only"),
    "mx groups": (Encoding(FLOAT4_E2M1FN, (1, 64), FLOAT8_E8M0FNU), "no float4_e2m1fn with scales of float8_e8m0fnu"),
}


@pytest.mark.parametrize("case", NO)
def test_refuses_what_it_has_no_words_for(case):
    encoding, reason = NO[case]
    answer = verdict(encoding)
    assert isinstance(answer, Refuses)
    assert re.search(reason, answer.reason), answer.reason
    assert "--convention generic" in answer.hint


@pytest.mark.parametrize(
    ("encoding", "activation"),
    [
        (CHANNEL, TOKEN8),
        (FP8, TOKEN),
        (GROUP, STATIC),
        (u(4), TOKEN),
        (FP8, ActivationQuant(INT4, "token", dynamic=True)),
        (CHANNEL, ActivationQuant(INT8, "group", dynamic=True, group_size=32)),
        (CHANNEL, ActivationQuant(INT8, "tensor", dynamic=True)),
    ],
)
def test_activations_that_no_runtime_has_may_be_left_out(encoding, activation):
    answer = verdict(encoding, activation)
    assert isinstance(answer, Refuses)
    assert answer.instead == Proposal(encoding)
    assert isinstance(verdict(encoding), Holds)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.embed_tokens.weight", (100, 64), "transformers 5 fails to load quantized embeddings"),
        ("model.layers.0.mlp.gate.weight", (8, 64), "routers as floats"),
        ("features.0.weight", (16, 8, 3, 3), "conv: compressed-tensors holds Linear layers only"),
        ("model.layers.0.mlp.experts.down_proj", (4, 64, 64), "experts: compressed-tensors holds Linear layers only"),
        ("attn.in_proj_weight", (192, 64), "has another name"),
    ],
)
def test_only_linear_layers(name, shape, reason):
    answer = verdict(Encoding(INT8, (1,) * (len(shape) - 1) + (FULL,), "float32"), name=name, shape=shape)
    assert isinstance(answer, Refuses)
    assert reason in answer.reason


@pytest.mark.parametrize(
    ("dtype", "scale", "exact"),
    [
        ("bfloat16", "float32", False),
        ("float16", "float32", False),
        ("float16", "bfloat16", False),
        ("float32", "float16", True),
        ("float32", "bfloat16", True),
    ],
)
def test_scales_are_of_the_weights_dtype(dtype, scale, exact):
    encoding = dataclasses.replace(GROUP, scale=scale)
    answer = verdict(encoding, dtype=dtype)
    assert isinstance(answer, Repacks)
    assert (answer.encoding, answer.exact) == (dataclasses.replace(GROUP, scale=dtype), exact)
    assert isinstance(verdict(answer.encoding, dtype=dtype), Holds)


def test_parts_are_those_of_the_format():
    held = verdict(u(4), shape=(20, 64))
    made = exporter()
    parts = {
        p.name: (p.dtype, p.shape, p.per, p.rows) for p in made.parts(Output("x.weight", (20, 64), "float32", ()), held)
    }
    assert parts == {
        "x.weight_packed": ("int32", (20, 8), "rows", 1),
        "x.weight_scale": ("float32", (20, 2), "rows", 1),
        "x.weight_zero_point": ("int32", (3, 2), "rows", 8),  # packed along the rows
        "x.weight_shape": ("int64", (2,), "tensor", 1),
    }
    static = verdict(CHANNEL, STATIC)
    names = [p.name for p in made.parts(Output("x.weight", (64, 256), "float32", ()), static)]
    assert names == ["x.weight", "x.weight_scale", "x.input_scale"]


def test_one_scheme_is_one_group_of_linear():
    made = quantization()
    assert list(made) == [
        *("quant_method", "version", "format", "quantization_status", "global_compression_ratio"),
        *("kv_cache_scheme", "ignore", "config_groups"),
    ]
    assert made["ignore"] == ["lm_head"]
    assert made["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    }


def test_every_linear_that_stays_float_is_ignored():
    floats = [
        spec("model.layers.1.mlp.gate.weight", 8, 64),
        spec("model.layers.1.self_attn.pos_proj.weight", 64, 64),
        dataclasses.replace(spec("model.layers.1.input_embed.weight", 64, 64), kind="embedding"),  # or a Linear
        dataclasses.replace(spec("model.layers.1.ln_up.weight", 64, 64), kind="norm"),
        spec("encoder.pooler.dense.weight", 64, 64),
        spec("classifier.weight", 3, 64),
    ]
    kept = [dataclasses.replace(s, encoding=None) if s.name.endswith("0.self_attn.o_proj.weight") else s for s in MODEL]
    made = quantization([*kept, *floats])
    assert made["ignore"] == [
        r"re:.*\blayers\.0\.self_attn\.o_proj$",
        "lm_head",
        r"re:.*\blayers\.\d+\.mlp\.gate$",
        r"re:.*\blayers\.\d+\.self_attn\.pos_proj$",
        r"re:.*\blayers\.\d+\.input_embed$",
        r"re:.*\blayers\.\d+\.ln_up$",
        r"re:.*\bencoder\.pooler\.dense$",
        "classifier",
    ]


TOWERS = [
    *(dataclasses.replace(s, name=s.name.replace("model.", "vision_tower.encoder.")) for s in layer(0)),
    *(dataclasses.replace(s, name=f"language_model.{s.name}") for s in [*layer(0), *layer(1), HEAD]),
]


@pytest.mark.parametrize("kept", [r"vision_tower", r"language_model.*layers.1", r"\.0\.self_attn\.q_proj"])
def test_names_match_under_the_prefixes_that_transformers_puts(kept):
    """transformers loads ``language_model.model.layers`` of a checkpoint into ``model.language_model.layers``."""
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    specs = [dataclasses.replace(s, encoding=None) if re.search(kept, s.name) else s for s in TOWERS]
    ignore = quantization(specs)["ignore"]
    for found in specs:
        name = found.name.removesuffix(".weight")
        renamed = re.sub("^vision", "model.vision", re.sub("^language_model.model", "model.language_model", name))
        renamed = renamed.removeprefix("language_model.")  # of lm_head
        for form in (name, renamed):
            assert any(match_name(form, entry) for entry in ignore) == (found.encoding is None), form


@pytest.mark.parametrize(
    ("tie", "architecture", "ignored"),
    [
        (True, "LlamaForCausalLM", ["lm_head"]),
        (True, "BertForMaskedLM", ["lm_head", "cls.predictions.decoder", "lm_head.decoder", "predictions.decoder"]),
        (True, "BertLMHeadModel", ["lm_head", "cls.predictions.decoder", "lm_head.decoder"]),
        (True, "RobertaForCausalLM", ["lm_head", "cls.predictions.decoder", "lm_head.decoder"]),
        (True, "XLNetLMHeadModel", ["lm_head", "lm_loss"]),
        (True, "WhisperForConditionalGeneration", ["lm_head", "proj_out"]),
        (False, "LlamaForCausalLM", ["lm_head"]),
        (False, "GPTNeoXForCausalLM", ["lm_head"]),  # what transformers makes of embed_out
    ],
)
def test_heads_that_no_file_holds_are_ignored(tie, architecture, ignored):
    config = {**CONFIG, "tie_word_embeddings": tie, "architectures": [architecture]}
    assert quantization([EMBEDDINGS, *layer(0)], config)["ignore"] == ignored


def test_a_tied_head_is_dropped_and_said_to_be_tied():
    made = plan([EMBEDDINGS, *layer(0), dataclasses.replace(HEAD, tied_to=EMBEDDINGS.name)])
    assert "lm_head.weight" not in {s.placed.output.name for s in made.steps}
    config = config_of(made)
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert any("tie_word_embeddings is set" in note for note in made.notes)


def targets(specs) -> dict[str, list[str]]:
    made = quantization(specs)
    return {g["weights"]["num_bits"]: g["targets"] for g in made["config_groups"].values()}


def with_encoding(pattern: str, encoding: Encoding, specs=MODEL) -> list[TensorSpec]:
    return [dataclasses.replace(s, encoding=encoding) if re.search(pattern, s.name) else s for s in specs]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"down_proj", [r"re:.*\blayers\.\d+\.mlp\.down_proj$"]),
        (r"layers\.0\..*(gate|up)_proj", [rf"re:.*\blayers\.0\.mlp\.{n}_proj$" for n in ("gate", "up")]),
        (r"lm_head", ["lm_head"]),
    ],
)
def test_mixed_groups_name_their_modules(pattern, expected):
    """Whatever the targets are, compressed-tensors finds exactly the modules of each group by them."""
    specs = with_encoding(pattern, dataclasses.replace(GROUP, scale="float32"))
    made = targets(specs)
    assert made[4] == expected
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    for found in specs:
        if found.encoding is not None:
            bits = [b for b, names in made.items() if any(match_name(found.name[:-7], t) for t in names)]
            assert bits == [found.encoding.element.bits], found.name


def test_formats_that_differ_are_mixed_precision():
    fp8 = with_encoding("down_proj", FP8)
    assert quantization(fp8)["format"] == "mixed-precision"
    assert quantization(with_encoding("down_proj", GROUP))["format"] == "pack-quantized"


def test_packed_zero_points_beside_others_are_refused():
    with pytest.raises(UnsupportedEncodingError, match="2 modules with packed zero points beside others") as caught:
        plan(with_encoding("down_proj", u(4)))
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert any("only with CompressedTensorsConfig(dequantize=True)" in n for n in plan([*layer(0, u(4))]).notes)


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        (Encoding(INT8, (FULL, FULL), "float32"), "one scale per tensor: transformers loads them, vLLM does not"),
        (Encoding(integer(3), (1, 32), "float32"), "SGLang reads packed weights of 4 and 8 bits only"),
        (Encoding(INT4, (1, 16), "float32"), "groups of 16: vLLM's kernels take groups of 32, 64 and 128"),
        (Encoding(FLOAT4_E2M1FN, (1, 32), FLOAT8_E8M0FNU), "transformers 5.23 runs it in bfloat16 models only"),
    ],
)
def test_what_some_consumer_does_not_load_is_said(encoding, note):
    assert any(note in n for n in plan(layer(0, encoding)).notes)
    assert plan(layer(0)).notes == ()


def test_config_keeps_its_keys_and_their_order():
    before = {"z": 1, "quantization_config": {"quant_method": "compressed-tensors", "old": 1}, **CONFIG, "a": [1e-12]}
    made = config_of(plan(config=before))
    assert list(made) == list(before)
    assert {k: v for k, v in made.items() if k != "quantization_config"} == {
        k: v for k, v in before.items() if k != "quantization_config"
    }
    assert "old" not in made["quantization_config"]
    cache = {"num_bits": 8, "type": "float"}
    before["quantization_config"]["kv_cache_scheme"] = cache
    assert config_of(plan(config=before))["quantization_config"]["kv_cache_scheme"] == cache


def test_floats_alone_are_a_plain_folder():
    before = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors"}}
    floats = [dataclasses.replace(s, encoding=None) for s in MODEL]
    made = plan(floats, before)
    assert config_of(made) == CONFIG
    assert [f.path for f in made.files] == ["model.safetensors", "config.json"]
    assert made.notes == ()


def test_a_model_of_another_method_is_not_quantized_on_top():
    other = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UnsupportedEncodingError, match="already quantized \\('gptq' in config.json\\)"):
        plan(config=other)
    floats = [dataclasses.replace(s, encoding=None) for s in MODEL]
    assert config_of(plan(floats, other)) == other


def test_position_ids_are_dropped_with_a_reason():
    made = exporter().outputs([spec("embeddings.position_ids", 1, 512, dtype="int64"), NORM], ModelInfo("m"))
    assert isinstance(made[0], Drop)
    assert "computed by the model" in made[0].reason
    assert isinstance(made[1], Output)


@pytest.mark.parametrize("convention", ["auto", "generic"])
@pytest.mark.parametrize("dtype", ["complex128", "complex32"])
def test_dtypes_that_safetensors_lacks_are_refused(convention, dtype):
    with pytest.raises(UnsupportedEncodingError, match=f"wave: safetensors has no dtype {dtype}"):
        plan([*layer(0), spec("wave", 4, dtype=dtype)], convention=convention)


def test_names_that_collide_are_refused():
    message = r"^model dir: model\.layers\.0\.mlp\.up_proj\.weight_scale: .*and so would"
    with pytest.raises(UnsupportedEncodingError, match=message) as caught:
        plan([*layer(0), spec("model.layers.0.mlp.up_proj.weight_scale", 64, 1)])
    assert "--keep 'model.layers.0.mlp.up_proj.weight'" in caught.value.hint  # the other one is kept already
    with pytest.raises(UnsupportedEncodingError, match=r"'a\.scale'"):
        plan([spec("a", encoding=CHANNEL), spec("a.scale", 64, 1)], None)
    with pytest.raises(UnsupportedEncodingError, match=r"'a\.scale\.codes'"):
        plan([spec("a", 64, 256, encoding=ENCODINGS["Q6_K"]), spec("a.scale", 64, 16, encoding=CHANNEL)], None)


def test_convention_follows_the_model():
    def resolved(config, *specs, convention="auto"):
        made = SafetensorsExporter(SafetensorsOptions(convention))
        info = ModelInfo("model dir", config)
        return type(made.resolve(annotate(specs or MODEL, info), info))

    conv = spec("conv.weight", 8, 8, 3, 3)
    assert resolved(CONFIG) is CompressedTensorsExporter
    assert resolved(None) is resolved({"n": 1}) is GenericExporter
    assert resolved({**CONFIG, "model_type": "resnet"}, conv, spec("classifier.weight", 10, 8)) is GenericExporter
    assert resolved(CONFIG, convention="generic") is GenericExporter
    assert resolved(CONFIG, conv, convention="compressed-tensors") is CompressedTensorsExporter
    with pytest.raises(PlanError, match="model dir: compressed-tensors is for model folders") as caught:
        resolved(None, convention="compressed-tensors")
    assert "--convention generic" in caught.value.hint


def test_recipes_of_the_conventions():
    assert exporter().recipe == "linear"
    assert GenericExporter(1).recipe == ""
    conv = [spec("conv.weight", 8, 8, 3, 3), spec("attn.in_proj_weight", 192, 64)]
    info = ModelInfo("m", CONFIG)
    specs = annotate([*layer(0, None), *conv, EMBEDDINGS], info)
    rules = LinearRecipe().rules(info, specs)
    kept = {s.name: next((r.reason for r in rules if r.matches(s)), "") for s in specs}
    assert kept["conv.weight"] == kept["attn.in_proj_weight"] == REASON
    assert kept["model.embed_tokens.weight"] != REASON
    assert all(not kept[s.name] for s in layer(0))


def test_a_single_file_is_generic():
    with pytest.raises(PlanError, match="out.safetensors: compressed-tensors is a folder"):
        plan(destination="out.safetensors")
    made = plan(destination="out.safetensors", convention="generic", max_shard_size="1KB")
    assert [f.path for f in made.files] == [""]


def test_a_generic_folder_is_not_taken_for_the_model():
    """transformers would find none of its weights in model.safetensors, and go on with random ones."""
    made = plan(convention="generic")
    assert [f.path for f in made.files] == ["monoquant.safetensors", "config.json"]
    assert "quantization_config" not in config_of(made)
    assert made.notes == ("only monoquant reads this file; it is a stop on the way to another format",)
    floats = [dataclasses.replace(s, encoding=None) for s in MODEL]
    assert [f.path for f in plan(floats, convention="generic").files] == ["model.safetensors", "config.json"]


def test_shards_and_their_index():
    made = plan(max_shard_size="20KB")
    shards = [f for f in made.files if f.path.endswith(".safetensors")]
    assert [f.path for f in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for shard in shards:  # a tensor is never cut
        assert sum(p.nbytes for p in shard.parts) <= 20_000 or len({p.output for p in shard.parts}) == 1
    index = json.loads(next(f for f in made.files if f.path.endswith("index.json")).prefix)
    assert index["metadata"] == {"total_size": sum(p.nbytes for f in shards for p in f.parts)}
    assert index["weight_map"] == {p.part: f.path for f in shards for p in f.parts}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5MB", 1_500_000), ("900 kb", 900_000), ("77", 77), ("0.5KiB", 512)],
)
def test_sizes(text, nbytes):
    assert parse_size(text, owner="--max-shard-size") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0GB", "5 gigabytes", "1e9", "5GB/s"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OptionError, match="--max-shard-size: .* is not a size") as caught:
        plan(max_shard_size=text)
    assert "5GB" in caught.value.hint


def test_planning_imports_no_torch():
    code = """
import sys
from monoquant_safetensors import compressed_tensors, exporter, generic, plugin, recipe, source
from monoquant_core.encoding import INT8, FULL, Encoding
from monoquant_core.exporters import FileLayout, Output, Placed
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Proposal
info = ModelInfo("m", {"model_type": "llama"})
spec = TensorSpec("a.weight", (8, 8), "float32", kind="linear")
for convention in ("auto", "generic"):
    made = exporter.SafetensorsExporter(plugin.SafetensorsOptions(convention)).resolve([spec], info)
    (out,) = made.outputs([spec], info)
    held = made.verdict(out, Proposal(Encoding(INT8, (1, FULL), "float32")))
    list(made.files(FileLayout((Placed(out, None, held, tuple(made.parts(out, held))),), info)))
assert not {"torch", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


EXPERTS = [
    spec(f"model.layers.{i}.mlp.experts.{j}.{n}_proj.weight")
    for i, j in [(0, 0), (0, 1), (1, 0)]
    for n in ("up", "down")
]


@pytest.mark.parametrize("other", [None, dataclasses.replace(GROUP, scale="float32")])
def test_experts_of_several_kinds_are_said(other):
    def notes(pattern: str) -> str:
        specs = [
            dataclasses.replace(s, encoding=other if re.search(pattern, s.name) else CHANNEL)
            for s in [*EXPERTS, *layer(0)]
        ]
        return " ".join(plan(specs).notes)

    assert "experts of several kinds" in notes(r"layers\.1\..*experts")
    assert "experts of several kinds" not in notes("experts|q_proj")


def test_layers_of_models_that_transformers_renames():
    specs = [dataclasses.replace(s, name=s.name.replace("model.layers", "vit.encoder.layer")) for s in layer(0)]
    config = {**CONFIG, "model_type": "vit"}
    with pytest.raises(
        UnsupportedEncodingError, match="several schemes in a vit model, which transformers loads in no"
    ):
        plan([dataclasses.replace(specs[0], encoding=dataclasses.replace(GROUP, scale="float32")), *specs[1:]], config)
    kept = [dataclasses.replace(specs[0], encoding=None), *specs[1:]]
    assert any("renames its layers" in note for note in plan(kept, config).notes)
    assert not any(
        "renames its layers" in note for note in plan([*specs, spec("classifier.weight", 3, 64)], config).notes
    )


def test_stacked_experts_of_llama4_are_said():
    said = [plan(config={**CONFIG, "model_type": name}).notes for name in ("llama4_text", "llama")]
    assert ["goes on with random ones" in " ".join(notes) for notes in said] == [True, False]


def test_code_that_is_not_copied_is_said():
    config = {**CONFIG, "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    assert any("put the .py files beside it" in note for note in plan(config=config).notes)

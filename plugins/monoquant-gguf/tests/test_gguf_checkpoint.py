"""GGUF files as folders that transformers loads: names, order of rows, codes, config.json."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_gguf import architectures
from monoquant_gguf.architectures.base import Model
from monoquant_gguf.architectures.keys import Keys, shortest
from monoquant_gguf.architectures.llama import llama3_factors, llama3_scaling
from monoquant_gguf.tokenizers.restore import Stored, Unrestorable, restore

import monoquant_core as mq
from monoquant_core.errors import MonoquantError, PlanError, RecipeError, SourceError, UnsupportedEncodingError
from monoquant_core.model import ModelInfo
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

NONE = {"tokenizer": "none"}


def _architectures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("test_gguf_architectures.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = _architectures()
CASES = {**MODELS.CASES, "bert": ("Bert", {})}


def load(folder: Path, *, missing: tuple[str, ...] = ()) -> Any:
    """The model as transformers loads it, in float32: no key is missing or left over."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model, found = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert sorted(found["missing_keys"]) == sorted(missing)
    assert not [key for key, value in found.items() if value and key != "missing_keys"]
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(ids)[0]
    return result


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_comes_back(case: str, tmp_path: Path) -> None:
    """Floats through GGUF and back: the same outputs to the last bit, from names and a config made again."""
    kind, extra = CASES[case]
    model = MODELS.build(kind, extra, tmp_path / "model")
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"outtype": "f32", **NONE})
    report = mq.export(tmp_path / "m.gguf", tmp_path / "back")
    back = load(tmp_path / "back", missing=("pooler.dense.weight", "pooler.dense.bias") if kind == "Bert" else ())
    expected, found = outputs(model), outputs(back)
    if "gemma" in case:  # one is added to norms and taken off again
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert any("config.json is made of the file's metadata" in note for note in report.notes)
    assert any("no tokenizer is written" in note for note in report.notes)


@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("int8", 32)])
def test_codes_go_from_compressed_tensors_to_gguf_and_back(
    scheme: str, group: int, small_llama: Path, tmp_path: Path
) -> None:
    options = {"granularity": "group", "group_size": group} if scheme == "int8" else {"group_size": group}
    half = {"convention": "auto"}
    mq.quantize(small_llama, scheme=scheme, options=options).save(tmp_path / "first", format_options=half)
    mq.export(tmp_path / "first", tmp_path / "m.gguf", "gguf", format_options={"outtype": "f32"})
    report = mq.export(tmp_path / "m.gguf", tmp_path / "back")
    assert report.sqnr_db == float("inf")  # float16 scales stay what they are
    first, back = (open_source(tmp_path / name, mq.load_registry()) for name in ("first", "back"))
    names = {spec.name for spec in first.specs()}
    assert {spec.name for spec in back.specs()} == names
    quantized = 0
    for spec in back.specs():
        a, b = (source.read(spec.name, range(int(np.prod(spec.shape[:-1])))) for source in (first, back))
        if isinstance(a, QuantizedTensor):
            assert isinstance(b, QuantizedTensor)
            assert torch.equal(a.codes, b.codes), spec.name
            quantized += 1
            assert torch.equal(b.scale, a.scale.half())  # type: ignore[union-attr]
        else:
            assert torch.equal(a, b), spec.name  # type: ignore[arg-type]
    assert quantized == 42
    # transformers computes with what GGUF holds: the model whose scales were rounded to float16.
    rounded = transformers.AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32).eval()
    state = {}
    for spec in back.specs():
        value = back.read(spec.name, range(int(np.prod(spec.shape[:-1]))))
        state[spec.name] = value.dequantize() if isinstance(value, QuantizedTensor) else value.float()
    rounded.load_state_dict(state)
    assert torch.allclose(outputs(load(tmp_path / "back")), outputs(rounded), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    before = transformers.AutoTokenizer.from_pretrained(small_llama)
    assert tokenizer("def f(x): return x")["input_ids"] == before("def f(x): return x")["input_ids"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((small_llama / "config.json").read_text())
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    for key in (*same, "bos_token_id", "eos_token_id", "max_position_embeddings", "tie_word_embeddings", "model_type"):
        assert config[key] == original[key], key


def test_llama_cpp_and_transformers_agree_on_a_file_and_its_folder(
    small_llama: Path, tmp_path: Path, llamacpp: ModuleType
) -> None:
    """A whole Q8_0 file, embeddings and head quantized: these are floats in the folder, by request."""
    mq.quantize(small_llama, scheme="Q8_0").save(tmp_path / "m.gguf", format="gguf")
    with pytest.raises(UnsupportedEncodingError, match=r"model.embed_tokens.weight: .* quantized embeddings") as caught:
        mq.export(tmp_path / "m.gguf", tmp_path / "back")
    assert "--on-unsupported dequantize" in caught.value.hint
    assert not (tmp_path / "back").exists()
    mq.export(tmp_path / "m.gguf", tmp_path / "back", on_unsupported="dequantize")
    ids = list(range(5, 45))
    with torch.no_grad():
        expected = load(tmp_path / "back")(torch.tensor([ids])).logits[0].numpy()
    found = llamacpp.logits(str(tmp_path / "m.gguf"), ids, flash=0, kv_f32=True)
    # llama.cpp rounds the inputs of Q8_0 layers to 8 bits.
    assert np.linalg.norm(found - expected) <= 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Q4_1", "zero points and no offsets"), ("Q4_K", "zero points and no offsets"), ("Q6_K", "quantized themselves")],
)
def test_types_that_compressed_tensors_does_not_hold_are_refused_by_name(
    name: str, reason: str, small_llama: Path, tmp_path: Path
) -> None:
    rules = (f"*.up_proj.weight={name}", "*.down_proj.weight=Q8_0")
    mq.quantize(small_llama, set=rules).save(tmp_path / "m.gguf", format="gguf")
    with pytest.raises(UnsupportedEncodingError, match=r"cannot hold 6 of 57 tensors") as caught:
        mq.export(tmp_path / "m.gguf", tmp_path / "back")
    assert "model.layers.{0-5}.mlp.up_proj.weight: compressed-tensors does not hold" in str(caught.value)
    assert reason in str(caught.value)
    assert not (tmp_path / "back").exists()
    mq.export(tmp_path / "m.gguf", tmp_path / "back", on_unsupported="dequantize")
    layouts = {s.name: s.encoding for s in open_source(tmp_path / "back", mq.load_registry()).specs()}
    assert layouts["model.layers.0.mlp.up_proj.weight"] is None
    assert str(layouts["model.layers.0.mlp.down_proj.weight"]) == "int8[1x32]*float16"
    # The generic convention keeps everything, under llama.cpp's names.
    mq.export(tmp_path / "m.gguf", tmp_path / "all", format_options={"convention": "generic"})
    kept = {s.name: s.encoding for s in open_source(tmp_path / "all", mq.load_registry()).specs()}
    assert kept == {s.name: s.encoding for s in open_source(tmp_path / "m.gguf", mq.load_registry()).specs()}


def test_the_command_line(small_llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    mq.quantize(small_llama, set=("*.up_proj.weight=Q4_1",)).save(tmp_path / "m.gguf", format="gguf")
    command = ("export", tmp_path / "m.gguf", "-o", tmp_path / "back", "--format", "safetensors")
    refused = run(*command)
    assert refused.returncode == 2
    assert "model.layers.{0-5}.mlp.up_proj.weight: compressed-tensors does not hold" in refused.stderr
    assert "--on-unsupported dequantize" in refused.stderr
    done = run(*command, "--on-unsupported", "dequantize")
    assert done.returncode == 0, done.stderr
    assert "config.json is made of the file's metadata" in done.stdout


def test_floats_of_a_gguf_file_are_quantized_under_the_names_of_the_checkpoint(
    small_llama: Path, tmp_path: Path
) -> None:
    mq.export(small_llama, tmp_path / "m.gguf", "gguf", format_options={"outtype": "f32"})
    keep = [f"*.{x}_proj.weight" for x in "qkv"]
    mq.quantize(tmp_path / "m.gguf", scheme="int4", keep=keep).save(tmp_path / "a")
    mq.quantize(small_llama, scheme="int4", keep=keep).save(tmp_path / "b")
    a, b = (open_source(tmp_path / name, mq.load_registry()) for name in "ab")
    assert {s.name: s.encoding for s in a.specs()} == {s.name: s.encoding for s in b.specs()}
    for spec in a.specs():
        x, y = (source.read(spec.name, range(int(np.prod(spec.shape[:-1])))) for source in (a, b))
        same = x.equal(y) if isinstance(x, QuantizedTensor) else torch.equal(x, y)  # type: ignore[arg-type]
        assert same, spec.name
    with pytest.raises(RecipeError, match="matches none"):
        mq.quantize(tmp_path / "m.gguf", scheme="int4", keep=["*.nothing"])


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_are_taken_out_of_their_stack_with_their_codes(kind: str, tmp_path: Path) -> None:
    extra = dict(CASES[kind.lower()][1])
    MODELS.build(kind, extra, tmp_path / "model")
    mq.quantize(tmp_path / "model", scheme="Q5_0").save(
        tmp_path / "m.gguf", format="gguf", format_options={"outtype": "f32", **NONE}
    )
    mq.export(tmp_path / "m.gguf", tmp_path / "back")
    stacked, apart = (open_source(tmp_path / name, mq.load_registry()) for name in ("m.gguf", "back"))
    stack = stacked.read("blk.1.ffn_down_exps.weight", range(4 * 64))
    name = "block_sparse_moe.experts.{}.w2" if kind == "Mixtral" else "mlp.experts.{}.down_proj"
    for i in range(4):
        expert = apart.read(f"model.layers.1.{name.format(i)}.weight", range(64))
        assert isinstance(stack, QuantizedTensor)
        assert isinstance(expert, QuantizedTensor)
        assert torch.equal(expert.codes, stack.codes[i])
        assert torch.equal(expert.dequantize(), stack.dequantize()[i])


def test_a_quantized_layer_of_gpt2_is_transposed_back(tmp_path: Path) -> None:
    """It is no Linear of transformers: the generic convention of its folder keeps the codes, compressed-tensors not."""
    MODELS.build(*CASES["gpt2"], tmp_path / "model")
    mq.quantize(tmp_path / "model", scheme="Q5_1").save(
        tmp_path / "m.gguf", format="gguf", format_options={"outtype": "f32", **NONE}
    )
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).T
    mq.export(tmp_path / "m.gguf", tmp_path / "back")
    source = open_source(tmp_path / "back", mq.load_registry())
    for rows in (range(64), range(32, 64)):
        found = source.read("transformer.h.1.mlp.c_fc.weight", rows)
        assert isinstance(found, QuantizedTensor)
        np.testing.assert_array_equal(found.dequantize().numpy(), expected[rows.start : rows.stop])
    choice = {"convention": "compressed-tensors"}
    with pytest.raises(UnsupportedEncodingError, match="Linear layers only"):
        mq.export(tmp_path / "m.gguf", tmp_path / "ct", format_options=choice)
    mq.export(tmp_path / "m.gguf", tmp_path / "ct", format_options=choice, on_unsupported="dequantize")
    with mq.load(tmp_path / "ct") as model:
        floats = model.state_dict()["transformer.h.1.mlp.c_fc.weight"].numpy()
    np.testing.assert_array_equal(floats, expected.astype(np.float16))


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@pytest.mark.parametrize(
    ("factor", "high", "context", "base", "width"),
    [
        (8.0, 4.0, 8192, 500000.0, 128),  # Llama 3.1
        (32.0, 4.0, 8192, 500000.0, 64),  # Llama 3.2
        (8.0, 3.0, 4096, 10000.0, 128),
        (8.0, 4.0, 32, 10000.0, 16),  # one frequency between the bounds
        (4.0, 4.0, 1024, 10000.0, 4),  # none
    ],
)
def test_rope_scaling_is_found_from_its_factors(
    factor: float, high: float, context: int, base: float, width: int
) -> None:
    config = {"head_dim": width, "rope_theta": base}
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
    scaling = {"rope_type": "llama3", **numbers, "original_max_position_embeddings": context}
    factors = llama3_factors(Model(ModelInfo("m", config={**config, "rope_scaling": scaling}), {}))
    found = llama3_scaling(Keys("m", "llama", {}, {}, lambda _: [f32(f) for f in factors]), config)
    again = llama3_factors(Model(ModelInfo("m", config={**config, "rope_scaling": found}), {}))
    assert again == pytest.approx(factors, rel=1e-6)
    if width > 16:
        assert found == scaling
    with pytest.raises(SourceError, match="no llama3 scaling"):
        llama3_scaling(Keys("m", "llama", {}, {}, lambda _: [1.0, 5.0, 2.0] * width), config)


def test_numbers_are_as_short_as_they_were() -> None:
    for value in (1e-5, 1e-6, 1e-12, 10000.0, 500000.0, 0.1, 1.1902380714238083):
        assert f32(shortest(f32(value))) == f32(value)
    assert [shortest(f32(v)) for v in (1e-5, 1e-12, 0.1)] == [1e-5, 1e-12, 0.1]


def write(path: Path, change: Callable[[Any], None], tensors: tuple[str, ...] = ("token_embd", "output_norm")) -> Path:
    """A small file of llama.cpp's llama."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    change(writer)
    for name in (*tensors, "blk.0.ffn_up"):
        writer.add_tensor(f"{name}.weight", np.ones((32,) if "norm" in name else (32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda w: w.add_head_count_kv([1, 2]), ("token_embd",), "llama.attention.head_count_kv is"),
        (lambda w: w.add_rope_dimension_count(8), ("token_embd",), "llama.rope.dimension_count 8"),
        (lambda w: w.add_string("llama.rope.scaling.type", "dynamic"), ("token_embd",), "rope scaling 'dynamic'"),
        (lambda w: w.add_key_length(8), ("token_embd", "blk.0.mystery"), "tensor 'blk.0.mystery.weight': no place"),
        (lambda w: None, (), "no token_embd.weight"),
        (lambda w: None, ("token_embd", "blk.1.ffn_up"), "1 blocks expected, the tensors are those of 2"),
        (lambda w: None, ("token_embd", "rope_freqs"), "tensor 'rope_freqs.weight': a vector of float32 expected"),
    ],
)
def test_what_a_checkpoint_cannot_say_is_refused_in_one_line(
    change: Callable[[Any], None], tensors: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.gguf", change, tensors)
    with pytest.raises(SourceError, match=message) as caught:
        mq.export(path, tmp_path / "back")
    assert str(path) in str(caught.value)
    assert "--convention generic" in caught.value.hint
    assert not (tmp_path / "back").exists()
    mq.export(path, tmp_path / "back.safetensors", format_options={"convention": "generic"})


def test_pairs_that_nobody_asked_for_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", lambda w: w.add_float32("llama.logit_scale", 2.0))
    notes = mq.export(path, tmp_path / "back").notes
    assert any("config.json does not say 'llama.logit_scale'" in note for note in notes)


def test_a_file_of_another_architecture_keeps_its_names(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("blk.0.ssm_in.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mq.export(tmp_path / "x.gguf", tmp_path / "back")
    assert [s.name for s in open_source(tmp_path / "back", mq.load_registry()).specs()] == ["blk.0.ssm_in.weight"]
    with pytest.raises(PlanError, match="compressed-tensors is for model folders"):
        mq.export(tmp_path / "x.gguf", tmp_path / "b", format_options={"convention": "compressed-tensors"})


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("t5", {}, "a tokenizer of llama.cpp's kind 't5'"),
        ("gpt2", {"tokenizer.ggml.pre": "newest"}, "a pre-tokenizer of llama.cpp's name 'newest'"),
    ],
)
def test_tokenizers_that_are_not_made_again_are_said(
    model: str, more: dict[str, str], said: str, tmp_path: Path
) -> None:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model(model)
        writer.add_token_list(["a", "b"])
        for key, value in more.items():
            writer.add_string(key, value)

    report = mq.export(write(tmp_path / "x.gguf", change), tmp_path / "back")
    assert any(said in note for note in report.notes)
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_a_tokenizer_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["a", "b"])
        writer.add_token_types([1])

    with pytest.raises(MonoquantError, match="2 tokens, 1 kinds"):
        mq.export(write(tmp_path / "x.gguf", change), tmp_path / "back")


JUNK = st.sampled_from(
    [0, -1, 1, 2, 1.5, "x", [], [1, 2], True, 1 << 40, math.inf, math.nan, 1e300, 1e-300, "linear", 8]
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_metadata_is_data(data: st.DataObject) -> None:
    """Whatever it says, there is a config.json or an error that says what is wrong."""
    kind = data.draw(st.sampled_from(list(architectures.BUILT_IN)))
    names = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
    names += ["attention.sliding_window", "expert_count", "expert_used_count", "expert_feed_forward_length"]
    more = ["attention.key_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "vocab_size"]
    more += ["rope.scaling.factor", "attention.layer_norm_epsilon", "rope.scaling.original_context_length"]
    metadata: dict[str, Any] = {f"{kind.name}.{name}": 4 for name in names}
    for name in data.draw(st.lists(st.sampled_from([*names, *more]), max_size=4)):
        metadata[f"{kind.name}.{name}"] = data.draw(JUNK)
    vectors = st.lists(st.sampled_from([0.0, 1.0, 2.5, 8.0, -1.0, math.inf, math.nan]), max_size=8)
    shapes = dict.fromkeys(
        data.draw(st.lists(st.sampled_from(["rope_freqs.weight", "rope_factors_long.weight"]))), (4,)
    )
    keys = Keys("m", kind.name, metadata, shapes, lambda _: data.draw(vectors))
    with contextlib.suppress(MonoquantError):
        assert json.dumps(kind().config(keys), allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tokens_are_data(data: st.DataObject) -> None:
    texts = st.sampled_from(["a", "b", "ab", "\u2581a", "<s>", "", "a b", "\udc80", "<0x00>", "ab c"])
    count = data.draw(st.integers(0, 5))
    metadata: dict[str, Any] = {"tokenizer.ggml.model": data.draw(st.sampled_from(["gpt2", "llama", "bert", "t5", 3]))}
    arrays: dict[str, list[Any]] = {
        "tokens": data.draw(st.lists(texts, min_size=count, max_size=count)),
        "token_type": data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count)),
        "scores": data.draw(st.lists(st.floats(width=32), min_size=count, max_size=count)),
        "merges": data.draw(st.lists(texts, max_size=3)),
    }
    for key in data.draw(st.lists(st.sampled_from(list(arrays)), max_size=2)):
        arrays[key] = data.draw(st.lists(JUNK, max_size=count))
    for key in ("bos_token_id", "seperator_token_id", "add_bos_token", "pre", "normalizer.lowercase"):
        metadata[f"tokenizer.ggml.{key}"] = data.draw(JUNK | st.sampled_from(["gpt-2", "llama-bpe"]))
    with contextlib.suppress(MonoquantError, Unrestorable):
        files = restore(Stored("m", metadata, lambda key: arrays.get(key.rpartition(".")[2], [])))
        assert all(json.loads(content) for content in files.values())

"""Files of ``--format gguf``, read by llama.cpp and by the gguf package; what is repacked, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from monoquant_gguf.container import MAX_NAME
from monoquant_gguf.exporter import GgufExporter
from monoquant_gguf.layouts import QUANTIZED
from monoquant_gguf.plugin import GgufOptions
from monoquant_gguf.source import GgufSource

import monoquant_core as mq
from monoquant_core.encoding import FLOAT8_E4M3FN, INT4, INT8, UINT4, UINT8, ActivationQuant, Encoding, codebook
from monoquant_core.errors import MonoquantError, PlanError, UnsupportedEncodingError
from monoquant_core.exporters import Holds, Output, Refuses, Repacks
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Proposal
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor

gguf = pytest.importorskip("gguf")

GENERIC = {"architecture": "generic"}
OUT = Output("w", (4, 256), "float32", ("w",))


def load(path: Path) -> GgufSource:
    """A finished file."""
    source = open_source(path, mq.load_registry())
    assert isinstance(source, GgufSource)
    return source


def values(path: Path, name: str) -> np.ndarray[Any, Any]:
    """A tensor's values as the gguf package decodes them."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """The ids with the likeliest next ones of transformers, whatever they are."""
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("which", ["small_llama", "tiny_llama"])
def test_llama_cpp_gives_the_logits_and_the_text_of_transformers(
    which: str, tmp_path: Path, llamacpp: ModuleType, corpus: str, request: pytest.FixtureRequest
) -> None:
    transformers = pytest.importorskip("transformers")
    folder: Path = request.getfixturevalue(which)
    file = tmp_path / "m.gguf"
    mq.export(folder, file, "gguf", format_options={"outtype": "f32"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(corpus[:2000])["input_ids"][:120]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with llamacpp.Model(str(file), flash=0, kv_f32=True) as loaded:
        assert loaded.tokenize(corpus[:2000])[:120] == ids
        assert np.abs(loaded.logits(ids) - expected).max() <= 1e-5 * np.abs(expected).max()
        for prompt in (ids[:40], ids[:3], ids[60:70]):
            assert loaded.generate(prompt, 24) == generated(model, prompt, 24)


def perplexity(model: Any, ids: list[int], window: int) -> float:
    """Of transformers, as llama-perplexity defines it."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([[1]]), part[:, 1:]], 1)).logits
        scored = slice(window // 2, window - 1)
        wanted = part[0, window // 2 + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits[0, scored].double(), wanted, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def test_perplexity_of_types_and_mixtures_beside_transformers(
    tiny_llama: Path, tmp_path: Path, llamacpp: ModuleType, shared: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer((shared / "data" / "code_eval.txt").read_text()[:30_000])["input_ids"][: 20 * 256]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    exact = perplexity(model, ids, 256)
    mq.export(tiny_llama, tmp_path / "F32.gguf", "gguf", format_options={"outtype": "f32"})
    assert llamacpp.perplexity(str(tmp_path / "F32.gguf"), ids, 256) == pytest.approx(exact, rel=1e-3)
    for scheme, worse in (("Q8_0", 1.001), ("Q4_K_M", 1.01), ("Q4_0", 1.02)):
        mq.quantize(tiny_llama, scheme=scheme).save(tmp_path / f"{scheme}.gguf", format="gguf")
        found = llamacpp.perplexity(str(tmp_path / f"{scheme}.gguf"), ids, 256)
        print(f"{scheme}: {found:.3f} beside {exact:.3f}")
        assert exact / 1.02 < found < exact * worse, scheme


def sentences() -> list[str]:
    """Two hundred: prose, code, other alphabets, and what is hardly a sentence."""
    made = [
        "Größe café",
        "日本語",
        "🎉",
        "x",
        "a  b\nc",
        "Ελλάδα",
        "Привет, мир",
        "def f(x): return x**2",
        "3.14",
        "No.",
    ]
    lines = [line.strip() for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    return made + random.Random(0).sample(sorted({line for line in lines if len(line) > 20}), 190)


@pytest.fixture(scope="module")
def embedded(minilm: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The sentences and what transformers makes of them: the mean over the tokens, normalized."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    texts, found = sentences(), []
    for start in range(0, len(texts), 50):
        batch = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        with torch.no_grad():
            found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return texts, torch.nn.functional.normalize(torch.cat(found), dim=1).numpy()


@pytest.mark.parametrize(
    ("options", "worst", "mean"),
    [
        ({"outtype": "f32"}, 0.99999, 0.99999),
        ({"outtype": "f16"}, 0.99999, 0.99999),
        ("int8", 0.99, 0.9995),
        ("Q8_0", 0.99, 0.9995),
    ],
)
def test_llama_cpp_embeds_as_transformers(
    options: Any,
    worst: float,
    mean: float,
    embedded: tuple[list[str], np.ndarray[Any, Any]],
    minilm: Path,
    tmp_path: Path,
    llamacpp: ModuleType,
) -> None:
    texts, expected = embedded
    assert len(texts) == 200
    file = tmp_path / "m.gguf"
    if isinstance(options, str):
        mq.quantize(minilm, scheme=options).save(file, format="gguf")
    else:
        mq.export(minilm, file, "gguf", format_options=options)
    cosines = (expected * llamacpp.embed(str(file), texts)).sum(1)
    print(f"{options}: mean {cosines.mean():.6f}, worst {cosines.min():.6f}")
    assert cosines.min() >= worst
    assert cosines.mean() >= mean


def test_metadata_are_those_of_the_converter(small_llama: Path, minilm: Path, tmp_path: Path) -> None:
    mq.export(small_llama, tmp_path / "a.gguf", "gguf")
    mq.export(minilm, tmp_path / "b.gguf", "gguf")
    llama, bert = (load(tmp_path / name).header.metadata for name in ("a.gguf", "b.gguf"))
    config = json.loads((small_llama / "config.json").read_text())
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: llama[key] for key in wanted} == wanted
    assert llama["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    wanted = {
        "general.architecture": "bert",
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "bert.context_length": 512,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.seperator_token_id": 102,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {key: bert[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("outtype", "dtype"), [("auto", "float16"), ("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32")]
)
def test_types_of_floats_follow_the_converter(outtype: str, dtype: str, minilm: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    report = mq.export(minilm, file, "gguf", format_options={"outtype": outtype})
    found = {spec.name: spec.dtype for spec in load(file).specs()}
    kept = {"position_embd.weight", "token_types.weight"}
    for name, stored in found.items():
        always = name in kept or name.endswith((".bias", "_norm.weight"))
        assert stored == ("float32" if always else dtype), name
    assert sum(stored == dtype for stored in found.values()) >= 37
    assert any("limit of 256 tokens" in note for note in report.notes)
    assert any("sentence-transformers' Normalize" in note for note in report.notes)


def test_a_bfloat16_checkpoint_stays_bfloat16(pretrained: Callable[..., Path], tmp_path: Path) -> None:
    pretrained(tmp_path / "model", "LlamaForCausalLM", dtype=torch.bfloat16)
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})
    specs = load(tmp_path / "m.gguf").specs()
    assert {s.dtype for s in specs if len(s.shape) > 1} == {"bfloat16"}
    assert {s.dtype for s in specs if len(s.shape) == 1} == {"float32"}


def test_the_same_bytes_every_time(small_llama: Path, tmp_path: Path) -> None:
    digests = set()
    for i, threads in enumerate((1, 2)):
        file = tmp_path / f"{i}" / "m.gguf"
        file.parent.mkdir()
        mq.export(small_llama, file, "gguf", threads=threads)
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
        reader = gguf.GGUFReader(file)
        assert all(t.data_offset % 32 == 0 for t in reader.tensors)
        assert file.stat().st_size % 32 == 0
    assert len(digests) == 1


def test_generic_keeps_every_name_and_value(tmp_path: Path) -> None:
    state = {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(3).double(),
        "index": torch.arange(4),
        "small": torch.arange(4, dtype=torch.int8),
        "scalar": torch.tensor(2.5),
    }
    report = mq.export(state, tmp_path / "m.gguf", "gguf", format_options=GENERIC)
    assert any("llama.cpp does not load" in note for note in report.notes)
    source = load(tmp_path / "m.gguf")
    assert {s.name: s.shape for s in source.specs()} == {k: tuple(v.shape) for k, v in state.items()}
    for spec in source.specs():
        rows = range(int(np.prod(spec.shape[:-1])))
        assert torch.equal(source.read(spec.name, rows), state[spec.name])  # type: ignore[arg-type]
    assert np.array_equal(values(tmp_path / "m.gguf", "half"), state["half"].float().numpy())


def test_generation_settings_that_are_lost_are_said(small_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(small_llama, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    with mq.quantize(tmp_path / "model", scheme="Q8_0") as model:
        notes = model.plan("gguf").notes
    assert any("does not hold generation_config.json" in note for note in notes)


def test_what_gguf_has_no_room_for_is_refused(tmp_path: Path) -> None:
    for state, message in (
        ({"a": torch.zeros(1, 1, 1, 1, 2)}, "at most 4 dimensions"),
        ({"n" * (MAX_NAME + 1): torch.zeros(2)}, f"at most {MAX_NAME} bytes"),
        ({"a": torch.zeros(2, dtype=torch.bool)}, "no type for bool"),
    ):
        with pytest.raises(UnsupportedEncodingError, match=message):
            mq.export(state, tmp_path / "m.gguf", "gguf", format_options=GENERIC)
        assert list(tmp_path.iterdir()) == []


def test_a_state_dict_has_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no model_type") as caught:
        mq.export({"a": torch.zeros(2)}, tmp_path / "m.gguf", "gguf")
    assert "--architecture generic" in caught.value.hint


def group(element: Any, size: int, *, zero: bool = False, scale: str = "float32") -> Encoding:
    """Groups of a size along the last axis."""
    return Encoding(element, (1, size), scale, zero_point=element if zero else None)


VERDICTS: dict[str, tuple[Encoding, str, bool | None]] = {
    **{layout.name: (layout.encoding_for(2), layout.name, None) for layout in QUANTIZED if layout.name != "TQ2_0"},
    "int4 g32": (group(INT4, 32), "Q4_0", False),
    "int4 g64": (group(INT4, 64), "Q4_0", False),
    "int4 g128 of float16": (group(INT4, 128, scale="float16"), "Q4_0", True),
    "int8 per channel": (Encoding(INT8, (1, -1), "float32"), "Q8_0", False),
    "int8 per tensor": (Encoding(INT8, (-1, -1), "float16"), "Q8_0", True),
    "uint4 g32 with zero points": (group(UINT4, 32, zero=True), "Q4_1", False),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    encoding, layout, exact = VERDICTS[case]
    verdict = GgufExporter(GgufOptions()).verdict(OUT, Proposal(encoding))
    if exact is None:
        assert verdict == Holds(layout, encoding)
    else:
        assert isinstance(verdict, Repacks)
        assert (verdict.layout, verdict.exact) == (layout, exact)


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        (group(INT4, 16), "Q4_0: blocks of"),
        (group(UINT8, 32, zero=True), "no ggml type has codes of uint8"),
        (Encoding(FLOAT8_E4M3FN, (1, -1), "float32"), "no ggml type has codes of float8_e4m3fn"),
        (Encoding(codebook("mine", (0.0, 1.0)), (1, 32), "float16"), "no ggml type has codes of mine"),
    ],
)
def test_what_no_type_holds_is_refused(encoding: Encoding, reason: str) -> None:
    verdict = GgufExporter(GgufOptions()).verdict(OUT, Proposal(encoding))
    assert isinstance(verdict, Refuses)
    assert reason in verdict.reason


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    layout = next(x for x in QUANTIZED if x.name == "Q4_K")
    verdict = GgufExporter(GgufOptions()).verdict(
        Output("w", (4, 384), "float32", ("w",)), Proposal(layout.encoding_for(2))
    )
    assert isinstance(verdict, Refuses)
    assert "rows of 384 are not whole blocks of 256 (Q4_K)" in verdict.reason


def test_activations_are_left_out_and_that_is_offered() -> None:
    layout = next(x for x in QUANTIZED if x.name == "Q8_0")
    asked = Proposal(layout.encoding_for(2), ActivationQuant(INT8, "token", dynamic=True))
    verdict = GgufExporter(GgufOptions()).verdict(OUT, asked)
    assert isinstance(verdict, Refuses)
    assert verdict.instead == Proposal(layout.encoding_for(2))


REPACKED = {
    "int4-g32": ({"scheme": "int4", "options": {"group_size": 32}}, "Q4_0"),
    "int4-g64": ({"scheme": "int4", "options": {"group_size": 64}}, "Q4_0"),
    "int4-g128": ({"scheme": "int4", "options": {"group_size": 128}}, "Q4_0"),
    "int8": ({"scheme": "int8"}, "Q8_0"),
    "int4-asymmetric": ({"scheme": "int4", "options": {"group_size": 32, "symmetric": False}}, "Q4_1"),
}


@pytest.mark.parametrize("case", REPACKED)
def test_a_finished_folder_is_repacked_with_its_codes(
    case: str, small_llama: Path, tmp_path: Path, llamacpp: ModuleType
) -> None:
    choice, layout = REPACKED[case]
    mq.quantize(small_llama, **choice).save(tmp_path / "ct")
    report = mq.export(tmp_path / "ct", tmp_path / "m.gguf", "gguf", format_options={"outtype": "f32"})
    before, after = open_source(tmp_path / "ct", mq.load_registry()), load(tmp_path / "m.gguf")
    assert {t.layout.name for t in after.header.tensors.values() if t.layout} == {"F32", layout}
    half = 32
    order = [k * half + j for j in range(half) for k in range(2)]
    for name, target in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k")):
        spec = next(s for s in before.specs() if s.name == f"model.layers.1.{name}.weight")
        ours, theirs = (
            source.read(found, range(spec.shape[0]))
            for source, found in ((before, spec.name), (after, f"blk.1.{target}.weight"))
        )
        assert isinstance(ours, QuantizedTensor)
        assert isinstance(theirs, QuantizedTensor)
        codes, exact = ours.codes, ours.dequantize()
        if target != "ffn_down":
            codes, exact = (x.view(-1, 64, x.shape[1])[:, order].reshape(x.shape) for x in (codes, exact))
        assert torch.equal(codes, theirs.codes)
        assert torch.allclose(theirs.dequantize(), exact, rtol=2e-3, atol=1e-4)
        assert np.array_equal(values(tmp_path / "m.gguf", f"blk.1.{target}.weight"), theirs.dequantize().numpy())
    assert any("rounded" in note for note in report.notes)
    assert 60 < report.sqnr_db < float("inf")  # what the rounding of scales to float16 costs
    with llamacpp.Model(str(tmp_path / "m.gguf"), n_ctx=64) as model:
        assert np.isfinite(model.logits([1, 300, 301])).all()


def test_what_cannot_be_repacked_is_named_and_dequantized_only_when_asked(small_llama: Path, tmp_path: Path) -> None:
    mq.quantize(small_llama, scheme="fp8").save(tmp_path / "ct")
    with pytest.raises(UnsupportedEncodingError, match=r"gguf cannot hold 42 of") as caught:
        mq.export(tmp_path / "ct", tmp_path / "m.gguf", "gguf")
    assert "--on-unsupported dequantize" in caught.value.hint
    assert not (tmp_path / "m.gguf").exists()
    mq.export(tmp_path / "ct", tmp_path / "m.gguf", "gguf", on_unsupported="dequantize")
    assert {s.dtype for s in load(tmp_path / "m.gguf").specs() if len(s.shape) == 2} == {"float16"}


def test_the_hint_has_names_that_rules_match(small_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(UnsupportedEncodingError, match=r"gguf cannot hold 1 of .*: blk\.1\.ffn_down\.weight") as caught:
        mq.quantize(small_llama, scheme="Q8_0", set=f"{name}=fp8").save(tmp_path / "m.gguf")
    assert caught.value.hint.endswith(f"leave them as they are: --keep '{name}'")


def test_a_gguf_file_is_a_source_for_another(small_llama: Path, tmp_path: Path, llamacpp: ModuleType) -> None:
    mq.export(small_llama, tmp_path / "a.gguf", "gguf", format_options={"outtype": "f32"})
    mq.quantize(tmp_path / "a.gguf", scheme="int8").save(tmp_path / "b.gguf", format="gguf")
    first, second = load(tmp_path / "a.gguf").header, load(tmp_path / "b.gguf").header
    assert list(first.tensors) == list(second.tensors)
    assert {k: v for k, v in second.metadata.items() if k.startswith("llama.")} == {
        k: v for k, v in first.metadata.items() if k.startswith("llama.")
    }
    assert (first.metadata["general.file_type"], second.metadata["general.file_type"]) == (0, 7)
    ids = list(range(5, 40))
    a, b = (llamacpp.logits(str(tmp_path / n), ids, flash=0, kv_f32=True) for n in ("a.gguf", "b.gguf"))
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_a_transposed_layer_is_quantized_from_its_own_values(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model")
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().t().half().float().numpy()
    assert np.array_equal(values(tmp_path / "m.gguf", "blk.0.ffn_up.weight"), weight)


def test_planning_imports_no_torch(minilm: Path) -> None:
    code = (
        "import sys; from monoquant_core.plugins import load_registry; from monoquant_core.sources import open_source;"
        "from monoquant_core.planner import make_plan; r = load_registry();"
        "assert not {'torch', 'numpy', 'gguf'} & set(sys.modules), 'registering';"
        f"s = open_source({str(minilm)!r}, r);"
        "p = make_plan(s, registry=r, format='gguf', destination='m.gguf', quantizing=False);"
        "assert p.bytes_after > 1000; assert not {'torch', 'numpy'} & set(sys.modules), 'planning'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line(small_llama: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "monoquant_core.cli", "export", str(small_llama), "-o", str(tmp_path / "m.gguf")]
    done = subprocess.run([*run, "--format", "gguf", "--architecture", "lama"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'llama'?" in done.stderr
    done = subprocess.run([*run, "--format", "gguf", "--outtype", "bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inspect = [sys.executable, "-m", "monoquant_core.cli", "inspect", str(tmp_path / "m.gguf")]
    done = subprocess.run(inspect, capture_output=True, text=True)
    assert "blk.5.attn_q.weight" in done.stdout
    assert "general.architecture" in done.stdout


def test_experts_of_other_numbers_make_no_stack() -> None:
    from monoquant_gguf.architectures.base import Model
    from monoquant_gguf.architectures.llama import Mixtral

    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    specs = [TensorSpec(name.format(i), (4, 4), "float32") for i in (0, 2)]
    with pytest.raises(MonoquantError, match=r"experts \[0, 2\] do not make a stack"):
        Mixtral().outputs(specs, Model(ModelInfo("m", config={"model_type": "mixtral"}), {}), "float16")


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    ],
)
@pytest.mark.parametrize("scheme", ["Q8_0", "int8"])
def test_stacked_and_transposed_layers_are_quantized(
    kind: str, extra: dict[str, Any], scheme: str, tmp_path: Path, llamacpp: ModuleType
) -> None:
    """Where a format's own type is asked for; int8 per channel of a transposed layer has another axis, and says so."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**(extra if kind == "GPT2" else {**small, **extra}))
    head = "GPT2LMHeadModel" if kind == "GPT2" else "MixtralForCausalLM"
    model = getattr(transformers, head)(config).eval()
    model.save_pretrained(tmp_path / "model")
    options = {"tokenizer": "none", "outtype": "f32"}
    made = mq.quantize(tmp_path / "model", scheme=scheme)
    if (kind, scheme) == ("GPT2", "int8"):
        with pytest.raises(UnsupportedEncodingError, match=r"gguf cannot hold \d+ of"):
            made.save(tmp_path / "m.gguf", format="gguf", format_options=options)
        return
    made.save(tmp_path / "m.gguf", format="gguf", format_options=options)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.ffn_down_exps.weight" if kind == "Mixtral" else "blk.1.ffn_down.weight"] == "Q8_0"
    ids = list(range(5, 40))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = llamacpp.logits(str(tmp_path / "m.gguf"), ids, flash=0, kv_f32=True)
    assert np.linalg.norm(found - expected) <= 0.03 * np.linalg.norm(expected)


def test_a_stack_that_no_block_divides_falls_back_to_floats(tmp_path: Path, llamacpp: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    how = {"format": "gguf", "format_options": {"tokenizer": "none", "outtype": "f32"}}
    with pytest.raises(PlanError, match=r"F16, 16 bits .* bits per weight|bits per weight"):
        mq.quantize(tmp_path / "model", scheme="Q5_1").save(tmp_path / "m.gguf", **how)
    options = {"allow_fallback": True}
    report = mq.quantize(tmp_path / "model", scheme="Q5_1", options=options).save(tmp_path / "m.gguf", **how)
    layouts = {t.name: t.layout for t in report.tensors if "exps" in t.name}
    assert layouts == {
        "blk.0.ffn_gate_exps.weight": "Q5_1",
        "blk.0.ffn_up_exps.weight": "Q5_1",
        "blk.0.ffn_down_exps.weight": "F16",
    }
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0].numpy()
    found = llamacpp.logits(str(tmp_path / "m.gguf"), [5, 6, 7])
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)

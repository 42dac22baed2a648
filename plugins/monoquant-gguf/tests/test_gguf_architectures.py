"""Models of every architecture, with random weights, run by llama.cpp and by transformers."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_gguf import architectures
from monoquant_gguf.architectures.base import Model
from monoquant_gguf.architectures.llama import Llama
from monoquant_gguf.metadata import Metadata, header

import monoquant_core as mq
from monoquant_core.errors import MonoquantError, PlanError
from monoquant_core.hookspecs import hookimpl
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import load_registry

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-heads-of-32": ("Llama", {"head_dim": 32}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "Gemma3",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
            **{"num_hidden_layers": 6, "intermediate_size": 16},  # the 6th has full attention
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "Phi3",
        {
            "rope_parameters": LONG_ROPE,
            # A context of at most 512 takes the short factors, and llama.cpp's smallest context is 256.
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 1024,
            "sliding_window": None,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


def build(kind: str, extra: dict[str, Any], folder: Path) -> Any:
    """A model with random weights, norms and biases included, saved as transformers does."""
    torch.manual_seed(0)
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    values = {**SMALL, **extra}
    if kind == "Bert":
        del values["num_key_value_heads"]
    if kind == "GPT2":
        values = {k: v for k, v in values.items() if not k.startswith(("hidden", "num_", "intermediate", "max_"))}
    config = getattr(transformers, name)(**values)
    head = {"GPT2": "GPT2LMHeadModel", "Bert": "BertModel"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


class TableGelu(torch.nn.Module):
    """ggml's tanh gelu, whose table has float16 inputs and outputs (``ggml_vec_gelu_f32``)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), rounded))


def with_table(model: Any) -> Any:
    """The model with that activation in place of the exact one, which hides nothing of the export."""
    for module in model.modules():
        for name in ("act", "act_fn"):
            if type(getattr(module, name, None)).__name__ in ("GELUTanh", "NewGELUActivation"):
                setattr(module, name, TableGelu())
    return model


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(case: str, tmp_path: Path, llamacpp: ModuleType) -> None:
    kind, extra = CASES[case]
    model = with_table(build(kind, extra, tmp_path / "model"))
    file = tmp_path / "model.gguf"
    mq.export(tmp_path / "model", file, "gguf", format_options={"outtype": "f32", "tokenizer": "none"})
    ids = torch.randint(3, 160, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    found = llamacpp.logits(str(file), ids[0].tolist(), flash=0, kv_f32=True)
    if "gemma" in case or case == "gpt2":  # at the edge between two entries of the table, a last bit decides
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
        assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()
    else:
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_llama_cpp_pools_a_bert_as_sentence_transformers_says(
    pooling: str, tmp_path: Path, llamacpp: ModuleType
) -> None:
    folder = tmp_path / "model"
    model = build("Bert", {}, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(
        json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])
    )
    flag = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({flag: True}))
    file = tmp_path / "model.gguf"
    mq.export(folder, file, "gguf", format_options={"outtype": "f32", "tokenizer": "none"})
    ids = torch.randint(3, 160, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(ids).last_hidden_state[0]
    expected = (states.mean(0) if pooling == "mean" else states[0]).numpy()
    with llamacpp.Model(str(file), embeddings=True, flash=0, kv_f32=True) as loaded:
        found = loaded.embed_ids(ids[0].tolist())
    expected = expected / np.linalg.norm(expected)
    assert np.abs(found / np.linalg.norm(found) - expected).max() <= 1e-4


def test_an_unknown_model_type_names_what_there_is(tmp_path: Path) -> None:
    model = build("Llama", {}, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(PlanError, match=r"model_type 'mamba': GGUF is written for .*gemma2, .*llama") as caught:
        mq.export(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    assert "--architecture generic" in caught.value.hint
    assert not (tmp_path / "model.gguf").exists()
    del model


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    build("Qwen3", {"head_dim": 32}, tmp_path / "model")
    with pytest.raises(PlanError, match=r"no place in llama.cpp's qwen2 for .*layers\.0\.self_attn\.k_norm\.weight"):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"architecture": "qwen2"})


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("Gemma2", {"query_pre_attn_scalar": 20, "head_dim": 32}, "query_pre_attn_scalar 20"),
        (
            "GPT2",
            {"activation_function": "relu", "n_embd": 64, "n_layer": 1, "n_head": 4},
            "activation_function 'relu'",
        ),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope scaling 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build(kind, extra, tmp_path / "model")
    with pytest.raises(PlanError, match=message):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})


def test_layers_that_are_missing_are_counted(tmp_path: Path) -> None:
    build("Llama", {}, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1 << 30}))
    with pytest.raises(PlanError, match=r"config.json says 1073741824 layers, the tensors are those of 2"):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})


def test_a_head_that_is_missing_and_a_window_are_said(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**{**SMALL, "sliding_window": 16, "tie_word_embeddings": False})
    transformers.MistralModel(config).save_pretrained(tmp_path / "model")
    report = mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options={"tokenizer": "none"})
    assert any("no lm_head" in note for note in report.notes)
    assert any("window of 16 tokens" in note for note in report.notes)


class Cousin(Llama):
    """An architecture of a third party."""

    model_types = ("cousin",)


class CousinPlugin:
    """A plugin that brings it."""

    __name__ = "cousin"

    @staticmethod
    @hookimpl
    def monoquant_gguf_architectures() -> list[type[Llama]]:
        return [Cousin]


def test_a_plugin_brings_an_architecture(tmp_path: Path, llamacpp: ModuleType) -> None:
    model = build("Llama", {}, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "cousin"}))
    options = {"outtype": "f32", "tokenizer": "none"}
    with pytest.raises(PlanError, match="model_type 'cousin'"):
        mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options=options)
    registry = load_registry(extra=(CousinPlugin,))
    mq.export(tmp_path / "model", tmp_path / "m.gguf", "gguf", format_options=options, registry=registry)
    ids = list(range(3, 20))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = llamacpp.logits(str(tmp_path / "m.gguf"), ids, flash=0, kv_f32=True)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    # A recipe asks the same registry for the roles of tensors.
    names = {"format": "gguf", "format_options": {"tokenizer": "none"}}
    report = mq.quantize(tmp_path / "model", scheme="Q8_0", registry=registry).save(tmp_path / "q.gguf", **names)
    assert {t.layout for t in report.tensors if t.name.startswith("blk.0.attn_q")} == {"Q8_0"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_config_json_is_data(data: st.DataObject) -> None:
    """Whatever it says, planning works or says what is wrong."""
    kind = data.draw(st.sampled_from(list(architectures.BUILT_IN)))
    junk = st.sampled_from([0, -1, 1.5, "x", [], {}, True, 1 << 40, math.inf, math.nan, 7, 1e300])
    config: dict[str, Any] = {**SMALL, "model_type": kind.model_types[0], "num_local_experts": 4, "num_experts": 4}
    config |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16}
    config |= {"rms_norm_eps": 1e-5, "rope_parameters": dict(data.draw(st.sampled_from([LLAMA3_ROPE, LONG_ROPE])))}
    for _ in range(data.draw(st.integers(1, 3))):
        target = data.draw(st.sampled_from([config, config["rope_parameters"]]))
        if isinstance(target, dict):
            target[data.draw(st.sampled_from([*config, *LLAMA3_ROPE, "long_factor", "layer_norm_eps"]))] = data.draw(
                junk
            )
        if not isinstance(config.get("rope_parameters"), dict):
            break
    specs = [
        TensorSpec("model.layers.0.self_attn.q_proj.weight", (64, 64), "float32"),
        TensorSpec("model.layers.0.self_attn.k_proj.bias", (32,), "float32"),
        TensorSpec("model.norm.weight", (64,), "float32"),
    ]
    model = Model(ModelInfo("m", config=config), {s.name: s.shape for s in specs})
    architecture = kind()
    with contextlib.suppress(MonoquantError):
        architecture.outputs(specs, model, "float16")
    with contextlib.suppress(MonoquantError):
        architecture.hyperparameters(model, found := Metadata())
        assert header(found, [])

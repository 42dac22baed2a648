"""Llama, Mistral, Mixtral and their likes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from monoquant_core.errors import PlanError, SourceError
from monoquant_core.exporters import Output
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_gguf.architectures.base import (
    Architecture,
    Change,
    Model,
    common,
    common_config,
    computed,
    for_layers,
    interleaved,
    only,
)
from monoquant_gguf.architectures.keys import Keys, shortest
from monoquant_gguf.metadata import Metadata

#: what nearly every decoder of transformers calls its tensors
DECODER = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    **dict(
        for_layers(
            {
                "input_layernorm": "attn_norm",
                "self_attn.q_proj": "attn_q",
                "self_attn.k_proj": "attn_k",
                "self_attn.v_proj": "attn_v",
                "self_attn.o_proj": "attn_output",
                "post_attention_layernorm": "ffn_norm",
                "mlp.gate_proj": "ffn_gate",
                "mlp.up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
            }
        )
    ),
}

ROTARY_BUFFERS = {r"rotary_emb\.inv_freq$": "computed by llama.cpp from the base frequency"}


class Llama(Architecture):
    """Llama 2 and 3, Mistral, SmolLM, TinyLlama."""

    name = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    restored = "LlamaForCausalLM"
    names: ClassVar[Mapping[str, str]] = DECODER
    dropped: ClassVar[Mapping[str, str]] = ROTARY_BUFFERS

    def is_of(self, keys: Keys) -> bool:
        """Those without experts."""
        return not keys.get("expert_count")

    def config(self, keys: Keys) -> dict[str, Any]:
        """That of Llama, whichever of them it was."""
        config = decoder_config(keys) | {"hidden_act": "silu"}
        config["attention_bias"], config["mlp_bias"] = (
            keys.has(f"blk.0.{name}.bias") for name in ("attn_output", "ffn_down")
        )
        rotated = keys.count("rope.dimension_count", config["head_dim"])
        if rotated != config["head_dim"]:
            raise SourceError(
                f"{keys.path}: llama.rope.dimension_count {rotated}; transformers' llama turns whole heads"
            )
        if keys.has("rope_freqs.weight"):
            config["rope_scaling"] = llama3_scaling(keys, config)
        return config

    def check(self, model: Model) -> None:
        """Rope that turns only a part of a head is permuted differently."""
        only(model, self.name, "hidden_act", "silu")
        if float(model.rope().get("partial_rotary_factor") or 1) != 1:
            raise PlanError(f"{model.info.name}: config.json: partial_rotary_factor, which llama does not have")

    def change(self, target: str, spec: TensorSpec, model: Model) -> Change | None:
        """q and k are permuted."""
        if target.rsplit(".", 2)[-2] in ("attn_q", "attn_k"):
            return interleaved(spec, model.head_dim)
        return None

    def derived(self, model: Model) -> Sequence[Output]:
        """Llama 3.1's scaling of rope is a tensor of factors."""
        rope = model.rope()
        if rope["rope_type"] != "llama3":
            return ()
        return (computed("rope_freqs.weight", llama3_factors(model), "llama3 rope scaling, computed from config.json"),)

    def notes(self, model: Model) -> Sequence[str]:
        """Mistral's first models attend to a window."""
        window, longest = model.get("sliding_window"), model.get("max_position_embeddings")
        if type(window) is not int or (type(longest) is int and window >= longest):
            return super().notes(model)
        return (*super().notes(model), f"llama.cpp's llama attends to everything, not to a window of {window} tokens")

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Those of every decoder, and the rotated part of a head."""
        common(self.name, model, out)
        out.u32("llama.rope.dimension_count", model.head_dim)
        if model.rope()["rope_type"] == "longrope":
            raise PlanError(f"{model.info.name}: config.json: longrope, which llama of llama.cpp does not have")


class Mixtral(Llama):
    """Mixtral: Llama with a mixture of experts."""

    restored = "MixtralForCausalLM"

    model_types: ClassVar[tuple[str, ...]] = ("mixtral",)
    names: ClassVar[Mapping[str, str]] = {
        **DECODER,
        **dict(
            for_layers(
                {
                    "block_sparse_moe.gate": "ffn_gate_inp",
                    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
                    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
                    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
                }
            )
        ),
    }

    def is_of(self, keys: Keys) -> bool:
        """Those with experts."""
        return bool(keys.get("expert_count"))

    def config(self, keys: Keys) -> dict[str, Any]:
        """Llama's, and the experts."""
        experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
        return (
            super().config(keys) | {name: keys.count(key) for name, key in experts.items()} | {"sliding_window": None}
        )

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Llama's, and the experts."""
        super().hyperparameters(model, out)
        out.u32("llama.expert_count", model.count("num_local_experts"))
        out.u32("llama.expert_used_count", model.count("num_experts_per_tok"))


def decoder_config(keys: Keys) -> dict[str, Any]:
    """What decoders share, with all that transformers would otherwise have another default for.

    :raises SourceError: for heads without elements.
    """
    config = common_config(keys)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if config["head_dim"] < 1:
        raise SourceError(f"{keys.path}: {config['num_attention_heads']} heads of {config['hidden_size']} elements")
    return config


def llama3_scaling(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Llama 3.1's factors of rope were computed from: the first of several guesses that gives the same factors.

    :raises SourceError: for factors that are of another kind.
    """
    found = keys.vector("rope_freqs.weight")
    factor = max(found, default=1.0)
    for high, context in _bounds(found, factor, config["rope_theta"], config["head_dim"]):
        scaling = {
            "rope_type": "llama3",
            "factor": shortest(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        made = Model(ModelInfo(keys.path, config={**config, "rope_scaling": scaling}), {})
        if _alike(llama3_factors(made), found):
            return scaling
    raise SourceError(
        f"{keys.path}: rope_freqs.weight is no llama3 scaling of rope, which is all that config.json can say"
    )


def _bounds(factors: Sequence[float], factor: float, base: float, width: int) -> Iterator[tuple[float, int]]:
    """Guesses at the higher bound and the trained context; the lower bound is 1 in every Llama, the higher one 4.

    Between the bounds, a factor's reciprocal goes linearly with its frequency: two of them give both numbers, and one
    the context alone. Without any, contexts are powers of two.
    """
    between = [(i, (1 / f - 1 / factor) / (1 - 1 / factor)) for i, f in enumerate(factors) if 1 < f < factor]
    points = [(1 / (2 * math.pi * base ** (2 * i / width)), smooth) for i, smooth in between]
    for x, y in points[:1]:
        yield 4.0, max(1, round((3 * y + 1) / x))
    if len(points) > 1 and points[0][0] != points[-1][0]:
        (x1, y1), (x2, y2) = points[0], points[-1]
        slope = (y2 - y1) / (x2 - x1)
        below = slope * x1 - y1
        if below > 0 and slope > 0:
            yield round(1 + 1 / below, 3), max(1, round(slope / below))
    yield from ((4.0, 1 << k) for k in range(5, 21))


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(a, b, strict=True))


def llama3_factors(model: Model) -> list[float]:
    """What each frequency is divided by (``_compute_llama3_parameters`` of transformers).

    :raises PlanError: naming a parameter that is missing.
    """
    rope = model.rope()
    try:
        factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(rope["original_max_position_embeddings"])
        base = float(rope["rope_theta"])
    except (KeyError, TypeError, ValueError) as exc:
        raise PlanError(f"{model.info.name}: config.json: llama3 rope scaling is not complete: {exc}") from exc
    factors = []
    for i in range(0, model.head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / model.head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors

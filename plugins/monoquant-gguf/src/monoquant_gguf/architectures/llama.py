"""Llama, Mistral, Mixtral and their likes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from monoquant_core.errors import PlanError
from monoquant_core.exporters import Output
from monoquant_core.model import TensorSpec
from monoquant_gguf.architectures.base import (
    Architecture,
    Change,
    Model,
    common,
    computed,
    for_layers,
    interleaved,
    only,
)
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
    names: ClassVar[Mapping[str, str]] = DECODER
    dropped: ClassVar[Mapping[str, str]] = ROTARY_BUFFERS

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

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Llama's, and the experts."""
        super().hyperparameters(model, out)
        out.u32("llama.expert_count", model.count("num_local_experts"))
        out.u32("llama.expert_used_count", model.count("num_experts_per_tok"))


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

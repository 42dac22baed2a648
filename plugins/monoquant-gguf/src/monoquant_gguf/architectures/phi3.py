"""Phi-3 and Phi-4-mini."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from monoquant_core.errors import PlanError
from monoquant_core.exporters import Output
from monoquant_gguf.architectures.base import Architecture, Model, common, computed, for_layers, only
from monoquant_gguf.architectures.keys import Keys, shortest
from monoquant_gguf.architectures.llama import DECODER, ROTARY_BUFFERS, decoder_config
from monoquant_gguf.metadata import Metadata


class Phi3(Architecture):
    """Phi-3 with its joined q, k, v and its joined gate and up."""

    name = "phi3"
    restored = "Phi3ForCausalLM"
    model_types: ClassVar[tuple[str, ...]] = ("phi3",)
    names: ClassVar[Mapping[str, str]] = {
        **DECODER,
        **dict(for_layers({"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"})),
    }
    dropped: ClassVar[Mapping[str, str]] = ROTARY_BUFFERS

    def config(self, keys: Keys) -> dict[str, Any]:
        """Those of every decoder, the rotated part of a head, and long rope's factors."""
        config = decoder_config(keys) | {"hidden_act": "silu", "sliding_window": None}
        width = config.pop("head_dim")
        config["partial_rotary_factor"] = keys.count("rope.dimension_count", width) / width
        config["original_max_position_embeddings"] = keys.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        if keys.get("attention.sliding_window"):
            config["sliding_window"] = keys.count("attention.sliding_window")
        if keys.has("rope_factors_long.weight"):
            factors = {
                f"{key}_factor": [shortest(f) for f in keys.vector(f"rope_factors_{key}.weight")]
                for key in ("long", "short")
            }
            attention = keys.optional("rope.scaling.attn_factor")
            config["rope_scaling"] = {"rope_type": "longrope", **factors} | (
                {} if attention is None else {"attention_factor": attention}
            )
        return config

    def check(self, model: Model) -> None:
        """llama.cpp has one activation."""
        only(model, self.name, "hidden_act", "silu")

    def derived(self, model: Model) -> Sequence[Output]:
        """Long rope's factors."""
        rope = model.rope()
        if rope["rope_type"] not in ("longrope", "su"):
            return ()
        outputs = []
        for key in ("long", "short"):
            factors = rope.get(f"{key}_factor")
            if not isinstance(factors, list) or len(factors) != self._rotated(model) // 2:
                raise PlanError(
                    f"{model.info.name}: config.json: rope's {key}_factor is not {self._rotated(model) // 2} numbers"
                )
            outputs.append(computed(f"rope_factors_{key}.weight", factors, f"rope's {key}_factor of config.json"))
        return outputs

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Those of every decoder, the rotated part of a head, and the context it was trained with."""
        common(self.name, model, out)
        out.u32("phi3.attention.head_count_kv", model.kv_heads)
        out.u32("phi3.rope.dimension_count", self._rotated(model))
        longest, rope = model.count("max_position_embeddings"), model.rope()
        original = rope.get("original_max_position_embeddings") or longest
        if model.get("original_max_position_embeddings") is not None:
            original = model.count("original_max_position_embeddings")
        if original < 2:
            raise PlanError(f"{model.info.name}: config.json: original_max_position_embeddings {original}")
        out.u32("phi3.rope.scaling.original_context_length", int(original))
        if model.get("sliding_window") is not None:
            out.u32("phi3.attention.sliding_window", model.count("sliding_window"))
        if rope["rope_type"] in ("longrope", "su"):
            scale = float(rope.get("factor") or longest / int(original))
            factor = math.sqrt(1 + math.log(scale) / math.log(int(original))) if scale > 1 else 1.0
            out.f32("phi3.rope.scaling.attn_factor", float(rope.get("attention_factor") or factor))

    def _rotated(self, model: Model) -> int:
        part = model.rope().get("partial_rotary_factor") or model.number("partial_rotary_factor", default=1.0)
        return int(model.head_dim * part)

"""Qwen 2, 2.5 and 3, dense and with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoquant_core.errors import PlanError
from monoquant_gguf.architectures.base import Architecture, Model, common, for_layers, only
from monoquant_gguf.architectures.keys import Keys
from monoquant_gguf.architectures.llama import DECODER, ROTARY_BUFFERS, decoder_config
from monoquant_gguf.metadata import Metadata

_QK_NORMS = dict(for_layers({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}))


class Qwen2(Architecture):
    """Qwen 2 and 2.5."""

    name = "qwen2"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    restored = "Qwen2ForCausalLM"
    names: ClassVar[Mapping[str, str]] = DECODER
    dropped: ClassVar[Mapping[str, str]] = ROTARY_BUFFERS

    def config(self, keys: Keys) -> dict[str, Any]:
        """Those of every decoder."""
        return decoder_config(keys) | {"hidden_act": "silu", "use_sliding_window": False}

    def check(self, model: Model) -> None:
        """llama.cpp gives every layer full attention."""
        only(model, self.name, "hidden_act", "silu")
        if model.get("use_sliding_window"):
            raise PlanError(
                f"{model.info.name}: config.json: use_sliding_window, which llama.cpp's {self.name} has not"
            )


class Qwen3(Qwen2):
    """Qwen 3."""

    name = "qwen3"
    restored = "Qwen3ForCausalLM"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)
    names: ClassVar[Mapping[str, str]] = {**DECODER, **_QK_NORMS}


class Qwen3Moe(Qwen2):
    """Qwen 3 with a mixture of experts."""

    name = "qwen3moe"
    restored = "Qwen3MoeForCausalLM"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_moe",)
    names: ClassVar[Mapping[str, str]] = {
        **DECODER,
        **_QK_NORMS,
        **dict(
            for_layers(
                {
                    "mlp.gate": "ffn_gate_inp",
                    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
                    "mlp.experts.{}.up_proj": "ffn_up_exps",
                    "mlp.experts.{}.down_proj": "ffn_down_exps",
                }
            )
        ),
    }

    def check(self, model: Model) -> None:
        """Every layer has experts, whose weights are normalized."""
        super().check(model)
        if model.get("mlp_only_layers") or model.get("decoder_sparse_step", default=1) != 1:
            raise PlanError(f"{model.info.name}: config.json: layers without experts, which qwen3moe does not have")
        if not model.get("norm_topk_prob", default=False):
            raise PlanError(f"{model.info.name}: config.json: norm_topk_prob is false; llama.cpp's qwen3moe normalizes")

    def config(self, keys: Keys) -> dict[str, Any]:
        """Those of every decoder, and the experts."""
        experts = {
            "num_experts": keys.count("expert_count"),
            "num_experts_per_tok": keys.count("expert_used_count"),
            "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        }
        every_layer = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return super().config(keys) | experts | every_layer

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Those of every decoder, and the experts."""
        common(self.name, model, out)
        out.u32("qwen3moe.expert_count", model.count("num_experts", "num_local_experts"))
        out.u32("qwen3moe.expert_used_count", model.count("num_experts_per_tok"))
        out.u32("qwen3moe.expert_feed_forward_length", model.count("moe_intermediate_size"))

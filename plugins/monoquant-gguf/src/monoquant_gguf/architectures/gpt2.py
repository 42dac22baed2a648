"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoquant_core.model import TensorSpec
from monoquant_gguf.architectures.base import (
    Architecture,
    Change,
    Model,
    common_config,
    for_layers,
    only,
    transposed,
)
from monoquant_gguf.architectures.keys import Keys

_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


class Gpt2(Architecture):
    """GPT-2, whose layers store their weights as [in, out]."""

    name = "gpt2"
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    prefixes = ("transformer.",)
    restored = "GPT2LMHeadModel"
    root = "transformer."
    rotary = False
    names: ClassVar[Mapping[str, str]] = {
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_f": "output_norm",
        "lm_head": "output",
        **dict(
            for_layers(
                {
                    "ln_1": "attn_norm",
                    "ln_2": "ffn_norm",
                    "attn.c_attn": "attn_qkv",
                    "attn.c_proj": "attn_output",
                    "mlp.c_fc": "ffn_up",
                    "mlp.c_proj": "ffn_down",
                },
                source="h.{}.",
            )
        ),
    }
    dropped: ClassVar[Mapping[str, str]] = {r"\.attn\.(bias|masked_bias)$": "the causal mask"}

    def config(self, keys: Keys) -> dict[str, Any]:
        """The same numbers by GPT-2's names."""
        config = common_config(keys, rotary=False)
        return {
            "n_layer": config["num_hidden_layers"],
            "n_positions": config["max_position_embeddings"],
            "n_ctx": config["max_position_embeddings"],
            "n_embd": config["hidden_size"],
            "n_inner": config["intermediate_size"],
            "n_head": config["num_attention_heads"],
            "layer_norm_epsilon": config.get("layer_norm_eps", 1e-5),
            "activation_function": "gelu_new",
        }

    def check(self, model: Model) -> None:
        """llama.cpp has the activation that GPT-2 was trained with."""
        only(model, self.name, "activation_function", "gelu_new", "gelu_pytorch_tanh")
        only(model, self.name, "scale_attn_weights", True)
        only(model, self.name, "scale_attn_by_inverse_layer_idx", False)

    def change(self, target: str, spec: TensorSpec, model: Model) -> Change | None:
        """Conv1D weights are transposed."""
        layer, _, leaf = target.rpartition(".")
        return transposed(spec) if leaf == "weight" and layer.rpartition(".")[2] in _CONV1D else None

"""Gemma 2 and 3 (text)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from monoquant_core.errors import PlanError
from monoquant_core.model import TensorSpec
from monoquant_gguf.architectures.base import Architecture, Change, Model, common, for_layers, plus_one
from monoquant_gguf.architectures.keys import Keys
from monoquant_gguf.architectures.llama import DECODER, ROTARY_BUFFERS, decoder_config
from monoquant_gguf.metadata import Metadata

_NORMS = dict(
    for_layers(
        {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    )
)


class Gemma2(Architecture):
    """Gemma 2."""

    name = "gemma2"
    restored = "Gemma2ForCausalLM"
    model_types: ClassVar[tuple[str, ...]] = ("gemma2",)
    names: ClassVar[Mapping[str, str]] = {**DECODER, **_NORMS}
    dropped: ClassVar[Mapping[str, str]] = ROTARY_BUFFERS
    layers_of_27b = 46  #: llama.cpp tells the size by the number of layers

    def config(self, keys: Keys) -> dict[str, Any]:
        """Those of every decoder, soft caps and the sliding window."""
        config = decoder_config(keys)
        large = config["num_hidden_layers"] == self.layers_of_27b
        scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        return config | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": keys.optional("attn_logit_softcapping"),
            "final_logit_softcapping": keys.optional("final_logit_softcapping"),
            "sliding_window": keys.count("attention.sliding_window"),
        }

    def check(self, model: Model) -> None:
        """llama.cpp knows the scale of attention from the size of the model."""
        large = model.layers == self.layers_of_27b
        expected = model.width // model.heads if large else model.head_dim
        if (scalar := model.get("query_pre_attn_scalar", default=expected)) != expected:
            raise PlanError(
                f"{model.info.name}: config.json: query_pre_attn_scalar {scalar}; "
                f"llama.cpp's {self.name} takes {expected}"
            )
        act = model.get("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
        if act not in ("gelu_pytorch_tanh", "gelu_new"):
            raise PlanError(
                f"{model.info.name}: config.json: activation {act!r}; llama.cpp's {self.name} has tanh gelu"
            )

    def change(self, target: str, spec: TensorSpec, model: Model) -> Change | None:
        """Norms multiply by 1 + weight."""
        return plus_one() if target.endswith("_norm.weight") else None

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Those of every decoder, soft caps and the sliding window."""
        common(self.name, model, out)
        if (cap := model.get("attn_logit_softcapping")) is not None:
            out.f32(f"{self.name}.attn_logit_softcapping", cap)
        if (cap := model.get("final_logit_softcapping")) is not None:
            out.f32(f"{self.name}.final_logit_softcapping", cap)
        if model.get("sliding_window") is not None:
            out.u32(f"{self.name}.attention.sliding_window", model.count("sliding_window"))


class Gemma3(Gemma2):
    """Gemma 3, text only."""

    name = "gemma3"
    restored = "Gemma3ForCausalLM"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3_text",)
    names: ClassVar[Mapping[str, str]] = {
        **DECODER,
        **_NORMS,
        **dict(for_layers({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})),
    }
    layers_of_27b = 62

    def config(self, keys: Keys) -> dict[str, Any]:
        """Gemma 2's, and the rope of sliding layers."""
        return super().config(keys) | {"rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0)}

    def check(self, model: Model) -> None:
        """Every sixth layer has full attention, the others a rope of their own."""
        super().check(model)
        kinds = model.get("layer_types")
        pattern = model.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
        wanted = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(model.layers)]
        if pattern != 6 or (isinstance(kinds, list) and kinds != wanted):
            raise PlanError(
                f"{model.info.name}: config.json: layer_types; llama.cpp's gemma3 has full attention every 6th"
            )
        if model.get("use_bidirectional_attention"):
            raise PlanError(f"{model.info.name}: config.json: use_bidirectional_attention is not causal; gemma3 is")
        if model.get("attn_logit_softcapping") is not None:
            raise PlanError(f"{model.info.name}: config.json: attn_logit_softcapping, which llama.cpp's gemma3 has not")

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Gemma 2's, and the rope of sliding layers."""
        super().hyperparameters(model, out)
        local = model.rope("sliding_attention")["rope_theta"] if model.get("rope_parameters") else None
        base = local if local is not None else model.get("rope_local_base_freq", default=10000.0)
        out.f32("gemma3.rope.freq_base_swa", base)

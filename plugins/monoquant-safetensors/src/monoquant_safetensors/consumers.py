"""What transformers makes of a compressed-tensors folder as a whole, found by loading them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from monoquant_core.errors import UnsupportedEncodingError
from monoquant_core.model import ModelInfo
from monoquant_core.planning import listing
from monoquant_safetensors import arguments as ct
from monoquant_safetensors.config import Scheme

#: model types of which transformers 5.23 initializes layers by their ``weight``, which packed ones do not have
_NEEDS_WEIGHT = (
    "align altclip blt bridgetower chinese_clip chinese_clip_vision_model clap clipseg clvp cohere2_vision cvt d_fine "
    "data2vec-audio deepseek_vl deepseek_vl_hybrid deimv2 depth_pro dinov3_vit falcon "
    "falcon_mamba fastspeech2_conformer gemma3 gpt_bigcode grounding-dino groupvit hiera ijepa kosmos-2 lfm2_vl "
    "llava_onevision longt5 lw_detr mamba mamba2 mask2former mgp-str mlcd mlcd_vision_model mm-grounding-dino "
    "modernbert modernbert-decoder modernvbert mt5 nanochat neomme neucodec oneformer owlv2 owlvit paligemma pe_audio "
    "phi4_multimodal pi0 pvt pvt_v2 recurrent_gemma rt_detr rwkv sam3_lite_text seamless_m4t "
    "seamless_m4t_v2 seggpt siglip siglip2 siglip2_vision_model siglip_vision_model swiftformer swin2sr "
    "switch_transformers t5 t5gemma2 timesformer udop ultravbert umt5 unispeech unispeech-sat videoprism vitdet "
    "vjepa2 wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm xclip xcodec xlstm"
)

#: model types of which transformers 5.23 splits matrices while it loads them: q, k and v, or gate and up
_SPLIT = (
    "dinov2 dinov2_with_registers gte hrm_text inkling_mm_model jina_embeddings_v3 kimi_k25 molmo2 nemo_speechlm "
    "nomic_bert qianfan_ocr radio rf_detr sapiens2 step3p5 tipsv2 unlimited_ocr"
)

#: model types whose layers transformers 5.23 loads under other names than the checkpoint's
_RENAMED = "audio-spectrogram-transformer beit deit ijepa vit vit_mae vit_msn vivit"


def refuse_unloadable(schemes: Mapping[str, Scheme], info: ModelInfo) -> None:
    """Refuse what transformers loads in no mode: dequantize=True takes one config group only, and some need it.

    :raises UnsupportedEncodingError: naming the model, and the modules concerned.
    """
    if len({scheme.key for scheme in schemes.values()}) < 2:
        return
    packed = [m for m, s in schemes.items() if s.weights.format == ct.PACKED and not s.weights.symmetric]
    if packed:
        raise UnsupportedEncodingError(
            listing(
                f"{info.name}: {{count}} modules with packed zero points beside others quantized differently, "
                "which transformers loads in no mode",
                packed,
            ),
            hint="make them symmetric, or give all modules one scheme",
        )
    if info.model_type in _RENAMED.split():
        raise UnsupportedEncodingError(
            f"{info.name}: several schemes in a {info.model_type} model, which transformers loads in no mode: it "
            "renames the layers and does not find which has which",
            hint="give all modules one scheme, or write it with --convention generic",
        )


def layout_notes(
    schemes: Mapping[str, Scheme], floats: Sequence[str], config: Mapping[str, Any], *, tied: bool
) -> list[str]:
    """What to know of the folder as a whole.

    :param schemes: every quantized module.
    :param floats: modules that are Linear, as far as can be told, and stay floats.
    :param config: the source's config.json.
    :param tied: whether ``tie_word_embeddings`` had to be set.
    """
    notes = []
    model_type = str(config.get("model_type"))
    if config.get("auto_map"):
        notes.append(
            "config.json names code of the model's own (auto_map), which is not copied: put the .py files beside it"
        )
    groups = {scheme.key for scheme in schemes.values()}
    if len(groups) > 1:
        notes.append(
            f"{len(groups)} config groups: load them with transformers' defaults; with dequantize=True transformers "
            "5.23 takes the first group for all modules, and fails or gives wrong weights without a word"
        )
    if tied:
        notes.append("tie_word_embeddings is set: head and embeddings are one tensor, and it is written once")
    if model_type in _SPLIT.split() and schemes:
        notes.append(
            f"{model_type}: transformers 5.23 splits matrices of it while it loads them, and quantized ones it cannot: "
            "it fails, or goes on with random weights"
        )
    elif model_type in _NEEDS_WEIGHT.split() and any(
        s.weights.format in (ct.PACKED, ct.MXFP4) for s in schemes.values()
    ):
        notes.append(
            f"{model_type}: transformers 5.23 loads packed weights of some of its layers only with "
            "CompressedTensorsConfig(dequantize=True); those of w8a8 and fp8 are not packed"
        )
    if model_type in _RENAMED.split() and schemes and any(re.search(r"\.\d+\.", module) for module in floats):
        notes.append(
            f"{model_type}: transformers 5.23 renames its layers and does not find those that are kept: it loads them "
            "only with CompressedTensorsConfig(dequantize=True), and else fails or goes on with random weights"
        )
    if model_type in ("llama4", "llama4_text") and schemes:
        notes.append(
            f"{model_type}: in quantized models transformers 5.23 has experts one by one, and the checkpoint stacks "
            "them: it goes on with random ones"
        )
    experts = {key for module, key in _keys(schemes, floats) if re.search(r"\.experts\.\d+\.", module)}
    if len(experts) > 1:
        notes.append(
            "experts of several kinds: transformers 5.23 takes all for quantized alike, and fails or gives wrong "
            "weights without a word; vLLM loads them where those of a layer are alike"
        )
    return notes


def _keys(schemes: Mapping[str, Scheme], floats: Sequence[str]) -> list[tuple[str, str]]:
    """Modules with what tells their config groups apart, "" for floats."""
    return [*((module, scheme.key) for module, scheme in schemes.items()), *((module, "") for module in floats)]

"""config.json of a compressed-tensors folder. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monoquant_core.encoding import ActivationQuant
from monoquant_core.exporters import FileLayout
from monoquant_safetensors import arguments as ct

VERSION = "0.20.0"  #: of compressed-tensors, whose layout this is

QUANTIZATION = "quantization_config"

_CLS = ("cls.predictions.decoder", "lm_head.decoder")

#: architecture -> output heads that transformers ties to the embeddings, so that files do not hold them
_TIED_HEADS = (
    (r"ForMaskedLM|ForPreTraining|WithLMHead", ("cls.predictions.decoder", "lm_head.decoder", "predictions.decoder")),
    (r"(Bert|berta|Ernie|BigBird|Electra|Xmod|Data2VecText)\w*(ForCausalLM|LMHead|Generation)", _CLS),
    (r"^(Electra|ConvBert)", ("generator_lm_head",)),
    (r"^DistilBert", ("vocab_projector",)),
    (r"^ModernBert", ("decoder",)),
    (r"^(Whisper|Moonshine|CohereAsr|Canary)", ("proj_out",)),
    (r"^GPTNeoX", ("embed_out",)),
    (r"^(XLM|Flaubert)With", ("pred_layer.proj",)),
    (r"^XLNet", ("lm_loss",)),
    (r"^(BioGpt|TrOCR)", ("output_projection",)),
    (r"^T5Gemma", ("lm_head.out_proj",)),
    (r"^Rwkv", ("head",)),
    (r"^Git", ("output",)),
    (r"^Luke", ("entity_predictions.decoder",)),
    (r"^Blip", ("text_decoder.cls.predictions.decoder",)),
    (r"^(Vilt|BridgeTower)", ("mlm_score.decoder",)),
    (r"^SpeechT5", ("text_decoder_postnet.lm_head",)),
    (r"^Kosmos2", ("text_model.lm_head",)),
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the modules of one config group are quantized."""

    weights: ct.Weights
    activation: ActivationQuant | None

    def to_dict(self, targets: Sequence[str]) -> dict[str, Any]:
        """A config group. The format stands in every group: transformers looks here, vLLM here and then at the top."""
        activation = ct.activation_args(self.activation, self.weights) if self.activation is not None else None
        return {
            "targets": list(targets),
            "format": self.weights.format,
            "weights": self.weights.to_dict(),
            "input_activations": activation,
            "output_activations": None,
        }

    @property
    def key(self) -> str:
        """Equal for modules of one group: a static range differs from module to module."""
        return json.dumps(self.to_dict([]))


def model_config(schemes: Mapping[str, Scheme], floats: Sequence[str], layout: FileLayout) -> dict[str, Any]:
    """The source's config.json with its quantization replaced; its other keys and their order stay.

    :param schemes: every quantized module.
    :param floats: modules that are Linear, as far as can be told, and stay floats.
    """
    config = dict(layout.info.config or {})
    config.pop("compression_config", None)  # the name of long ago
    if not schemes:
        if is_compressed_tensors(config.get(QUANTIZATION)):
            del config[QUANTIZATION]
        return config
    if must_tie(layout):
        config["tie_word_embeddings"] = True
    config[QUANTIZATION] = _quantization(schemes, floats, layout, config.get(QUANTIZATION))
    return config


def is_compressed_tensors(config: object) -> bool:
    """Whether a ``quantization_config`` is one of compressed-tensors."""
    return isinstance(config, Mapping) and config.get("quant_method") == "compressed-tensors"


def must_tie(layout: FileLayout) -> bool:
    """Whether config.json calls head and embeddings two tensors, and they are one."""
    return _head_is_tied(layout) and (layout.info.config or {}).get("tie_word_embeddings") is False


def _quantization(
    schemes: Mapping[str, Scheme], floats: Sequence[str], layout: FileLayout, before: object
) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme.key, []).append(module)
    first = {key: schemes[modules[0]] for key, modules in groups.items()}
    heads = _unlisted_heads(layout, schemes)
    known = [*schemes, *floats, *heads]
    ignore = list(dict.fromkeys([*_patterns(floats, known), *heads]))
    targets = {key: _patterns(modules, known) for key, modules in groups.items()}
    if len(groups) == 1:  # what vLLM and SGLang know best; SGLang quantizes a head only if it is named
        targets = {key: ["Linear", *(m for m in modules if m.endswith("lm_head"))] for key, modules in groups.items()}
    formats = list(dict.fromkeys(scheme.weights.format for scheme in schemes.values()))
    cache = before.get("kv_cache_scheme") if isinstance(before, Mapping) and is_compressed_tensors(before) else None
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats[0] if len(formats) == 1 else ct.MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": cache,
        "ignore": ignore,
        "config_groups": {f"group_{i}": first[key].to_dict(targets[key]) for i, key in enumerate(groups)},
    }


def _patterns(modules: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names that match these modules and no other known one, also where a runtime puts other prefixes before them.

    Regular expressions from the last part before the first number on: ``language_model.model.layers`` of a checkpoint
    is ``model.language_model.layers`` in transformers, and class names would win over members of what vLLM joins.
    """
    inside, found = set(modules), []
    matched: dict[str, set[str]] = {}  # modules of one kind in all layers share a pattern
    fitting: dict[str, bool] = {}

    def fits(pattern: str, wider: str) -> bool:
        if pattern not in fitting:
            matched[pattern] = _matches(pattern, matched.get(wider, known))
            fitting[pattern] = matched[pattern] <= inside
        return fitting[pattern]

    for module in modules:
        head, tail = _split(module)
        places = _places(head) if tail else [rf"\b{re.escape(module)}"] if "." in module else []
        every, one = (_numbered(tail, keep) for keep in (0, 1))  # all layers, or one and all of its experts
        choices = [(f"re:.*{place}{every}$", "") for place in places]
        choices += [(f"re:.*{place}{one}$", f"re:.*{place}{every}$") for place in places if one != every]
        found.append(next((p for p, wider in choices if fits(p, wider)), module))
    return list(dict.fromkeys(found))


def _places(head: str) -> list[str]:
    """Expressions for what precedes a module's tail: anything, one part of its head, all of it."""
    parts = [re.escape(part) for part in head.split(".") if part]
    some = [rf"\b{part}\..*\b" for part in parts] if len(parts) > 1 else []
    return [r"\b", *some, *([rf"\b{re.escape(head)}"] if head else [])]


def _numbered(tail: str, keep: int) -> str:
    """An expression for a tail, its first ``keep`` numbers as they are and any number for the others."""
    parts = [re.escape(part) for part in tail.split(".")]
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    for i in numbers[keep:]:
        parts[i] = r"\d+"
    return r"\.".join(parts)


def _split(module: str) -> tuple[str, str]:
    """A module's name before and from the part that precedes its first number: "model." and "layers.0.mlp.up_proj"."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return module, ""
    at = max(0, at - 1)
    return "".join(f"{p}." for p in parts[:at]), ".".join(parts[at:])


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    compiled = re.compile(pattern.removeprefix("re:"))
    return {name for name in names if compiled.match(name)}


def _unlisted_heads(layout: FileLayout, schemes: Mapping[str, Scheme]) -> list[str]:
    """Heads that the model may have although no tensor of the file says so: tied ones, and those with another name."""
    config = layout.info.config or {}
    architectures = config.get("architectures") or [""]
    name = architectures[0] if isinstance(architectures, list) and isinstance(architectures[0], str) else ""
    tied = config.get("tie_word_embeddings") is not False or _head_is_tied(layout)
    heads = [head for pattern, found in _TIED_HEADS if tied and re.search(pattern, name) for head in found]
    quantized = any(module.endswith("lm_head") for module in schemes)
    return [head for head in ([] if quantized else ["lm_head"]) + heads if head not in schemes]


def _head_is_tied(layout: FileLayout) -> bool:
    return any(name.endswith("lm_head.weight") for name in layout.ties)

"""What a source's tensors are to llama.cpp: the names by which llama-quantize chooses types. Imports no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monoquant_core.errors import PlanError
from monoquant_core.kinds import KEPT_KINDS
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import Registry

if TYPE_CHECKING:
    from monoquant_gguf.architectures.base import Architecture

#: llama.cpp's name without block and ``.weight``, by how names of other architectures end
_ENDINGS = (
    ("attn_v", r"(v_proj|value|wv)$"),
    ("attn_k", r"(k_proj|key|wk)$"),
    ("attn_q", r"(q_proj|query|wq)$"),
    ("attn_qkv", r"(qkv_proj|qkv|c_attn|query_key_value|Wqkv)$"),
    ("attn_output", r"(o_proj|wo|attn\.c_proj|attn\.out_proj|attention\.(output\.)?dense|self_attention\.dense)$"),
    ("ffn_down", r"(down_proj|w2|fc2|mlp\.c_proj|dense_4h_to_h|output\.dense)$"),
)

#: what llama-quantize leaves as it is, beside vectors, norms and biases
_FLOATS = re.compile(
    r"_norm\.weight$|(^|\.)(position_embd|token_types|ffn_gate_inp|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv|time_mix_\w+|attn_rel_b)\b"
)

_KEPT = {*KEPT_KINDS} - {"embedding", "head"}


@dataclass(frozen=True, slots=True)
class Role:
    """A tensor's place in the model.

    Experts that become one tensor share a target.
    """

    target: str  #: llama.cpp's full name: "blk.3.attn_v.weight"
    name: str  #: without block and ``.weight``: "attn_v", "output"
    layer: int  #: -1 outside of blocks


def roles(info: ModelInfo, specs: Sequence[TensorSpec], registry: Registry | None = None) -> dict[str, Role]:
    """The role of every tensor that llama-quantize would quantize, by the source's name.

    :param registry: whose plugins may bring the model's architecture; by default those that are installed.
    """
    targets = _known(info, specs, registry) or {spec.name: _guess(spec) for spec in specs}
    found = {}
    for spec in specs:
        target = targets.get(spec.name)
        if target is None or not spec.is_float or len(spec.shape) < 2 or not target.endswith(".weight"):
            continue
        if not _FLOATS.search(target):
            block = re.match(r"blk\.(\d+)\.", target)
            name = target[block.end() if block else 0 :].removesuffix(".weight")
            found[spec.name] = Role(target, name, int(block[1]) if block else -1)
    return found


def targets_of(name: str, registry: Registry | None = None) -> tuple[str, ...]:
    """What a tensor may be called by llama.cpp, whatever the model: its own name first."""
    from monoquant_gguf.architectures import BUILT_IN, of_plugins

    return _targets(name, (*BUILT_IN, *of_plugins(registry)))


@functools.lru_cache(maxsize=4096)
def _targets(name: str, architectures: tuple[type[Architecture], ...]) -> tuple[str, ...]:
    found = [name]
    for architecture in architectures:
        target = architecture().target(name)
        if target is not None:
            found.append(target[0] if isinstance(target, tuple) else target)
    return tuple(dict.fromkeys(found))


def _known(info: ModelInfo, specs: Sequence[TensorSpec], registry: Registry | None) -> dict[str, str | None] | None:
    """By the architecture's own table; None where there is none for this model."""
    from monoquant_gguf.architectures import find

    try:
        architecture = find(info, registry=registry)
    except PlanError:
        return None
    found: dict[str, str | None] = {}
    for spec in specs:
        target = architecture.target(spec.name)
        found[spec.name] = target[0] if isinstance(target, tuple) else target
    return found


def _guess(spec: TensorSpec) -> str | None:
    """For other models: by the kind and the end of the name."""
    if spec.kind in _KEPT or not (spec.name == "weight" or spec.name.endswith(".weight")):
        return None
    if spec.kind == "embedding":
        return "token_embd.weight" if re.search(r"tok|word|wte|embed_in|shared", spec.name) else None
    if spec.kind == "head":
        return "output.weight"
    stem = spec.name.removesuffix(".weight")
    name = next((ours for ours, ending in _ENDINGS if re.search(ending, stem)), stem.rpartition(".")[2])
    number = re.search(r"(?:^|\.)(\d+)\.", spec.name)
    return f"blk.{number[1]}.{name}.weight" if number else f"{stem}.weight"

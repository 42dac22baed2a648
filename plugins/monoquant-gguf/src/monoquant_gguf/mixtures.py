"""llama-quantize's mixtures: which type each tensor gets (src/llama-quant.cpp). Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monoquant_core.errors import PlanError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import Registry
from monoquant_core.recipe import KEEP, Rule
from monoquant_gguf import imatrix
from monoquant_gguf.plugin import MixtureOptions
from monoquant_gguf.roles import Role, roles, targets_of

#: the type of most tensors, where it is not the mixture's own name
_DEFAULT = {
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"{base}_{size}": base for base in ("Q4_K", "Q5_K") for size in "SM"},
}

_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")

#: mixtures whose attn_output gets Q5_K in a model of eight experts
_EIGHT_EXPERTS = frozenset({"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"})

_OUTPUT = "the output head: llama-quantize's choice"
_MOST = "most matrices of {}"
_CHOSEN = "{}: llama-quantize's choice in {}"
_FLOAT = "llama.cpp keeps it a float"


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the choice of types asks about a model."""

    architecture: str
    layers: int
    values: int  #: tensors that hold values of the attention
    group: int  #: attention heads that share a head of keys and values
    experts: int
    tied: bool  #: whether the embedding is the output head, too


class Mixture:
    """One of llama-quantize's mixtures."""

    def __init__(self, name: str, options: MixtureOptions) -> None:
        self.name, self.options = name, options
        self.default = _DEFAULT.get(name, name)
        self._registry: Registry | None = None

    def use(self, registry: Registry) -> None:
        """Whose plugins bring architectures."""
        self._registry = registry

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """A rule for each type and reason, and one for what stays a float."""
        types = self.types(info, specs)
        groups: dict[tuple[str, str], list[str]] = {}
        for spec in specs:
            if spec.name in types:
                groups.setdefault(types[spec.name], []).append(spec.name)
            elif spec.is_float:
                groups.setdefault((KEEP, _FLOAT), []).append(spec.name)
        if self.options.imatrix:
            self._check_imatrix(info, types)
        default = dataclasses.asdict(MixtureOptions())
        changed = {key: value for key, value in dataclasses.asdict(self.options).items() if value != default[key]}
        return [
            Rule(scheme, (_any_of(names),), options={} if scheme == KEEP else changed, reason=reason)
            for (scheme, reason), names in groups.items()
        ]

    def _check_imatrix(self, info: ModelInfo, types: Mapping[str, object]) -> None:
        entries = imatrix.load(self.options.imatrix).entries
        if not any(target in entries for name in types for target in targets_of(name, self._registry)):
            raise PlanError(
                f"{self.options.imatrix}: none of its {len(entries)} tensors is in {info.name}",
                hint=f"it is of another model; it has {', '.join(list(entries)[:3])}",
            )

    def types(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> dict[str, tuple[str, str]]:
        """Type and reason of every tensor that is quantized, by the source's name."""
        places = roles(info, specs, self._registry)
        shape = _shape(info, specs, places)
        rows = {spec.name: spec.shape[-1] for spec in specs if spec.shape}
        # llama-quantize counts as it goes: first what is in no block, then block by block.
        ordered = sorted(places, key=lambda name: (places[name].layer, places[name].target))
        chosen: dict[str, tuple[str, str]] = {}
        counts = {"values": 0, "down": 0}
        seen: dict[str, tuple[str, str]] = {}
        for name in ordered:
            role = places[name]
            if role.target not in seen:
                seen[role.target] = self._choose(role, shape, rows[name], counts)
            chosen[name] = seen[role.target]
        return chosen

    def _choose(self, role: Role, shape: _Shape, row: int, counts: dict[str, int]) -> tuple[str, str]:
        if role.name == "output" or (role.name == "token_embd" and shape.tied):
            return self._head(row), _OUTPUT
        found = None
        if role.name in _VALUES:
            found = self._value(counts["values"], shape)
            counts["values"] += 1
        elif role.name.startswith("ffn_down"):
            layer = role.layer if shape.experts > 1 else counts["down"]
            found = self._down(layer, shape.layers)
            counts["down"] += 1
        elif role.name == "attn_k" and shape.experts == 8:
            found = "Q8_0"
        elif role.name == "attn_output":
            found = self._attention_output(shape)
        if found is None or found == self.default:
            return self.default, _MOST.format(self.name)
        return found, _CHOSEN.format(role.name, self.name)

    def _head(self, row: int) -> str:
        if self.default == "Q8_0" or row % (32 if self.default == "Q4_0" else 256):
            return "Q8_0"
        return "Q6_K"

    def _value(self, i: int, shape: _Shape) -> str | None:
        if shape.experts == 8:
            return "Q8_0"
        choices: Mapping[str, str | None] = {
            "Q2_K": "Q4_K" if shape.group >= 4 else "Q3_K",
            "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if i < 4 else None,
            "Q4_K_M": "Q6_K" if _more_bits(i, shape.values) else None,
            "Q5_K_M": "Q6_K" if _more_bits(i, shape.values) else None,
        }
        found = choices.get(self.name)
        # Llama 2 and 3 of 70B: eight heads share their values, so that better ones cost little.
        large = shape.architecture == "llama" and shape.layers == 80 and shape.group > 1
        return "Q5_K" if large and (found or self.default) in ("Q3_K", "Q4_K") else found

    def _down(self, i: int, n: int) -> str | None:
        choices: Mapping[str, str | None] = {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if i < n // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if i < n // 8 else None,
            "Q4_K_M": "Q6_K" if _more_bits(i, n) else None,
            "Q5_K_M": "Q6_K" if _more_bits(i, n) else None,
        }
        return choices.get(self.name)

    def _attention_output(self, shape: _Shape) -> str | None:
        if shape.experts == 8:
            return "Q5_K" if self.name in _EIGHT_EXPERTS else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.name)


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _shape(info: ModelInfo, specs: Sequence[TensorSpec], places: Mapping[str, Role]) -> _Shape:
    config = info.config or {}

    def number(*keys: str, default: int) -> int:
        values = (config.get(key) for key in keys)
        return next((value for value in values if type(value) is int and value > 0), default)

    targets = {role.target: role for role in places.values()}.values()
    ties = {spec.name for spec in specs if spec.tied_to is not None}
    heads = number("num_attention_heads", "n_head", default=1)
    return _Shape(
        architecture={"mistral": "llama", "mixtral": "llama"}.get(info.model_type or "", info.model_type or ""),
        layers=number("num_hidden_layers", "n_layer", default=1 + max((role.layer for role in targets), default=0)),
        values=sum(role.name in _VALUES for role in targets),
        group=heads // number("num_key_value_heads", default=heads),
        experts=number("num_local_experts", "num_experts", default=0),
        tied=not any(role.name == "output" and name not in ties for name, role in places.items()),
    )


def _any_of(names: Sequence[str]) -> str:
    return f"re:^(?:{'|'.join(map(re.escape, names))})$"


Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, Q4_0, Q8_0 = (
    functools.partial(Mixture, name)
    for name in (
        *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
        *("Q4_0", "Q8_0"),
    )
)

"""The recipe of compressed-tensors folders: which tensors of a model can be in them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.recipe import KEEP, DefaultRecipe, Rule

REASON = "compressed-tensors holds Linear layers only; --convention generic holds it"

#: kinds whose 2-D ``weight`` belongs to an nn.Linear; "" is unknown
LINEAR_KINDS = ("linear", "head", "")


def is_linear(spec: TensorSpec) -> bool:
    """Whether it is the weight of an nn.Linear, as far as name, shape and module tell."""
    named = spec.name == "weight" or spec.name.endswith(".weight")
    return named and len(spec.shape) == 2 and spec.kind in LINEAR_KINDS


class LinearRecipe:
    """The core's default recipe, and everything that is no Linear stays as it is."""

    def __init__(self, options: object = None) -> None:
        pass

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """The default rules, then one for each kind and one for each single tensor that the format cannot hold."""
        default = list(DefaultRecipe().rules(info, specs))
        kept = {rule.kind for rule in default}
        others = [s for s in specs if s.is_float and s.kind not in kept and not is_linear(s)]
        mixed = {s.kind for s in specs if is_linear(s)} | {""}  # kinds of which only some tensors are kept
        kinds = dict.fromkeys(s.kind for s in others if s.kind not in mixed)
        names = tuple(f"re:^{re.escape(s.name)}$" for s in others if s.kind in mixed)
        rules = [Rule(KEEP, kind=kind, reason=REASON) for kind in kinds]
        return [*default, *rules, *([Rule(KEEP, names, reason=REASON)] if names else [])]

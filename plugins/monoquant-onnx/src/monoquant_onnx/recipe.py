"""The default recipe of ONNX files. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.recipe import DefaultRecipe, Rule

EMBEDDINGS = "embedding: rows of int8 codes are looked up, which is where small transformers get small"


class OnnxRecipe:
    """The core's default recipe, but for embeddings: they become int8, with one scale per row, whatever the scheme."""

    def __init__(self, options: object = None) -> None:
        pass

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """One rule per kind."""
        rules = [rule for rule in DefaultRecipe().rules(info, specs) if rule.kind != "embedding"]
        return [*rules, Rule("int8", kind="embedding", reason=EMBEDDINGS)]

"""The default recipe of ONNX files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.recipe import KEEP, DefaultRecipe, Rule

EMBEDDINGS = "embedding: rows of int8 codes are looked up, which is where small transformers get small"
SMALL = "embedding of few rows: tiny, and its errors are in every input"
SMALL_ROWS = 256
RECURRENT = "LSTM or GRU: onnxruntime has no kernels for quantized ones"


class OnnxRecipe:
    """The core's default recipe, but for large embeddings: they become int8, a scale per row, whatever the scheme."""

    def __init__(self, options: object = None) -> None:
        pass

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """One rule per kind."""
        rules = [rule for rule in DefaultRecipe().rules(info, specs) if rule.kind != "embedding"]
        rules.append(Rule(KEEP, kind="recurrent", reason=RECURRENT))
        small = [s.name for s in specs if s.kind == "embedding" and s.shape and s.shape[0] < SMALL_ROWS]
        if small:
            rules.append(Rule(KEEP, tuple(f"re:^{re.escape(name)}$" for name in small), reason=SMALL))
        return [*rules, Rule("int8", kind="embedding", reason=EMBEDDINGS)]

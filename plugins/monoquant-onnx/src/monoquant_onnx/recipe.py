"""The default recipe of ONNX files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monoquant_core.kinds import WEIGHT_KINDS
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.recipe import KEEP, DefaultRecipe, Rule

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

EMBEDDINGS = "embedding: rows of int8 codes are looked up, which is where small transformers get small"
SMALL = "embedding of few rows: tiny, and its errors are in every input"
SMALL_ROWS = 256
RECURRENT = "LSTM or GRU: onnxruntime has no kernels for quantized ones"
NO_WEIGHT = "no product or convolution takes it: added or scaled with, and sensitive to rounding"

#: operators whose constants are weights
PRODUCTS = (
    "MatMul",
    "Gemm",
    "Conv",
    "ConvTranspose",
    "DeformConv",
    "Einsum",
    "If",
    "Loop",
    "Scan",
    "LSTM",
    "GRU",
    "RNN",
)
#: operators that may stand between a weight and those
MOVES = ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze")


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
        if others := _no_weights(info, specs):
            rules.append(Rule(KEEP, tuple(f"re:^{re.escape(name)}$" for name in others), reason=NO_WEIGHT))
        return [*rules, Rule("int8", kind="embedding", reason=EMBEDDINGS)]


def _no_weights(info: ModelInfo, specs: Sequence[TensorSpec]) -> list[str]:
    """Tensors that look like weights, by name or rank, and that the graph does not multiply with."""
    graph = info.graph
    if graph is None:
        return []
    likely = [spec.name for spec in specs if spec.kind in WEIGHT_KINDS and spec.name in graph.names]
    return [name for name in likely if not _is_multiplied(graph, name)]


def _is_multiplied(graph: OnnxGraph, name: str) -> bool:
    pending = [node for node, _ in graph.uses(graph.names[name])]
    while pending:
        node = pending.pop()
        if node.op_type in PRODUCTS or node.domain not in ("", "ai.onnx"):
            return True
        if node.op_type in MOVES:
            pending += [use.node for use in node.outputs[0].uses()]
    return False

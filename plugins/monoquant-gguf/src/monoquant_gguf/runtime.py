"""GGUF files in llama.cpp, for verification."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from monoquant_core.declarations import NoOptions
from monoquant_core.errors import ExecutionError
from monoquant_core.model import Source
from monoquant_core.runners import Batch, Observe, Runner
from monoquant_core.runtimes import LOG_PROBABILITIES, LOGITS
from monoquant_core.verification import reference
from monoquant_gguf.llamacpp import EMBEDDING, LlamaCpp
from monoquant_gguf.source import GgufSource

FLOATS = 1e-3  #: of outputs, where every weight is a float: both sides multiply float32, or float16 values as float32
INTEGERS = 0.05  #: llama.cpp rounds the inputs of quantized products to 8 bits, block by block
MEAN, CLS, LAST = 1, 2, 3  #: values of ``pooling_type``


class LlamaCppRuntime:
    """Scores tokens, or embeds, as the file's architecture does."""

    def __init__(self, options: NoOptions) -> None:
        del options
        self._pooling: int | None = None

    def recognises(self, path: Path) -> bool:
        """A file of that name."""
        return path.suffix.lower() == ".gguf" and path.is_file()

    def open(self, path: Path) -> Runner:
        """The file in llama.cpp.

        :raises ExecutionError: without xllamacpp, or when llama.cpp does not load it.
        """
        source = GgufSource(path)
        try:
            metadata, tokens = source.header.metadata, source.array("tokenizer.ggml.tokens")
        finally:
            source.close()
        architecture = metadata.get("general.architecture")
        pooling = metadata.get(f"{architecture}.pooling_type")
        self._pooling = pooling if isinstance(pooling, int) else None
        if not tokens:
            raise ExecutionError(
                f"{path}: has no vocabulary, without which llama.cpp does not run it",
                hint="write it with the tokenizer (--tokenizer auto)",
            )
        return LlamaCpp(path, embedding=self._pooling is not None, tokens=tokens)

    def reference(self, original: Source, finished: Source | None) -> Runner:
        """The original in torch, giving what llama.cpp gives."""
        return _AsLlamaCpp(reference(original, finished), self._pooling)

    def tolerance(self, finished: Source) -> float:
        """By whether llama.cpp rounds the inputs of products."""
        return INTEGERS if any(spec.encoding is not None for spec in finished.specs()) else FLOATS


class _AsLlamaCpp:
    """A model of transformers with the outputs of llama.cpp: log probabilities, or pooled embeddings."""

    def __init__(self, runner: Runner, pooling: int | None) -> None:
        self.runner, self.pooling = runner, pooling
        self.inputs, self.points, self.notes = runner.inputs, runner.points, runner.notes

    def __enter__(self) -> _AsLlamaCpp:
        self.runner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.runner.__exit__(*exc)

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        outputs = self.runner.run(batch, observe)
        wanted = LOGITS if self.pooling is None else "last_hidden_state"
        if wanted not in outputs:
            raise ExecutionError(f"the original gives {', '.join(outputs)}, and llama.cpp's counterpart is {wanted}")
        if self.pooling is None:
            return {LOG_PROBABILITIES: torch.log_softmax(outputs[LOGITS].float(), dim=-1)}
        hidden = outputs["last_hidden_state"].float()
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = torch.ones(hidden.shape[:2]) if mask is None else mask
        return {EMBEDDING: _pooled(hidden, mask.to(hidden.dtype), self.pooling)}


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: int) -> torch.Tensor:
    """``[samples, width]`` of ``[samples, length, width]``, padding left out."""
    if pooling == CLS:
        return hidden[:, 0]
    if pooling == LAST:
        return hidden[torch.arange(len(hidden)), mask.sum(1).long() - 1]
    if pooling == MEAN:
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    raise ExecutionError(f"pooling_type {pooling} of the file is none of 1 (mean), 2 (cls) and 3 (last)")

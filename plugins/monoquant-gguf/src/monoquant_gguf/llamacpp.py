"""GGUF files in llama.cpp, through the Python binding xllamacpp."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monoquant_core.errors import ExecutionError
from monoquant_core.runners import Batch, Input, Observe
from monoquant_core.runtimes import LOG_PROBABILITIES

POSITIONS = 8  #: the last so many positions of a sequence are evaluated, each by a request of its own
EMBEDDING = "embedding"
_WORD = re.compile("[A-Za-z]{2,}")


class LlamaCpp:
    """A GGUF file that llama.cpp has open.

    Attention runs without flash attention and with float32 keys and values: flash attention rounds to float16, which
    hides errors below 1e-3.

    :param tokens: its vocabulary.
    :raises ExecutionError: without xllamacpp, or when llama.cpp does not load the file.
    """

    inputs: Sequence[Input] = (Input("input_ids", "int64", (None, None)), Input("attention_mask", required=False))
    points: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __init__(self, path: Path, *, embedding: bool, tokens: Sequence[str], context: int = 512) -> None:
        try:
            import xllamacpp
        except ImportError as exc:
            raise ExecutionError(
                "llama.cpp: its Python binding is not installed", hint="pip install xllamacpp"
            ) from exc
        self.path, self.embedding, self.vocabulary = path, embedding, len(tokens)
        self.word = next((i for i, token in enumerate(tokens) if _WORD.fullmatch(token)), 0)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.verbosity = -1
        params.warmup = False
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.embedding = embedding
        params.embd_normalize = -1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as exc:
            raise ExecutionError(f"{path}: llama.cpp does not load it: {exc}") from exc
        # A server that is let go of before its thread has begun never ends: wait for a first answer.
        self.run({"input_ids": torch.tensor([[self.word]])})

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._server

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        """``log_probabilities`` ``[samples, positions, vocabulary]`` of the last positions, or ``embedding``
        ``[samples, width]``, pooled as the file says.

        :raises ExecutionError: in llama.cpp's words.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ExecutionError(f"{self.path}: llama.cpp takes input_ids")
        ids = batch["input_ids"]
        if ids.ndim != 2:
            raise ExecutionError(f"{self.path}: input_ids are [samples, length], got {list(ids.shape)}")
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        if self.embedding:
            return {EMBEDDING: self._embeddings(rows)}
        return {LOG_PROBABILITIES: torch.stack([self._sequence(row) for row in rows])}

    def _sequence(self, ids: Sequence[int]) -> torch.Tensor:
        first = max(1, len(ids) - POSITIONS + 1)
        return torch.stack([self._next(ids[:end]) for end in range(first, len(ids) + 1)])

    def _next(self, prompt: Sequence[int]) -> torch.Tensor:
        """Log probabilities of the token after the prompt."""
        # Scores come with the text that is generated, and there is none after end-of-text or half a character. So a
        # plain word is forced, which does not change the scores: they are those from before any bias.
        request = {"prompt": list(prompt), "n_predict": 1, "n_probs": self.vocabulary, "temperature": 0}
        answer = self._server.handle_completions({**request, "cache_prompt": True, "logit_bias": [[self.word, 1e4]]})
        found = torch.full((self.vocabulary,), -math.inf)
        for entry in self._field(answer, "choices")[0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def _embeddings(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        answer = self._server.handle_embeddings({"input": [list(row) for row in rows]})
        data = sorted(self._field(answer, "data"), key=lambda item: int(item["index"]))
        return torch.tensor([item["embedding"] for item in data], dtype=torch.float32)

    def _field(self, answer: Any, name: str) -> Any:
        if not isinstance(answer, Mapping) or name not in answer:
            raise ExecutionError(f"{self.path}: llama.cpp answers {str(answer)[:200]}")
        return answer[name]

"""What a checkpoint says of its tokenizer: tokenizer.json, its config and special tokens. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monoquant_core.containers.entries import parse_json, shown
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import PlanError, SourceError

MAX_FILE = 1 << 28  #: bytes of a tokenizer file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  #: llama.cpp's kinds of tokens, as sentencepiece's


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of a vocabulary."""

    text: str | bytes
    kind: int = NORMAL
    score: float = 0.0


class Files:
    """The tokenizer files of a checkpoint, read when they are asked for."""

    def __init__(self, name: str, paths: Mapping[str, Path]) -> None:
        self.name, self.paths = name, paths

    def bytes_of(self, name: str) -> bytes | None:
        """A file's bytes, if there is one.

        :raises SourceError: when it is too large.
        """
        if name not in self.paths:
            return None
        with FileReader(self.paths[name]) as reader:
            if reader.size > MAX_FILE:
                raise SourceError(f"{reader.path}: {reader.size} bytes are too many for a tokenizer")
            return reader.read(0, reader.size, name)

    def json_of(self, name: str) -> dict[str, Any]:
        """A JSON object, empty when there is no such file."""
        data = self.bytes_of(name)
        return {} if data is None else parse_json(data, str(self.paths[name]), strict=False)

    @functools.cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json; empty when there is none."""
        return self.json_of("tokenizer.json")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self.json_of("tokenizer_config.json")

    @functools.cached_property
    def special(self) -> dict[str, str]:
        """bos_token, eos_token, ... as text."""
        merged = {**self.json_of("special_tokens_map.json"), **self.config}
        found = {}
        for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            value = merged.get(f"{key}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
        return found

    @property
    def model(self) -> Mapping[str, Any]:
        """``model`` of tokenizer.json."""
        found = self.tokenizer.get("model")
        return found if isinstance(found, dict) else {}

    @functools.cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Tokens beside the model's own: id -> (text, whether it is special).

        :raises PlanError: for an entry that is not a token.
        """
        found: dict[int, tuple[str, bool]] = {}
        decoder = self.config.get("added_tokens_decoder")
        entries: list[Any] = []
        for key, value in decoder.items() if isinstance(decoder, dict) else ():
            usable = isinstance(value, dict) and key.isascii() and key.isdigit() and len(key) < 12
            entries.append({**value, "id": int(key)} if usable else value)
        listed = self.tokenizer.get("added_tokens")
        for entry in [*entries, *(listed if isinstance(listed, list) else [])]:
            index, text = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
            if type(index) is not int or not 0 <= index < 1 << 31 or not isinstance(text, str):
                raise PlanError(f"{self.name}: tokenizer: an added token that is none: {shown(entry)}")
            found[index] = (text, bool(entry.get("special")))
        return found

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Text -> id of tokenizer.json's model.

        :raises PlanError: when it is not that.
        """
        vocab = self.model.get("vocab")
        if not isinstance(vocab, dict) or any(type(v) is not int or not 0 <= v < 1 << 31 for v in vocab.values()):
            raise PlanError(f"{self.name}: tokenizer.json: the vocabulary is not a map of tokens to numbers")
        return vocab

    def steps(self, key: str, inner: str) -> list[Mapping[str, Any]]:
        """``normalizer`` or ``pre_tokenizer`` as a flat list of steps."""
        found = self.tokenizer.get(key)
        if not isinstance(found, dict):
            return []
        if found.get("type") == "Sequence":
            steps = found.get(inner)
            return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
        return [found]

    def template(self) -> list[str] | None:
        """What the post-processor puts around a text: token texts, and "" for the text; None if it has no say."""
        for step in self.steps("post_processor", "processors"):
            if step.get("type") == "TemplateProcessing" and isinstance(step.get("single"), list):
                tokens = [p.get("SpecialToken") for p in step["single"] if isinstance(p, dict)]
                return [str(t.get("id", "")) if isinstance(t, dict) else "" for t in tokens]
            if step.get("type") in ("BertProcessing", "RobertaProcessing"):
                return ["cls", "", "sep"]
        return None


def place(files: Files, tokens: Mapping[int, Token], count: int) -> list[Token]:
    """A vocabulary in order, with tokens that mean nothing where the model's embedding has more rows.

    :param count: rows of the embedding.
    :raises PlanError: when the tokenizer has tokens that the model does not have.
    """
    last = max(tokens, default=-1)
    if last >= count:
        raise PlanError(f"{files.name}: the tokenizer has token {last}, the model's embedding {count} rows")
    return [tokens.get(i) or Token(f"[PAD{i}]", UNUSED) for i in range(count)]

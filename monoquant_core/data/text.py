"""Samples from text, by the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from monoquant_core.containers.entries import shown
from monoquant_core.data import SEQUENCE, Data, DataOptions, Recipient, chosen
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.runners import Batch

MAX_BYTES = 1 << 25  #: of a file; what is beyond them is not read
FILE = "tokenizer.json"
_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"


def texts(path: Path, target: Recipient, options: DataOptions) -> Data:
    """Samples from a file of text.

    Of ``.txt`` windows of equal length are taken, of ``.jsonl`` the key ``text`` of each line. Samples of different
    lengths are never padded, as padding would be observed too: a batch has samples of one length.

    :raises CalibrationError: without a tokenizer, or the library that runs it.
    """
    tokenizer = _tokenizer(path, target, options)
    length = _length(tokenizer, target, options)
    read = _lines if path.suffix.lower() == ".jsonl" else _windows
    text, whole = _read(path)
    notes = () if whole else (f"{path}: only its first {MAX_BYTES >> 20} MiB are read",)
    names = [i.name for i in target.inputs if i.name != "**"]
    types = bool({_IDS, _TYPES} <= set(names))

    def batches() -> Iterator[Batch]:
        found = read(path, text, tokenizer, length, options)
        size = target.fixed_batch() or options.batch_size
        groups: dict[int, list[tuple[list[int], list[int]]]] = {}
        for ids, kinds in found:
            group = groups.setdefault(len(ids), [])
            group.append((ids, kinds))
            if len(group) == size:
                yield _batch(groups.pop(len(ids)), names, types)
        if target.fixed_batch() is None:
            for group in groups.values():
                yield _batch(group, names, types)

    return Data(str(path), batches, notes)


def _batch(samples: list[tuple[list[int], list[int]]], names: list[str], types: bool) -> Batch:
    ids = torch.tensor([s[0] for s in samples])
    if _IDS not in names:
        return {names[0]: ids} if names else ids
    batch = {_IDS: ids}
    if _MASK in names:
        batch[_MASK] = torch.ones_like(ids)
    if types:
        batch[_TYPES] = torch.tensor([s[1] for s in samples])
    return batch


def _windows(
    path: Path, text: str, tokenizer: Any, length: int, options: DataOptions
) -> Iterator[tuple[list[int], list[int]]]:
    """Windows of a text, each with the tokenizer's special tokens."""
    tokenizer.enable_truncation(max_length=length)
    whole = tokenizer.encode(text)
    windows = [e for e in (whole, *whole.overflowing) if len(e.ids) == length]
    if not windows:
        windows = [whole]
    for i in chosen(len(windows), options):
        yield windows[i].ids, windows[i].type_ids


def _lines(
    path: Path, text: str, tokenizer: Any, length: int, options: DataOptions
) -> Iterator[tuple[list[int], list[int]]]:
    """A sample of each line; which lines, the seed decides."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    tokenizer.enable_truncation(max_length=length)
    for i in chosen(len(lines), options):
        number, line = lines[i]
        encoded = tokenizer.encode(_text_of(path, number, line))
        if encoded.ids:
            yield encoded.ids, encoded.type_ids


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{path}: line {number}: not JSON: {shown(line[:80])}") from exc
    text = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        keys = f"it has {', '.join(map(shown, value))}" if isinstance(value, Mapping) else f"it is {shown(value)}"
        raise SourceError(f"{path}: line {number}: no text under the key 'text': {keys}")
    return text


def _read(path: Path) -> tuple[str, bool]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror}") from exc
    whole = len(data) <= MAX_BYTES
    if not whole:
        data = data[: data.rfind(b"\n", 0, MAX_BYTES) + 1 or MAX_BYTES]
    try:
        text = data.decode("utf-8", errors="strict" if whole else "ignore")
    except UnicodeDecodeError as exc:
        raise SourceError(f"{path}: not UTF-8: {exc.reason} at byte {exc.start}") from exc
    if not text.strip():
        raise CalibrationError(f"{path}: holds no text")
    return text, whole


def _tokenizer(path: Path, target: Recipient, options: DataOptions) -> Any:
    file = Path(options.tokenizer) if options.tokenizer else target.side_files.get(FILE)
    if file is not None and file.is_dir():
        file = file / FILE
    if file is None:
        raise CalibrationError(
            f"{path}: text needs a tokenizer, and {target.name} has no {FILE}",
            hint=f"--data-tokenizer names a {FILE}; or give token ids as an array",
        )
    if not file.is_file():
        raise SourceError(
            f"{file}: no such tokenizer", hint=f"--data-tokenizer names a {FILE}, or the folder that has one"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise CalibrationError(
            f"{path}: reading text needs the tokenizers library", hint="pip install tokenizers"
        ) from exc
    try:
        tokenizer: Any = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as exc:  # the library raises bare exceptions
        raise SourceError(f"{file}: not a tokenizer: {shown(' '.join(str(exc).split()))}") from exc
    return tokenizer


def _length(tokenizer: Any, target: Recipient, options: DataOptions) -> int:
    """Tokens of a sample: what was asked for, or the least of what tokenizer, model and custom allow."""
    own = (tokenizer.truncation or {}).get("max_length")
    known = (target.config or {}).get("max_position_embeddings")
    limits = [n for n in (own, known) if type(n) is int and n > 0]
    fixed = [i.shape[1] for i in target.inputs if i.shape and len(i.shape) == 2 and i.shape[1]]
    tokenizer.no_padding()
    if fixed:
        return int(fixed[0] or 0)
    return options.length or min([SEQUENCE, *limits])

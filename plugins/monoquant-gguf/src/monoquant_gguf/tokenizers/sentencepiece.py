"""SentencePiece's byte-pair encodings, from tokenizer.model or a tokenizer.json made of one. Imports no torch."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from monoquant_core.errors import PlanError, SourceError
from monoquant_gguf.metadata import Metadata
from monoquant_gguf.tokenizers.files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Files, Token

BPE = 2  #: TrainerSpec.ModelType
SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class PieceModel:
    """What tokenizer.model holds of interest (sentencepiece_model.proto)."""

    pieces: list[Token] = field(default_factory=list)
    kind: int = 1  #: 1 unigram, 2 BPE
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def parse(data: bytes, where: str) -> PieceModel:
    """Read tokenizer.model, a protocol buffer.

    :raises SourceError: when it is not one.
    """
    model = PieceModel()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                model.kind = next((int(v) for n, v in _fields(value) if n == 3 and isinstance(v, int)), 1)
            elif number == 3 and isinstance(value, bytes):
                flags = {n: bool(v) for n, v in _fields(value) if isinstance(v, int)}
                model.dummy_prefix, model.remove_extra_spaces = flags.get(3, True), flags.get(4, True)
    except (ValueError, IndexError, struct.error) as exc:
        raise SourceError(f"{where}: not a sentencepiece model: {exc}") from exc
    if not model.pieces:
        raise SourceError(f"{where}: not a sentencepiece model: no pieces in it")
    return model


def from_model(files: Files, model: PieceModel) -> dict[int, Token]:
    """The vocabulary of tokenizer.model with what was added to it.

    :raises PlanError: for a model that does not merge.
    """
    if model.kind != BPE:
        raise PlanError(f"{files.name}: tokenizer.model is no byte-pair encoding, which is what llama.cpp's 'llama' is")
    return _with_added(files, dict(enumerate(model.pieces)))


def from_json(files: Files) -> dict[int, Token]:
    """The vocabulary of a tokenizer.json that was made of a SentencePiece model.

    llama.cpp merges the pair with the best score; a tokenizer.json has an order of merges instead. The score of a
    token is therefore the negated index of the first merge that makes it.
    """
    vocab, unknown = files.vocabulary, files.model.get("unk_token")
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges(files)):
        scores.setdefault(pair[0] + pair[1], -float(rank))
    tokens = {}
    for text, index in vocab.items():
        kind = UNKNOWN if text == unknown else BYTE if _BYTE_TOKEN.fullmatch(text) else NORMAL
        tokens[index] = Token(text, kind, scores.get(text, 0.0))
    return _with_added(files, tokens)


def merges(files: Files) -> list[tuple[str, str]]:
    """The merges of tokenizer.json, best first, in either of its spellings.

    :raises PlanError: when they are not pairs.
    """
    found = files.model.get("merges")
    pairs = []
    for merge in found if isinstance(found, list) else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise PlanError(f"{files.name}: tokenizer.json: the merges are not pairs")
        pairs.append((pair[0], pair[1]))
    return pairs


def write(files: Files, model: PieceModel | None, out: Metadata) -> list[str]:
    """The pairs that only this kind of tokenizer has.

    :return: notes for the user.
    """
    out.text("tokenizer.ggml.model", "llama")
    out.text("tokenizer.ggml.pre", "default")
    out.flag("tokenizer.ggml.add_space_prefix", _space_prefix(files, model))
    if model is not None and not files.tokenizer:
        out.flag("tokenizer.ggml.remove_extra_whitespaces", model.remove_extra_spaces)
    steps = files.steps("pre_tokenizer", "pretokenizers")
    if any(step.get("type") == "Metaspace" for step in steps) and _space_prefix(files, model):
        return ["llama.cpp puts a space before texts that begin with one, too, which this tokenizer does not"]
    return []


def _space_prefix(files: Files, model: PieceModel | None) -> bool:
    """tokenizer.json is what transformers runs, so it has the last word."""
    if not files.tokenizer:
        return bool(files.config.get("add_prefix_space", model.dummy_prefix if model is not None else True))
    if any(step.get("type") == "Prepend" for step in files.steps("normalizer", "normalizers")):
        return True
    for step in files.steps("pre_tokenizer", "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False


def _with_added(files: Files, tokens: dict[int, Token]) -> dict[int, Token]:
    for index, (text, special) in files.added.items():
        known = tokens.get(index)
        if known is not None and known.kind == UNKNOWN:
            continue
        # The text of a user's token is compared with the escaped input.
        shown = text if special else text.replace(" ", SPACE)
        tokens[index] = Token(shown, CONTROL if special else USER_DEFINED, known.score if known is not None else 0.0)
    return tokens


def _piece(data: bytes) -> Token:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    return Token(text.decode(), kind, score)


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Fields of a protocol buffer: whole numbers, float32 and bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
        elif kind == 5:
            yield tag >> 3, float(struct.unpack_from("<f", data, at)[0])
            at += 4
        elif kind in (1, 2):
            length, at = (8, at) if kind == 1 else _varint(data, at)
            if at + length > len(data):
                raise ValueError("truncated")
            if kind == 2:
                yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")

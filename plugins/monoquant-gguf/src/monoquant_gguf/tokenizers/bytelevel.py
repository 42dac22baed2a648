"""Byte-level BPE: the pre-tokenizer is recognised from what tokenizer.json says it does. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from monoquant_core.containers.entries import shown
from monoquant_core.errors import PlanError
from monoquant_gguf.metadata import Metadata
from monoquant_gguf.tokenizers.files import CONTROL, USER_DEFINED, Files, Token
from monoquant_gguf.tokenizers.sentencepiece import merges

GPT2 = "byte-level, with GPT-2's pattern"
BYTES = "byte-level"
DIGITS = "digits one by one"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TITLE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_CL100K = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}{_REST}"

#: what happens before merging, and whether a whole word in the vocabulary needs no merges -> llama.cpp's name for it
KNOWN: dict[tuple[tuple[str, ...], bool | None], str] = {
    ((GPT2,), None): "gpt-2",
    ((DIGITS, GPT2), None): "smollm",
    ((_CL100K, BYTES), True): "llama-bpe",
    ((_CL100K, BYTES), False): "dbrx",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{_REST}", BYTES), None): "qwen2",
    ((rf"{_TITLE}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASHES}", BYTES), None): "gpt-4o",
    ((rf"{_TITLE}|{_UPPER}|\p{{N}}{_SLASHES}", BYTES), True): "tekken",
}


def is_byte_level(files: Files) -> bool:
    """Whether tokenizer.json is a byte-level BPE."""
    steps = [*files.steps("pre_tokenizer", "pretokenizers"), *files.steps("decoder", "decoders")]
    return files.model.get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def tokens(files: Files) -> dict[int, Token]:
    """The vocabulary."""
    found = {index: Token(text) for text, index in files.vocabulary.items()}
    for index, (text, special) in files.added.items():
        found[index] = Token(text, CONTROL if special else USER_DEFINED)
    return found


def write(files: Files, out: Metadata) -> list[str]:
    """The pairs that only this kind of tokenizer has.

    :return: notes for the user.
    :raises PlanError: for a pre-tokenizer or normalizer that llama.cpp does not have, naming the closest one.
    """
    out.text("tokenizer.ggml.model", "gpt2")
    out.text("tokenizer.ggml.pre", recognise(files))
    out.texts("tokenizer.ggml.merges", [f"{a} {b}" for a, b in merges(files)])
    kinds = [str(step.get("type")) for step in files.steps("normalizer", "normalizers")]
    if kinds == ["NFC"]:
        return ["llama.cpp does not normalize texts to NFC, as this tokenizer does: do it before"]
    if kinds:
        raise PlanError(f"{files.name}: tokenizer.json: normalizer {', '.join(kinds)}, which llama.cpp does not have")
    return []


def recognise(files: Files) -> str:
    """llama.cpp's name for what happens before merging.

    :raises PlanError: naming the closest one.
    """
    steps = tuple(_describe(step) for step in files.steps("pre_tokenizer", "pretokenizers"))
    whole_words = bool(files.model.get("ignore_merges"))
    for (known, wants), name in KNOWN.items():
        if steps == known and wants in (None, whole_words):
            return name
    spelled = {" then ".join(known): name for (known, _), name in KNOWN.items()}
    text = " then ".join(steps)
    close = difflib.get_close_matches(text, spelled, n=1, cutoff=0.3)
    nearest = f"; the closest is {spelled[close[0]]!r}: {shown(close[0])}" if close else ""
    raise PlanError(
        f"{files.name}: tokenizer.json: no pre-tokenizer of llama.cpp does {shown(text)}{nearest}",
        hint="--tokenizer none writes the model without a vocabulary",
    )


def _describe(step: Mapping[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return GPT2 if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    pattern = step.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and isinstance(regex := pattern.get("Regex"), str):
        behaviour = (step.get("behavior"), bool(step.get("invert")))
        if behaviour in (("Isolated", False), ("Removed", True)):  # the same when everything matches
            return regex
        return f"{regex} {behaviour[0]}"
    return str({k: v for k, v in step.items() if k != "trim_offsets"})

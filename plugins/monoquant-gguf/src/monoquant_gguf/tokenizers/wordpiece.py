"""WordPiece, as BERT has it. Imports no torch."""

from __future__ import annotations

from monoquant_core.errors import PlanError
from monoquant_gguf.metadata import Metadata
from monoquant_gguf.tokenizers.files import CONTROL, USER_DEFINED, Files, Token
from monoquant_gguf.tokenizers.sentencepiece import SPACE


def is_wordpiece(files: Files) -> bool:
    """Whether tokenizer.json, or vocab.txt without one, is WordPiece."""
    return files.model.get("type") == "WordPiece" or (not files.tokenizer and "vocab.txt" in files.paths)


def tokens(files: Files) -> dict[int, Token]:
    """The vocabulary as llama.cpp has it: a mark before words, none before what continues them.

    :raises PlanError: for another prefix than ``##``.
    """
    if files.tokenizer:
        vocab = files.vocabulary
        if (prefix := files.model.get("continuing_subword_prefix", "##")) != "##":
            raise PlanError(f"{files.name}: tokenizer.json: continuing_subword_prefix {prefix!r}; llama.cpp has '##'")
    else:
        lines = (files.bytes_of("vocab.txt") or b"").decode("utf-8", "replace").splitlines()
        vocab = {line: index for index, line in enumerate(lines)}
    special = dict.fromkeys(files.special.values(), True)
    special |= dict(files.added.values())
    found = {}
    for text, index in vocab.items():
        if special.get(text):
            found[index] = Token(text, CONTROL)
        else:
            marked = text[2:] if text.startswith("##") else SPACE + text
            found[index] = Token(marked, USER_DEFINED if text in special else 1)
    for index, (text, is_special) in files.added.items():
        found.setdefault(index, Token(text if is_special else SPACE + text, CONTROL if is_special else USER_DEFINED))
    return found


def write(files: Files, out: Metadata) -> None:
    """The pairs that only this kind of tokenizer has."""
    out.text("tokenizer.ggml.model", "bert")
    out.text("tokenizer.ggml.pre", "default")
    lower, strip = files.config.get("do_lower_case"), files.config.get("strip_accents")
    for step in files.steps("normalizer", "normalizers"):
        if step.get("type") == "BertNormalizer":
            lower, strip = step.get("lowercase", lower), step.get("strip_accents", strip)
    lower = True if lower is None else bool(lower)
    out.flag("tokenizer.ggml.normalizer.lowercase", lower)
    out.flag("tokenizer.ggml.normalizer.strip_accents", lower if strip is None else bool(strip))

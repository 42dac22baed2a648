"""tokenizer.json and tokenizer_config.json, made of what a GGUF file holds of a tokenizer. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monoquant_core.containers.entries import shown
from monoquant_core.errors import SourceError
from monoquant_gguf.tokenizers.bytelevel import BYTES, DIGITS, GPT2, KNOWN
from monoquant_gguf.tokenizers.files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from monoquant_gguf.tokenizers.sentencepiece import SPACE

MAX_PIECE = 256  #: characters of a token that is taken apart into merges

_WORDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}


class Unrestorable(Exception):
    """Why a tokenizer is not made again."""


@dataclass
class Stored:
    """The tokenizer of a GGUF file."""

    path: str
    metadata: Mapping[str, Any]
    array: Callable[[str], list[Any]]  #: reads an array; [] where there is none

    def __post_init__(self) -> None:
        self.tokens: list[str] = self.array("tokenizer.ggml.tokens")
        self.kinds: list[int] = self.array("tokenizer.ggml.token_type") or [NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise SourceError(f"{self.path}: tokenizer.ggml: {len(self.tokens)} tokens, {len(self.kinds)} kinds")
        if not all(isinstance(t, str) for t in self.tokens) or not all(type(k) is int for k in self.kinds):
            raise SourceError(f"{self.path}: tokenizer.ggml: tokens are texts, and their kinds numbers")

    def flag(self, key: str, default: bool) -> bool:
        """``tokenizer.ggml.{key}``."""
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def special(self, key: str) -> str | None:
        """The text of a special token."""
        index = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return self.tokens[index] if type(index) is int and 0 <= index < len(self.tokens) else None


def restore(stored: Stored) -> dict[str, bytes]:
    """The files, by name.

    :raises Unrestorable: for a kind of tokenizer that is not made again.
    """
    kind = stored.metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}
    if kind not in makers or not stored.tokens:
        raise Unrestorable(f"a tokenizer of llama.cpp's kind {shown(kind)}")
    words = {ours: text for theirs, ours in _WORDS.items() if (text := stored.special(theirs)) is not None}
    if kind == "bert":
        words["cls"] = words.pop("bos", "[CLS]")
        words.pop("eos", None)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, stored, kind) for i, k in enumerate(stored.kinds) if k in _ADDED],
        **makers[kind](stored),
    }
    config: dict[str, Any] = {f"{key}_token": text for key, text in words.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    longest = stored.metadata.get(f"{stored.metadata.get('general.architecture')}.context_length")
    if type(longest) is int:
        config["model_max_length"] = longest
    if isinstance(template := stored.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {"tokenizer.json": _json(content), "tokenizer_config.json": _json(config)}


_ADDED = (CONTROL, USER_DEFINED, UNKNOWN)


def _json(content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as exc:
        raise Unrestorable("a tokenizer with tokens that are no text") from exc


def _added(index: int, stored: Stored, kind: str) -> dict[str, Any]:
    special = stored.kinds[index] != USER_DEFINED
    text = stored.tokens[index]
    if not special and kind == "llama":
        text = text.replace(SPACE, " ")
    if not special and kind == "bert":
        text = text.removeprefix(SPACE)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _vocabulary(stored: Stored, spell: Callable[[str, int], str]) -> dict[str, int]:
    """Without the tokens that only fill an embedding."""
    return {
        spell(text, kind): index
        for index, (text, kind) in enumerate(zip(stored.tokens, stored.kinds, strict=True))
        if kind != UNUSED
    }


def _around(before: str | None, after: str | None, stored: Stored) -> dict[str, Any] | None:
    """What puts special tokens around texts."""
    if before is None and after is None:
        return None
    token = {"SpecialToken": {"id": "", "type_id": 0}}
    texts = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]

    def marked(text: dict[str, Any], kind: int) -> list[Any]:
        first, last = ({"SpecialToken": {"id": t, "type_id": kind}} if t else token for t in (before, after))
        return [part for part in (first, text, last) if part is not token]

    second = marked(texts[1], 1) if after is None else marked(texts[1], 1)[before is not None :]
    names = [name for name in (before, after) if name is not None]
    return {
        "type": "TemplateProcessing",
        "single": marked(texts[0], 0),
        "pair": [*marked(texts[0], 0), *second],
        "special_tokens": {n: {"id": n, "ids": [stored.tokens.index(n)], "tokens": [n]} for n in names},
    }


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **more,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }


def _byte_level(stored: Stored) -> dict[str, Any]:
    name = stored.metadata.get("tokenizer.ggml.pre")
    known = next((key for key, value in KNOWN.items() if value == name), None)
    if known is None:
        raise Unrestorable(f"a pre-tokenizer of llama.cpp's name {shown(name)}")
    steps = [_step(step) for step in known[0]]
    merges = [str(text).split(" ", 1) for text in stored.array("tokenizer.ggml.merges")]
    vocab = _vocabulary(stored, lambda text, _: text)
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys() for pair in merges):
        raise SourceError(f"{stored.path}: tokenizer.ggml.merges are not pairs of tokens")
    return {
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _ends(stored, bos=False),
        "decoder": _step(GPT2),
        "model": _bpe(vocab, merges, ignore_merges=bool(known[1])),
    }


def _step(step: str) -> dict[str, Any]:
    """Inverse of how ``bytelevel`` describes it."""
    if step in (GPT2, BYTES):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": step == GPT2}
    if step == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _ends(stored: Stored, *, bos: bool) -> dict[str, Any] | None:
    before = stored.special("bos") if stored.flag("add_bos_token", bos) else None
    return _around(before, stored.special("eos") if stored.flag("add_eos_token", False) else None, stored)


def _sentencepiece(stored: Stored) -> dict[str, Any]:
    """Scores become ranks of merges: a token is made of any two that there are, the better its score the earlier."""
    scores = stored.array("tokenizer.ggml.scores")
    if len(scores) != len(stored.tokens) or not all(isinstance(s, float) for s in scores):
        raise SourceError(f"{stored.path}: tokenizer.ggml: {len(stored.tokens)} tokens, {len(scores)} scores")
    vocab = _vocabulary(stored, lambda text, kind: text.replace(SPACE, " ") if kind == USER_DEFINED else text)
    pieces = {text: i for i, text in enumerate(stored.tokens) if stored.kinds[i] == NORMAL}
    ranked: list[tuple[float, int, int, int]] = []
    texts: list[tuple[str, str]] = []
    for text, index in pieces.items():
        for cut in range(1, min(len(text), MAX_PIECE)):
            left, right = pieces.get(text[:cut]), pieces.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, len(texts)))
                texts.append((text[:cut], text[cut:]))
    prefix = [{"type": "Prepend", "prepend": SPACE}] if stored.flag("add_space_prefix", True) else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    unknown = next((t for t, k in zip(stored.tokens, stored.kinds, strict=True) if k == UNKNOWN), None)
    model = _bpe(vocab, [texts[i] for *_, i in sorted(ranked)], unk_token=unknown, fuse_unk=True)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": _ends(stored, bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"byte_fallback": BYTE in stored.kinds},
    }


def _wordpiece(stored: Stored) -> dict[str, Any]:
    def spelled(text: str, kind: int) -> str:
        if kind in (CONTROL, UNKNOWN):
            return text
        return text.removeprefix(SPACE) if text.startswith(SPACE) else f"##{text}"

    lower = stored.flag("normalizer.lowercase", True)
    cls, sep = (stored.special(key) for key in ("bos", "seperator"))
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": stored.flag("normalizer.strip_accents", lower),
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _around(
            cls if stored.flag("add_bos_token", True) else None,
            sep if stored.flag("add_sep_token", True) else None,
            stored,
        ),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": stored.special("unknown") or "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": _vocabulary(stored, spelled),
        },
    }

"""Tokenizers as llama.cpp wants them. Imports no torch."""

from __future__ import annotations

from typing import Any

from monoquant_core.errors import PlanError
from monoquant_gguf.architectures.base import Model
from monoquant_gguf.metadata import Metadata
from monoquant_gguf.tokenizers import bytelevel, sentencepiece, wordpiece
from monoquant_gguf.tokenizers.files import Files, Token, place

#: key of llama.cpp -> special tokens of transformers, the first that there is
_IDS = {
    "bos": ("bos",),
    "eos": ("eos",),
    "unknown": ("unk",),
    "seperator": ("sep",),
    "padding": ("pad",),
    "mask": ("mask",),
}


def write(model: Model, count: int, out: Metadata) -> list[str]:
    """The vocabulary, its special tokens and the chat template.

    :param count: rows of the embedding.
    :return: notes for the user.
    :raises PlanError: when there is no tokenizer, or none that llama.cpp has.
    """
    files = Files(model.info.name, model.files)
    notes: list[str] = []
    if wordpiece.is_wordpiece(files):
        found = wordpiece.tokens(files)
        wordpiece.write(files, out)
        notes.append("llama.cpp's WordPiece drops the vowels of Korean where accents are stripped")
        if files.tokenizer and files.template() is None:
            notes.append("llama.cpp puts [CLS] and [SEP] around texts, which this tokenizer does not")
    elif bytelevel.is_byte_level(files):
        found = bytelevel.tokens(files)
        notes += bytelevel.write(files, out)
    elif (data := files.bytes_of("tokenizer.model")) is not None:
        pieces = sentencepiece.parse(data, str(model.files["tokenizer.model"]))
        found = sentencepiece.from_model(files, pieces)
        notes += sentencepiece.write(files, pieces, out)
    elif files.model.get("type") == "BPE" and files.model.get("byte_fallback"):
        found = sentencepiece.from_json(files)
        notes += sentencepiece.write(files, None, out)
    elif files.tokenizer:
        raise PlanError(
            f"{files.name}: tokenizer.json: a {files.model.get('type')} tokenizer, which llama.cpp does not have here",
            hint="--tokenizer none writes the model without a vocabulary",
        )
    else:
        raise PlanError(
            f"{files.name}: no tokenizer.json, tokenizer.model or vocab.txt beside the weights",
            hint="--tokenizer none writes the model without a vocabulary",
        )
    _write(model, files, place(files, found, count), out)
    return notes


def write_none(count: int, arch: str, out: Metadata) -> None:
    """A model without a vocabulary, for callers that have token numbers."""
    out.text("tokenizer.ggml.model", "no_vocab")
    out.u32(f"{arch}.vocab_size", count)


def _write(model: Model, files: Files, tokens: list[Token], out: Metadata) -> None:
    out.texts("tokenizer.ggml.tokens", [t.text for t in tokens])
    if out.pairs["tokenizer.ggml.model"][1] == "llama":
        out.f32s("tokenizer.ggml.scores", [t.score for t in tokens])
    out.i32s("tokenizer.ggml.token_type", [t.kind for t in tokens])
    numbers = {t.text: i for i, t in reversed(list(enumerate(tokens)))}
    special = dict(files.special)
    if "bos" not in special and "cls" in special:
        special["bos"] = special["cls"]
    if "eos" not in special and "sep" in special:
        special["eos"] = special["sep"]
    ids: dict[str, int] = {}
    for key, words in _IDS.items():
        index = next((numbers[special[w]] for w in words if special.get(w) in numbers), None)
        index = _from_config(model, key, len(tokens)) if index is None else index
        if index is not None:
            ids[key] = index
            out.u32(f"tokenizer.ggml.{key}_token_id", index)
    before, after = _around(files)
    out.flag("tokenizer.ggml.add_bos_token", before)
    out.flag("tokenizer.ggml.add_eos_token", after and out.pairs["tokenizer.ggml.model"][1] != "bert")
    if out.pairs["tokenizer.ggml.model"][1] == "bert":
        out.flag("tokenizer.ggml.add_sep_token", after)
    _chat_template(files, out)


def _from_config(model: Model, key: str, count: int) -> int | None:
    value: Any = model.get({"padding": "pad", "unknown": "unk"}.get(key, key) + "_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < count else None


def _around(files: Files) -> tuple[bool, bool]:
    """Whether a token is put before a text, and after it."""
    template = files.template()
    if template is not None:
        text = template.index("") if "" in template else len(template)
        return text > 0, text + 1 < len(template)
    default = not files.tokenizer  # a SentencePiece model alone says nothing: transformers adds bos
    return bool(files.config.get("add_bos_token", default)), bool(files.config.get("add_eos_token", False))


def _chat_template(files: Files, out: Metadata) -> None:
    template = files.config.get("chat_template")
    if (data := files.bytes_of("chat_template.jinja")) is not None:
        template = data.decode("utf-8", "replace")
    if isinstance(template, str):
        out.text("tokenizer.chat_template", template)
    elif isinstance(template, list):
        named = {str(t.get("name")): str(t.get("template")) for t in template if isinstance(t, dict)}
        out.text("tokenizer.chat_template", named.pop("default", ""))
        for name, text in named.items():
            out.text(f"tokenizer.chat_template.{name}", text)
        out.texts("tokenizer.chat_templates", list(named))

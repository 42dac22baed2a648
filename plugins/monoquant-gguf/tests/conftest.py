"""llama.cpp, which nobody here wrote, and the command as users run it."""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def llamacpp() -> ModuleType:
    """Its functions: ``Model``, ``logits``, ``embed``, ``perplexity``, ``quantize``, ``dequantize``."""
    pytest.importorskip("xllamacpp")
    spec = importlib.util.spec_from_file_location("llamacpp", Path(__file__).with_name("llamacpp.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as exc:
        pytest.skip(str(exc))
    return module


@pytest.fixture(scope="session")
def corpus() -> str:
    """Code and prose of Python itself."""
    code = [Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in MODULES]  # type: ignore
    return "".join(code)[:200_000] + "\n".join(pydoc_data.topics.topics.values())[:200_000]


MODULES = ("argparse", "typing", "html.entities", "encodings.aliases", "decimal", "locale", "textwrap")


@pytest.fixture(scope="session")
def spm_like(corpus: str) -> Callable[[str], Any]:
    """``spm_like(prefix)``: what transformers makes of a SentencePiece model: byte fallback, spaces as a mark.

    The prefix is what puts the mark before a text: "prepend", "metaspace" or "none".
    """
    tokenizers = pytest.importorskip("tokenizers")

    def make(prefix: str) -> Any:
        made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
            max_token_length=12,
            show_progress=False,
        )
        made.normalizer = normalizers.Replace(" ", "\u2581")
        words = [word for line in corpus[:100_000].splitlines() for word in re.split(r"(?= )", line)]
        made.train_from_iterator(words, trainer)
        content = json.loads(made.to_str())
        # Byte tokens are not special: trained as such, they would be cut out of texts.
        content["added_tokens"] = content["added_tokens"][:3]
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
        if prefix == "prepend":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        elif prefix == "metaspace":
            made.normalizer = None
            made.pre_tokenizer = pre.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
        return made

    return make


@pytest.fixture(scope="session")
def small_llama(spm_like: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, saved as transformers does, and a SentencePiece tokenizer in both its forms."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("small") / "llama"
    tokenizer = spm_like("prepend")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
        initializer_range=0.03,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    around = tokenizer_module().processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = around
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(json.loads(tokenizer.to_str())))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(shared: Path) -> Path:
    """A small trained model with a genuine SentencePiece tokenizer."""
    return shared / "models" / "tiny-llama"


def tokenizer_module() -> Any:
    """The tokenizers library."""
    return pytest.importorskip("tokenizers")


def sentencepiece_model(content: dict[str, Any]) -> bytes:
    """The same vocabulary as a tokenizer.model (sentencepiece_model.proto): scores order the merges."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(content["model"]["merges"]):
        scores.setdefault(left + right, -float(rank))
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}

    def field(number: int, data: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(data)) + data

    def varint(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    pieces = b""
    for text in sorted(content["model"]["vocab"], key=content["model"]["vocab"].get):
        kind = kinds.get(text, 6 if text.startswith("<0x") else 1)
        score = b"\x15" + struct.pack("<f", scores.get(text, 0.0))
        pieces += field(1, field(1, text.encode()) + score + b"\x18" + varint(kind))
    return pieces + field(2, b"\x18\x02") + field(3, b"\x18\x01\x20\x00")  # BPE; a mark before texts, spaces kept


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("plan", path)``: the command's exit status, stdout and stderr."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "monoquant_core.cli", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=120
        )

    return call

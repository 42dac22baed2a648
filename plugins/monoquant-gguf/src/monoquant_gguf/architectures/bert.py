"""BERT and the embedding models that are BERT: MiniLM, bge, e5."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from monoquant_core.containers.entries import parse_json
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import PlanError, SourceError
from monoquant_gguf.architectures.base import Architecture, Model, common, common_config, for_layers, only
from monoquant_gguf.architectures.keys import Keys
from monoquant_gguf.metadata import Metadata

MEAN, CLS, LAST = 1, 2, 3  #: llama.cpp's pooling types
_FLAGS = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": CLS, "pooling_mode_lasttoken": LAST}
_MODES = {"mean": MEAN, "cls": CLS, "lasttoken": LAST, "last": LAST}


class Bert(Architecture):
    """BERT as an encoder."""

    name = "bert"
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    prefixes = ("bert.",)
    restored = "BertModel"
    root = ""
    tokenizer = "bert"
    rotary = False
    names: ClassVar[Mapping[str, str]] = {
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        **dict(
            for_layers(
                {
                    "attention.self.query": "attn_q",
                    "attention.self.key": "attn_k",
                    "attention.self.value": "attn_v",
                    "attention.output.dense": "attn_output",
                    "attention.output.LayerNorm": "attn_output_norm",
                    "intermediate.dense": "ffn_up",
                    "output.dense": "ffn_down",
                    "output.LayerNorm": "layer_output_norm",
                },
                source="encoder.layer.{}.",
            )
        ),
    }
    dropped: ClassVar[Mapping[str, str]] = {
        r"(^|\.)pooler\.": "llama.cpp pools without it",
        r"embeddings\.position_ids$": "the numbers from 0 on",
        r"^cls\.(predictions|seq_relationship)": "a head for pre-training",
    }

    def target(self, name: str) -> str | tuple[str, int] | None:
        """Old checkpoints say gamma and beta."""
        stem, _, leaf = name.rpartition(".")
        return super().target(f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }")

    def config(self, keys: Keys) -> dict[str, Any]:
        """Of the encoder; how it pools is not said in config.json."""
        keys.get("attention.causal")
        keys.get("pooling_type")
        types = keys.shapes.get("token_types.weight", (2,))[0]
        return common_config(keys, rotary=False) | {
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "type_vocab_size": types,
        }

    def check(self, model: Model) -> None:
        """llama.cpp's bert has absolute positions and the exact gelu."""
        only(model, self.name, "hidden_act", "gelu")
        only(model, self.name, "position_embedding_type", "absolute")

    def hyperparameters(self, model: Model, out: Metadata) -> None:
        """Not causal, and pooled as sentence-transformers says."""
        common(self.name, model, out, rotary=False)
        out.flag("bert.attention.causal", False)
        pooling, _ = read_pooling(model)
        if pooling is not None:
            out.u32("bert.pooling_type", pooling)
        out.u32("tokenizer.ggml.token_type_count", model.get("type_vocab_size", default=2))

    def notes(self, model: Model) -> Sequence[str]:
        """What sentence-transformers would do beside."""
        return read_pooling(model)[1]


def read_pooling(model: Model) -> tuple[int | None, list[str]]:
    """How a sentence-transformers folder pools, and what of its modules GGUF does not hold.

    :raises PlanError: for a pooling that llama.cpp does not have.
    """
    notes: list[str] = []
    if "modules.json" not in model.files:
        return None, notes
    pooling: int | None = None
    for module in _json(model.files["modules.json"]):
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            pooling = _pooling(model, f"{module.get('path')}/config.json")
        elif kind == "Normalize":
            notes.append("GGUF does not hold sentence-transformers' Normalize: ask llama.cpp for normalized embeddings")
        elif kind not in ("Transformer", ""):
            raise PlanError(f"{model.info.name}: modules.json: {kind} after the encoder, which llama.cpp does not have")
    limit = _limit(model)
    longest = model.get("max_position_embeddings")
    if limit is not None and isinstance(longest, int) and limit < longest:
        notes.append(
            f"GGUF does not hold sentence-transformers' limit of {limit} tokens: llama.cpp takes up to {longest}, "
            "and longer texts embed differently"
        )
    return pooling, notes


def _pooling(model: Model, path: str) -> int:
    if path not in model.files:
        raise PlanError(f"{model.info.name}: modules.json names {path}, which is not there")
    config = _json(model.files[path])
    if not isinstance(config, dict):
        raise PlanError(f"{model.files[path]}: a JSON object expected")
    mode = config.get("pooling_mode")
    wanted = [value for key, value in _FLAGS.items() if config.get(key) is True]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(mode, str) and mode in _MODES:
        return _MODES[mode]
    if mode is None and len(wanted) == len(others) == 1:
        return wanted[0]
    raise PlanError(
        f"{model.files[path]}: pooling {mode or ', '.join(others) or 'none'}: llama.cpp has mean, cls and last"
    )


def _limit(model: Model) -> int | None:
    path = model.files.get("sentence_bert_config.json")
    config = _json(path) if path is not None else {}
    value = config.get("max_seq_length") if isinstance(config, dict) else None
    return value if type(value) is int else None


def _json(path: Path) -> Any:
    """A small JSON file: an object or a list."""
    with FileReader(path) as reader:
        if reader.size > 1 << 20:
            raise SourceError(f"{path}: {reader.size} bytes are too many")
        data = reader.read(0, reader.size, path.name)
    if data.lstrip().startswith(b"["):
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise SourceError(f"{path}: not valid JSON: {exc}") from exc
    return parse_json(data, str(path), strict=False)

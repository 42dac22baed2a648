"""Weights and checkpoints to measure on: made up, the same every time, with the heavy tails of trained weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

POOL = (1 << 24) + 43  # elements that tensors are cut from; odd, so that they do not begin alike
SHARD = 500_000_000  # bytes
NAME = "model.layers.0.mlp.up_proj.weight"  #: of a single matrix
VOCABULARY = 1024  # small: embeddings are copied, and what this measures is quantizing


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """float32 of Student's t with 5 degrees of freedom, times 0.02."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(shape)
    for _ in range(5):
        squares.addcmul_(x := torch.randn(shape, generator=generator), x, value=0.2)
    return torch.randn(shape, generator=generator).div_(squares.sqrt_()).mul_(0.02)


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int = VOCABULARY

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor, by name."""
        hidden, ffn = self.hidden, self.ffn
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for i in range(self.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"model.layers.{i}.self_attn.{name}.weight", (hidden, hidden)
            yield f"model.layers.{i}.mlp.gate_proj.weight", (ffn, hidden)
            yield f"model.layers.{i}.mlp.up_proj.weight", (ffn, hidden)
            yield f"model.layers.{i}.mlp.down_proj.weight", (hidden, ffn)
            yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
            yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }


def geometry(gigabytes: float) -> Geometry:
    """The Llama whose bf16 checkpoint comes nearest to a size, with matrices as large as such models have."""
    hidden, ffn = (4096, 11008) if gigabytes > 4 else (2048, 5632) if gigabytes > 0.5 else (256, 768)
    layer = 2 * (4 * hidden * hidden + 3 * hidden * ffn)
    return Geometry(hidden, ffn, max(1, round(gigabytes * 1e9 / layer)))


def write_checkpoint(folder: Path, model: Geometry) -> int:
    """Write a sharded bf16 checkpoint and return its bytes, all files.

    :raises RuntimeError: when the disk has no room for it and a copy of it.
    """
    folder.mkdir(parents=True)
    shapes = dict(model.shapes())
    expected = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 2.2 * expected:
        raise RuntimeError(f"{folder}: {free / 1e9:.1f} GB free, {2.2 * expected / 1e9:.1f} GB needed; pass --temp")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + nbytes > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    pool = _pool()
    start = 0
    index: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        tensors = {}
        for name in names:
            tensors[name] = _cut(pool, start, shapes[name])
            start = (start + tensors[name].numel()) % POOL
        path = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / path, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, path))
    weight_map = {"metadata": {"total_size": expected}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    (folder / "config.json").write_text(json.dumps(model.config))
    return sum(file.stat().st_size for file in folder.iterdir())


@functools.cache
def _pool() -> torch.Tensor:
    return heavy_tailed((POOL,)).to(torch.bfloat16)


def _cut(pool: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the pool's elements from ``start`` on, round and round."""
    out = torch.empty(shape, dtype=pool.dtype)
    flat = out.view(-1)
    done = 0
    while done < flat.numel():
        piece = pool[start : start + flat.numel() - done]
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
        start = 0
    return out

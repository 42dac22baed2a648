"""safetensors files as plans: headers, shards, their index, and what lies beside them. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monoquant_core.containers.safetensors import DTYPES, data_offsets, header_bytes
from monoquant_core.errors import UnsupportedEncodingError
from monoquant_core.exporters import FileLayout, FilePlan, PartAt, Placed, Refuses
from monoquant_core.model import ModelInfo

CONFIG = "config.json"

#: torch's names of what safetensors files hold
HELD_DTYPES = frozenset(DTYPES.values())

Metadata = Callable[[Sequence[Placed]], Mapping[str, str]]


def unsupported_dtype(dtype: str) -> Refuses:
    """The verdict on a dtype that safetensors has no name for."""
    return Refuses(f"safetensors has no dtype {dtype}", hint="convert the tensor in the source, or drop it there")


def tensor_files(layout: FileLayout, stem: str, max_shard: int, metadata: Metadata) -> list[FilePlan]:
    """``stem.safetensors``, or shards and their index where one file would hold more than ``max_shard`` bytes.

    The parts of one output stay together. Shards are filled in the order of names, numbers as numbers: which file a
    tensor lies in must not depend on the order in which a source lists them.

    :raises UnsupportedEncodingError: when two tensors would get one name.
    """
    _check_names(layout)
    outputs = layout.outputs
    shards = _shards(sorted(outputs, key=lambda placed: _natural(placed.output.name)), max_shard)
    if len(shards) == 1:
        return [tensor_file(f"{stem}.safetensors", shards[0], metadata(shards[0]))]
    paths = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    named = list(zip(paths, shards, strict=True))
    index = {
        "metadata": {"total_size": sum(map(_nbytes, outputs))},
        "weight_map": {part.name: path for path, shard in named for placed in shard for part in placed.parts},
    }
    files = [tensor_file(path, shard, metadata(shard)) for path, shard in named]
    return [*files, json_file(f"{stem}.safetensors.index.json", index)]


def tensor_file(path: str, outputs: Sequence[Placed], metadata: Mapping[str, str]) -> FilePlan:
    """One safetensors file, in the order of the safetensors library. The same outputs give the same bytes."""
    owners = {part.name: (placed.output.name, part) for placed in outputs for part in placed.parts}
    entries = {name: (part.dtype, part.shape) for name, (_, part) in owners.items()}
    prefix = header_bytes(entries, metadata)
    parts = tuple(
        PartAt(owners[name][0], name, len(prefix) + begin, end - begin)
        for name, (begin, end) in data_offsets(entries).items()
    )
    return FilePlan(path, prefix, parts)


def json_file(path: str, content: Mapping[str, Any]) -> FilePlan:
    """A JSON file, keys in the order given."""
    return FilePlan(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def side_files(info: ModelInfo) -> list[FilePlan]:
    """What lies beside the tensors of the source: tokenizer, generation config, chat template."""
    return [FilePlan(name, content) for name, content in info.made_files.items()] + [
        FilePlan(name, copy_of=path, copy_nbytes=path.stat().st_size)
        for name, path in info.side_files.items()
        if name != CONFIG
    ]


def _check_names(layout: FileLayout) -> None:
    owners: dict[str, Placed] = {}
    for placed in layout.outputs:
        for part in placed.parts:
            other = owners.setdefault(part.name, placed)
            if other is not placed:
                first, second = other.output.name, placed.output.name
                encoded = first if other.held.encoding is not None else second
                raise UnsupportedEncodingError(
                    f"{layout.info.name}: {second}: would be stored as {part.name!r}, and so would a part of {first}",
                    hint=f"rename one of them, or leave the other as it is: --keep '{encoded}'",
                )


def _shards(outputs: Sequence[Placed], max_shard: int) -> list[list[Placed]]:
    shards: list[list[Placed]] = [[]]
    size = 0
    for placed in outputs:
        if shards[-1] and size + _nbytes(placed) > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(placed)
        size += _nbytes(placed)
    return shards


def _nbytes(placed: Placed) -> int:
    return sum(part.nbytes for part in placed.parts)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in re.split(r"(\d+)", name)]

"""Model folders: which files hold weights, which go along with them, and that none of them lies outside.

A folder is untrusted: names in it are data, links may lead out of it, and nothing in it is ever imported. Imports no
torch.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from monoquant_core.containers.entries import MAX_HEADER, check_name, parse_json, shown, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import SourceError

MAX_CONFIG = 1 << 26  #: bytes of config.json

#: what a model needs beside its weights and config.json: tokenizers, processors, templates, pooling
SIDE_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model"),
    *("sentencepiece*.model", "generation_config.json", "chat_template*", "*.jinja", "*processor_config.json"),
    *("normalizer.json", "*.spm", "*.tiktoken"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)

#: the same for folders in the folder: those of sentence-transformers (1_Pooling, 2_Dense), and more templates
SIDE_FOLDERS = {
    re.compile(r"\d+_\w+"): ("config.json", "model.safetensors", "pytorch_model.bin"),
    re.compile(r"additional_chat_templates"): ("*.jinja",),
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of a folder that hold its weights."""

    files: tuple[Path, ...]
    index: Path | None  #: what names them, when there are shards
    weight_map: dict[str, str] | None  #: tensor -> file name, from the index


def find_weights(folder: Path) -> Weights:
    """The weights, as transformers looks for them: safetensors before pickles, one file before shards.

    :raises SourceError: when there are none, several to choose from, or they lie outside the folder.
    """
    names = sorted(name for name in _listing(folder) if not name.startswith("."))
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if stem + suffix in names:
            return Weights((inside(folder, stem + suffix),), None, None)
        indices = [name for name in names if name.endswith(f"{suffix}.index.json")]
        usual = f"{stem}{suffix}.index.json"
        if len(indices) > 1 and usual not in indices:
            raise SourceError(f"{folder}: several shard indices: {', '.join(indices)}")
        if indices:
            return _shards(folder, inside(folder, usual if usual in indices else indices[0]), suffix)
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return Weights((inside(folder, files[0]),), None, None)
    if files:
        raise SourceError(
            f"{folder}: {len(files)} .safetensors files and no index that says which belong together",
            hint=f"give one of them: {', '.join(files[:4])}",
        )
    candidates = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    raise SourceError(
        f"{folder}: an empty folder" if not names else f"{folder}: no weights in this folder",
        hint=f"give the file itself: {', '.join(candidates[:4])}"
        if candidates
        else "expected: model.safetensors, *.safetensors with an index, or pytorch_model.bin",
    )


def check_shards(weights: Weights, found: Iterable[tuple[Path, Iterable[str]]]) -> list[str]:
    """Compare the index with what the shards contain.

    :param found: each shard with the names of its tensors.
    :return: notes: tensors that the index does not name are read all the same.
    :raises SourceError: for a tensor that is missing, in another shard than the index says, or in two.
    """
    where: dict[str, Path] = {}
    for path, names in found:
        for name in names:
            if name in where:
                raise SourceError(f"{tensor_at(path, name)}: also in {where[name].name}")
            where[name] = path
    for name, file in (weights.weight_map or {}).items():
        if name not in where:
            raise SourceError(f"{tensor_at(weights.index or '', name)}: {shown(file)} does not contain it")
        if where[name].name != file:
            raise SourceError(f"{tensor_at(weights.index or '', name)}: in {where[name].name}, not in {shown(file)}")
    if weights.weight_map is None or len(where) == len(weights.weight_map):
        return []
    unnamed = [name for name in where if name not in (weights.weight_map or {})]
    more = f" and {len(unnamed) - 8} more" if len(unnamed) > 8 else ""
    return [f"{weights.index}: does not name {', '.join(unnamed[:8])}{more}, which the shards contain: read too"]


def unread_weights(folder: Path, weights: Weights) -> list[str]:
    """A note on files that look like weights and are not those that are read."""
    used = {path.name for path in weights.files}
    suffixes = (".safetensors", ".bin") if weights.files[0].suffix == ".bin" else (".safetensors",)
    others = sorted(
        name for name in _listing(folder) if name.endswith(suffixes) and name not in used and not name.startswith(".")
    )
    return [f"{folder}: not read: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}"] if others else []


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json, if there is one.

    :raises SourceError: when it is not a JSON object, too large, or outside the folder.
    """
    return (
        read_json(inside(folder, "config.json"), MAX_CONFIG, strict=False) if _exists(folder, "config.json") else None
    )


def side_files(folder: Path) -> dict[str, Path]:
    """Files that belong to the model and hold none of its weights, by their path in the folder.

    :raises SourceError: for a link that leads out of the folder.
    """
    found: dict[str, Path] = {}
    for name in sorted(_listing(folder)):
        if _matches(name, SIDE_FILES):
            found.update(_file(folder, name))
        patterns = next((files for pattern, files in SIDE_FOLDERS.items() if pattern.fullmatch(name)), ())
        if patterns and inside(folder, name).is_dir():
            for file in sorted(_listing(folder / name)):
                if _matches(file, patterns):
                    found.update(_file(folder, f"{name}/{file}"))
    return found


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, if it is there and really lies in it.

    Links may only lead to other files of the folder or, as the hub's cache lays out snapshots, to its blobs.

    :raises SourceError: otherwise.
    """
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: a link to itself
        raise SourceError(f"{path}: missing, or a link to nothing") from exc
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise SourceError(f"{path}: a link that leaves the model folder", hint="copy the file into the folder")
    return path


def read_json(path: Path, limit: int, *, strict: bool = True) -> dict[str, Any]:
    """A JSON object from a file.

    :raises SourceError: when it is larger than ``limit`` bytes, or something else.
    """
    with FileReader(path) as reader:
        if reader.size > limit:
            raise SourceError(f"{path}: {reader.size} bytes, at most {limit} are read")
        return parse_json(reader.read(0, reader.size, "JSON"), str(path), strict=strict)


def _blobs(root: Path) -> Iterator[Path]:
    """Where the hub's cache keeps files of a snapshot: ``snapshots/<revision>/[...]`` links to ``blobs/`` beside it."""
    for parent in root.parents:
        if parent.name == "snapshots":
            yield parent.parent / "blobs"
            return


def _shards(folder: Path, index: Path, suffix: str) -> Weights:
    weight_map = read_json(index, MAX_HEADER).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: it has no weight_map")
    for name, file in weight_map.items():
        where = tensor_at(index, check_name(index, name))
        if not isinstance(file, str) or not _is_basename(file):
            raise SourceError(f"{where}: its shard {shown(file)} is not the name of a file in the folder")
        if not file.endswith(suffix):
            raise SourceError(f"{where}: its shard {shown(file)} is not a {suffix} file")
    return Weights(tuple(inside(folder, file) for file in sorted(set(weight_map.values()))), index, weight_map)


def _is_basename(file: str) -> bool:
    """Whether a name is the last part of a path on every system, and nothing else."""
    return file not in ("", ".", "..") and PureWindowsPath(file).name == file and file.isprintable()


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as exc:
        raise SourceError(f"{folder}: cannot be listed: {exc.strerror}") from exc


def _exists(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _file(folder: Path, name: str) -> dict[str, Path]:
    if not _exists(folder, name):
        return {}
    path = inside(folder, name)
    return {name: path} if path.is_file() else {}

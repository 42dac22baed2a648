"""Samples from arrays in files: rows of ``.npy``, ``.npz``, ``.safetensors`` and ``.pt``. Pickles are never run.

Only the rows that are taken are kept; what a header claims is compared with the file before anything is allocated.
"""

from __future__ import annotations

import ast
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from monoquant_core.containers.entries import shown
from monoquant_core.data import Data, DataOptions, Recipient, chosen, in_batches, preprocessor
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.module_runner import describe_inputs
from monoquant_core.runners import Batch

MAX_NPY_HEADER = 1 << 16
RATIO = 1040  #: deflate makes nothing smaller by more
AT_ONCE = 1 << 22

#: name -> how many rows it has, and what reads some of them, in their order
Arrays = Mapping[str, tuple[int, Callable[[list[int]], torch.Tensor]]]


def arrays(path: Path, key: str, target: Recipient, options: DataOptions) -> Data:
    """Samples from a file of arrays, in an order that the seed decides."""
    suffix = path.suffix.lower()
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    found = (readers.get(suffix) or _torch)(path)
    prepare = preprocessor(options)
    names, notes = _names(path, found, key, target)
    totals = {source: found[source][0] for source in names}
    if len(set(totals.values())) > 1:
        text = ", ".join(f"{name} has {count}" for name, count in totals.items())
        raise CalibrationError(f"{path}: its arrays have different numbers of samples: {text}")
    total = next(iter(totals.values()))
    if not total:
        raise CalibrationError(f"{path}: holds no samples")

    def batches() -> Iterator[Batch]:
        index = chosen(total, options)
        values = {names[source]: _take(found[source][1], index) for source in names}
        for part in in_batches(values, target, options):
            beside = {name: part.pop(name) for name in target.extra if name in part}
            batch = part if prepare is None else _prepared(prepare, part)
            if beside:
                batch = batch if isinstance(batch, Mapping) else {_first(target): batch}
            yield {**batch, **beside} if isinstance(batch, Mapping) else batch

    return Data(str(path), batches, notes)


def _names(path: Path, found: Arrays, key: str, target: Recipient) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which arrays are read, and the input that each is for; and what is left out."""
    inputs = [i.name for i in target.inputs if i.name != "**"]
    first = _first(target)
    beside = {name: name for name in target.extra if name in found and name != key}
    if key:
        if key not in found:
            raise CalibrationError(f"{path}: has no array {key!r}", hint=f"it has {', '.join(found)}")
        return {key: key if key in inputs else first, **beside}, ()
    matching = {name: name for name in found if name in inputs or name in beside}
    if len(matching) > len(beside):
        left = [name for name in found if name not in matching]
        return matching, (f"{path}: not read, no inputs of the model: {', '.join(left)}",) if left else ()
    others = [name for name in found if name not in beside]
    if len(others) == 1:
        return {others[0]: first, **beside}, ()
    raise CalibrationError(
        f"{path}: none of its arrays is an input of {target.name}: {', '.join(found) or 'it has none'}",
        hint=f"inputs: {describe_inputs(target.inputs)}; name one array for the first of them: {path}:KEY",
    )


def _first(target: Recipient) -> str:
    """The name of the model's first input."""
    return next((i.name for i in target.inputs if i.name != "**"), "0")


def _take(read: Callable[[list[int]], torch.Tensor], index: list[int]) -> torch.Tensor:
    """Rows in the order of ``index``, read in the order of the file."""
    ordered = sorted(range(len(index)), key=lambda i: index[i])
    rows = read([index[i] for i in ordered])
    back = torch.empty(len(index), dtype=torch.long)
    back[torch.tensor(ordered)] = torch.arange(len(index))
    return rows[back]


def _prepared(prepare: Callable[[Any], Any], batch: Mapping[str, torch.Tensor]) -> Batch:
    """What the user's function makes of a batch: of the array itself, where there is one."""
    if len(batch) == 1:
        ((name, value),) = batch.items()
        made = prepare(value)
        return {name: made} if isinstance(made, torch.Tensor) and name != "0" else _checked(made)
    return _checked(prepare(dict(batch)))


def _checked(made: Any) -> Batch:
    if not isinstance(made, torch.Tensor | tuple | Mapping):
        raise CalibrationError(f"--preprocess gives a {type(made).__name__}; a tensor, a tuple or a dict is wanted")
    return made


def _npz(path: Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise SourceError(f"{path}: not an .npz file: {shown(str(exc))}") from exc
    found = {}
    for info in infos:
        if info.filename.endswith(".npy"):
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise SourceError(f"{path}: array {shown(name)} occurs twice")
            found[name] = _npy_in(path, name, info)
    return found


def _npy(path: Path) -> Arrays:
    return {"0": _npy_in(path, "", None)}


def _npy_in(path: Path, name: str, info: zipfile.ZipInfo | None) -> tuple[int, Callable[[list[int]], torch.Tensor]]:
    """An array in numpy's format, read as a stream: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""
    where = f"{path}: array {shown(name)}" if name else str(path)
    with _open(path, info, where) as stream:
        dtype, shape, fortran, start = _npy_header(stream, where)
    size = path.stat().st_size if info is None else info.file_size
    stored = path.stat().st_size if info is None else info.compress_size
    if math.prod(shape) * dtype.itemsize != size - start or size > RATIO * max(stored, 1024):
        raise SourceError(f"{where}: its header says {dtype}{list(shape)}, and it has {size - start} bytes")
    if not shape:
        raise SourceError(f"{where}: a single number, and samples are rows of an array")
    if fortran and len(shape) > 1:
        raise SourceError(f"{where}: is stored column by column", hint="save numpy.ascontiguousarray(x)")
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(index: list[int]) -> torch.Tensor:
        out = np.empty((len(index), *shape[1:]), dtype)
        view, at = memoryview(out.reshape(-1).view(np.uint8).data), 0
        with _open(path, info, where) as stream:
            _skip(stream, start, where)
            for place, i in enumerate(index):
                _skip(stream, (i - at) * row, where)
                _fill(stream, view[place * row : (place + 1) * row], where)
                at = i + 1
        if not dtype.isnative:
            out = out.astype(dtype.newbyteorder("="))
        try:
            return torch.from_numpy(out)
        except TypeError as exc:
            raise SourceError(f"{where}: holds {dtype}, of which torch has no tensors") from exc

    return shape[0], read


def _npy_header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, order and where the data begins."""
    magic = stream.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise SourceError(f"{where}: not an array in numpy's format")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > MAX_NPY_HEADER:
        raise SourceError(f"{where}: a header of {length} bytes")
    text = stream.read(length)
    try:
        header = ast.literal_eval(text.decode("latin-1").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        dtype = np.dtype(descr)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as exc:
        raise SourceError(f"{where}: a damaged header: {shown(text[:80])}") from exc
    if dtype.hasobject:
        raise SourceError(f"{where}: holds Python objects as a pickle, which may run code", hint="save plain numbers")
    if dtype.kind not in "biufc":
        raise SourceError(f"{where}: holds {dtype}, and numbers are wanted")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > 32:
        raise SourceError(f"{where}: an impossible shape {shown(shape)}")
    return dtype, shape, bool(fortran), 8 + width + length


def _open(path: Path, info: zipfile.ZipInfo | None, where: str) -> Any:
    try:
        if info is None:
            return path.open("rb")
        return zipfile.ZipFile(path).open(info)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as exc:
        raise SourceError(f"{where}: cannot be read: {shown(str(exc))}") from exc


def _skip(stream: IO[bytes], count: int, where: str) -> None:
    if not count:
        return
    if isinstance(stream, zipfile.ZipExtFile):
        while count > 0:
            count -= len(_chunk(stream, min(count, AT_ONCE), where))
    else:
        stream.seek(count, 1)


def _fill(stream: IO[bytes], view: memoryview, where: str) -> None:
    while len(view):
        data = _chunk(stream, min(len(view), AT_ONCE), where)
        view[: len(data)] = data
        view = view[len(data) :]


def _chunk(stream: IO[bytes], count: int, where: str) -> bytes:
    try:
        data = stream.read(count)
    except (OSError, zipfile.BadZipFile, zipfile.error, EOFError, RuntimeError) as exc:
        raise SourceError(f"{where}: damaged: {shown(str(exc))}") from exc
    if not data:
        raise SourceError(f"{where}: ends too early")
    return data


def _safetensors(path: Path) -> Arrays:
    from monoquant_core.rows import row_count
    from monoquant_core.sources import SafetensorsSource

    source = SafetensorsSource(path)
    specs = {spec.name: spec for spec in source.specs()}
    source.close()

    def reader(name: str) -> Callable[[list[int]], torch.Tensor]:
        def read(index: list[int]) -> torch.Tensor:
            shape = specs[name].shape
            rows = row_count(shape[1:]) if len(shape) > 1 else 0
            opened = SafetensorsSource(path)
            try:
                if not rows:  # numbers: the last axis is the only one
                    return opened.read(name, range(1))[torch.tensor(index)].clone()
                taken = [opened.read(name, range(i * rows, (i + 1) * rows)).reshape(1, *shape[1:]) for i in index]
                return torch.cat(taken)
            finally:
                opened.close()

        return read

    return {n: (s.shape[0], reader(n)) for n, s in specs.items() if s.shape and s.numel}


def _torch(path: Path) -> Arrays:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch's reader fails in many ways
        if "weights_only" in str(exc) or "Unsupported" in str(exc):
            raise SourceError(
                f"{path}: holds more than tensors: a pickle, which may run code",
                hint="save a tensor, or a dict of tensors by input name, with torch.save",
            ) from exc
        raise SourceError(f"{path}: torch cannot read it: {shown(' '.join(str(exc).split()))}") from exc
    if isinstance(saved, torch.Tensor):
        saved = {"0": saved}
    if isinstance(saved, tuple | list):
        saved = {str(i): value for i, value in enumerate(saved)}
    tensors = {str(k): v for k, v in saved.items() if isinstance(v, torch.Tensor)} if isinstance(saved, dict) else {}
    tensors = {k: v for k, v in tensors.items() if v.ndim and v.layout == torch.strided and not v.is_quantized}
    if not tensors:
        raise SourceError(f"{path}: holds no tensors with samples, but a {type(saved).__name__}")
    return {name: (len(value), _indexer(value)) for name, value in tensors.items()}


def _indexer(value: torch.Tensor) -> Callable[[list[int]], torch.Tensor]:
    return lambda index: value[torch.tensor(index)]

"""Files of torch.save, read by torch's weights-only unpickler, so nothing in them runs.

The unpickler is the one behind ``torch.load(weights_only=True)``. It is driven here with storages on the meta device,
which gives every tensor's record, shape and strides without reading one; the tensors are then read from the zip at
the records' offsets. ``torch.load`` under FakeTensorMode gives the same, a second later, and cannot say which
tensor it stopped at.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import _weights_only_unpickler as weights_only

from monoquant_core.containers.archive import MAGIC, Archive
from monoquant_core.containers.entries import TensorEntry, shown, strided_entry, tensor_at
from monoquant_core.containers.in_memory import check_plain, find_state
from monoquant_core.containers.reader import FileReader, looks_like
from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS
from monoquant_core.tensor import dtype_name

_SAFE = "2.10"  #: fixes CVE-2026-24747: a checkpoint could corrupt memory through the weights-only unpickler
MAX_PICKLE = 1 << 30  #: bytes of a checkpoint's structure
_HINT = "save model.state_dict() instead; if you trust who made the file, --unsafe-pickle runs the code in it"
_REFUSED: dict[Any, str] = {
    torch._utils._rebuild_qtensor: "is quantized by torch",
    torch._utils._rebuild_nested_tensor: "is a nested tensor",
    torch._utils._rebuild_wrapper_subclass: "is a tensor subclass",
}


@dataclass
class Checkpoint:
    """What a file of torch.save contains."""

    entries: dict[str, TensorEntry] = field(default_factory=dict)  #: read from the file when wanted
    tied: dict[str, str] = field(default_factory=dict)  #: name -> first name of the same storage
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  #: of files that are loaded whole
    module: torch.nn.Module | None = None  #: what an unsafe pickle may be
    notes: list[str] = field(default_factory=list)


def read_checkpoint(reader: FileReader, *, unsafe_pickle: bool = False) -> Checkpoint:
    """Find the weights of a ``.pt`` file.

    :param unsafe_pickle: run the code of a file that has some, instead of refusing it.
    :raises SourceError: when the file is damaged, carries code, or holds no weights.
    """
    path = str(reader.path)
    if torch.__version__ < _SAFE:  # a TorchVersion: compares as versions do
        raise SourceError(
            f"{path}: torch {torch.__version__} can be made to run code by files that it should only read weights from",
            hint="install torch 2.10 or later, or give a safetensors file",
        )
    zipped = reader.read(0, min(4, reader.size)) == MAGIC
    try:
        if zipped:
            return _read_zip(Archive(reader))
        saved = _load_legacy(reader)
    except _CodeError as exc:
        if not unsafe_pickle:
            raise
        saved = _load_unsafe(reader, exc)
        notes = [f"{path}: loaded whole with --unsafe-pickle; code in it has run"]
    else:
        notes = [f"{path}: written before torch 1.6: loaded whole, so memory grows with its size"]
    if isinstance(saved, torch.nn.Module):
        return Checkpoint(module=saved, notes=notes)
    tensors, more = find_state(path, saved)
    for name, tensor in tensors.items():
        check_plain(path, name, tensor)
    return Checkpoint(tensors=tensors, notes=notes + more)


class _CodeError(SourceError):
    """A pickle that wants more than weights."""


def _read_zip(archive: Archive) -> Checkpoint:
    path = archive.reader.path
    if "constants.pkl" in archive:
        raise SourceError(f"{path}: a TorchScript archive, which is a program", hint="save model.state_dict() instead")
    if "archive_format" in archive or "serialized_exported_program.json" in archive:
        raise SourceError(f"{path}: an archive of torch.export", hint="give it the suffix .pt2")
    if "data.pkl" not in archive:
        raise SourceError(f"{path}: a zip archive that torch.save did not write: it has no data.pkl")
    archive.check_byte_order()
    unpickler = _Unpickler(archive)
    tensors, notes = find_state(str(path), unpickler.structure())
    checkpoint = Checkpoint(notes=notes)
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        entry = unpickler.entry(name, tensor)
        checkpoint.entries[name] = entry
        if entry.nbytes:
            key = (entry.offset, entry.shape, entry.strides, entry.dtype, entry.lazy)
            if (original := first.setdefault(key, name)) != name:
                checkpoint.tied[name] = original
    return checkpoint


class _Unpickler(weights_only.Unpickler):
    """torch's weights-only unpickler over ``data.pkl``, with meta storages that remember their records."""

    def __init__(self, archive: Archive) -> None:
        super().__init__(io.BytesIO(archive.read("data.pkl", MAX_PICKLE)), encoding="utf-8")
        self.archive = archive
        self.path = archive.reader.path
        self._storages: dict[str, Any] = {}
        self._records: dict[int, str] = {}  # identity of a meta storage -> its record

    def structure(self) -> object:
        """What was saved, of meta tensors."""
        try:
            return _guarded(self.path, self.load)
        except SourceError as exc:
            if isinstance(exc, _CodeError) or (name := self._current()) is None:
                raise
            function = self.stack[-1] if self.stack else None
            reason = _REFUSED.get(function) if callable(function) else None
            message = reason or str(exc).removeprefix(f"{self.path}: ")
            hint = "save plain tensors" if reason else exc.hint
            raise SourceError(f"{tensor_at(self.path, name)}: {message}", hint=hint) from exc

    def _current(self) -> str | None:
        """Key of the entry being unpickled: the last string that waits on the stack."""
        waiting = [item for part in (*self.metastack, self.stack) for item in part]
        return next((item for item in reversed(waiting) if isinstance(item, str)), None)

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a tensor is a view of."""
        _, kind, key, _, numel = pid
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError(f"impossible storage {shown(pid)}")
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._storages:
            _, size = self.archive.place(f"data/{key}")
            nbytes = numel * dtype.itemsize
            if nbytes != size:
                raise SourceError(f"{self.path}: record 'data/{key}' has {size} bytes, the checkpoint says {nbytes}")
            meta: Any = torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()
            self._records[meta._cdata] = f"data/{key}"
            self._storages[key] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=meta, dtype=dtype, _internal=True
            )
        return self._storages[key]

    def entry(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        """The place of a tensor in the file."""
        where = tensor_at(self.path, name)
        strided = tensor.layout == torch.strided
        record = self._records.get(tensor.untyped_storage()._cdata) if strided else None
        if record is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            check_plain(str(self.path), name, tensor)
            raise SourceError(f"{where}: its values are not in the file")
        dtype = dtype_name(tensor.dtype)
        if dtype not in DTYPE_BITS:
            raise SourceError(f"{where}: dtype {dtype} is not supported")
        lazy: Literal["", "conj", "neg"] = "conj" if tensor.is_conj() else "neg" if tensor.is_neg() else ""
        return strided_entry(
            where,
            dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            (self.path, *self.archive.place(record)),
            file_size=self.archive.reader.size,
            lazy=lazy,
        )


def _load_legacy(reader: FileReader) -> object:
    head = reader.read(0, min(2, reader.size))
    if head != b"\x80\x02":  # torch.save has always begun with a pickle of protocol 2
        raise SourceError(f"{reader.path}: not a file of torch.save", hint=looks_like(reader))
    path = reader.path
    loaded = _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=False))
    reader.check("checkpoint")
    return loaded


def _load_unsafe(reader: FileReader, refused: SourceError) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: object = torch.load(reader.path, map_location="cpu", weights_only=False, mmap=False)
    except Exception as exc:  # noqa: BLE001 - the file's own code may fail in any way
        raise SourceError(f"{reader.path}: cannot be loaded with --unsafe-pickle either: {_line(exc)}") from refused
    reader.check("checkpoint")
    return loaded


def _guarded(path: Path, load: Callable[[], object]) -> object:
    """Load, and turn everything that a damaged or hostile pickle can raise into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and sparse tensors; what matters is refused
            return load()
    except SourceError:
        raise
    except Exception as exc:
        if found := re.search(r"GLOBAL (\S+)", str(exc)):
            message = f"{path}: its pickle calls {found[1]}, which weights do not need"
            raise _CodeError(message, hint=_HINT) from exc
        if isinstance(exc, pickle.UnpicklingError):
            raise _CodeError(f"{path}: its pickle is not only weights: {_line(exc)}", hint=_HINT) from exc
        raise SourceError(f"{path}: damaged, or not a file of torch.save: {_line(exc)}") from exc
    finally:
        torch._utils._sparse_tensors_to_validate.clear()  # left behind by sparse tensors, for the next torch.load


def _line(exc: Exception) -> str:
    """An exception on one line, without the advice that torch gives."""
    text = str(exc).partition("WeightsUnpickler error:")[2] or str(exc)
    return f"{type(exc).__name__}: {' '.join(text.split())[:200]}"

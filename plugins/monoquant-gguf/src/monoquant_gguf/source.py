"""GGUF files as sources: tensors under their own names, quantized ones with their encoding. Imports torch on reading.

Names stay those of the file (``blk.0.attn_q.weight``), and the metadata go into ``ModelInfo.metadata`` as text. For
formats that are model folders, ``checkpoint.py`` turns both back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core import rows as r
from monoquant_core.containers.entries import shown, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.declarations import NoOptions
from monoquant_core.errors import SourceError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_gguf.container import Header, LongArray, TensorInfo, read_array, read_header

if TYPE_CHECKING:
    import torch

    from monoquant_core.plugins import Registry
    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import QuantizedTensor
    from monoquant_gguf.checkpoint import CheckpointSource

VERSION_KEY = "GGUF.version"  #: in ``ModelInfo.metadata``, beside the file's own keys

#: names of llama.cpp -> kinds of the core
_KINDS = (
    (re.compile(r"(^|\.)(token_embd|token_types)\.weight$"), "embedding"),
    (re.compile(r"(^|\.)position_embd\.weight$"), "position"),
    (re.compile(r"_norm\.weight$|(^|\.)rope_f\w+\.weight$"), "norm"),
    (re.compile(r"\.ffn_gate_inp\.weight$"), "router"),
    (re.compile(r"_exps\.weight$"), "experts"),
    (re.compile(r"^output\.weight$"), "head"),
    (re.compile(r"\.bias$"), "bias"),
)
_FUSED = re.compile(r"^(blk\.\d+)\.(attn_[qkv]|ffn_(?:gate|up))\.weight$")


class GgufReader:
    """Opens GGUF files."""

    def __init__(self, options: NoOptions) -> None:
        self._registry: Registry | None = None

    def use(self, registry: Registry) -> None:
        """Whose plugins bring architectures."""
        self._registry = registry

    def recognises(self, path: Path) -> bool:
        """A file of that name is opened even without the magic, so that the error says what is wrong with it."""
        return path.is_file()

    def open(self, path: Path) -> GgufSource:
        """Read the header."""
        return GgufSource(path, self._registry)


class GgufSource:
    """A GGUF file.

    :raises SourceError: naming the file and the tensor or key that is wrong.
    """

    def __init__(self, path: Path, registry: Registry | None = None) -> None:
        self._registry = registry
        self._reader = FileReader(path)
        try:
            self.header: Header = read_header(self._reader)
            if not self.header.tensors:
                raise SourceError(f"{path}: holds no tensors")
        except BaseException:
            self._reader.close()
            raise
        metadata = {VERSION_KEY: str(self.header.version)}
        metadata.update((key, _text(value)) for key, value in self.header.metadata.items())
        self.info = ModelInfo(str(path), paths=(path,), metadata=metadata)
        self._specs: list[TensorSpec] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file so far."""
        return self._reader.bytes_read

    def fingerprint(self) -> str:
        """Tells the file, as it was when it was opened."""
        return self._reader.fingerprint

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order of the file."""
        if self._specs is None:
            specs = [_spec(info) for info in self.header.tensors.values()]
            self._specs = [dataclasses.replace(s, kind=_kind(s), fuse=_fuse(s)) for s in specs]
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor as one chunk of its rank.

        :raises SourceError: when there is no such tensor, its file has changed, or its scales are not finite.
        """
        if name not in self.header.tensors:
            raise SourceError(f"{tensor_at(self.info.name, name)}: there is none of this name")
        from monoquant_core.check import Mismatch, check_params
        from monoquant_core.tensor import QuantizedTensor, dtype_of
        from monoquant_gguf.blocks import unpack

        info = self.header.tensors[name]
        raw = self._raw(info, rows, scratch)
        shape = r.chunk_shape(info.shape, rows)
        if info.layout is None or info.layout.encoding is None:
            return raw.view(dtype_of(info.dtype)).view(shape)
        tensor = unpack(raw.view(len(rows), -1) if len(rows) else raw.view(0, 0), info.layout, shape)
        assert isinstance(tensor, QuantizedTensor)
        try:
            check_params(tensor)
        except Mismatch as exc:
            raise SourceError(f"{tensor_at(self.info.name, name)}: {exc.reason}") from exc
        return tensor

    def checkpoint(self) -> CheckpointSource | None:
        """The same model under the names of its checkpoint, with a config.json, where its architecture is known.

        :raises SourceError: naming the pair or the tensor that a checkpoint has no place for.
        """
        from monoquant_gguf.checkpoint import checkpoint

        try:
            return checkpoint(self, self._registry)
        except SourceError as exc:
            raise SourceError(str(exc), hint=exc.hint or "--convention generic keeps llama.cpp's names") from exc

    def array(self, key: str) -> list[Any]:
        """An array of the metadata, [] where there is none."""
        value = self.header.metadata.get(key, [])
        return read_array(self._reader, value) if isinstance(value, list | LongArray) else []

    def bytes_of(self, info: TensorInfo) -> bytes:
        """A whole tensor as it is stored."""
        return self._reader.read(info.offset, info.nbytes, tensor_at("", info.name).removeprefix(": "))

    def vector(self, name: str) -> list[float]:
        """A vector of float32.

        :raises SourceError: when it is not that.
        """
        from monoquant_gguf.checkpoint import read_vector

        return read_vector(self, name)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def _raw(self, info: TensorInfo, rows: range, scratch: Scratch | None) -> torch.Tensor:
        import torch

        row_bytes = info.nbytes // max(1, r.row_count(info.shape))
        nbytes = len(rows) * row_bytes
        if scratch is None:
            data = torch.empty(nbytes, dtype=torch.uint8)
        else:
            data = scratch.take("gguf.source", (nbytes,), torch.uint8)
        where = tensor_at("", info.name).removeprefix(": ")
        self._reader.read_into(data.numpy().data, info.offset + rows.start * row_bytes, where)
        return data


def _spec(info: TensorInfo) -> TensorSpec:
    layout = info.layout
    encoding = layout.encoding_for(len(info.shape)) if layout is not None and layout.encoding is not None else None
    if encoding is not None and not info.shape:  # cannot be: blocks have more than one element
        raise SourceError(f"{info.name}: a quantized scalar")
    return TensorSpec(info.name, info.shape, info.dtype, encoding, nbytes_stored=info.nbytes)


def _kind(spec: TensorSpec) -> str:
    found = next((kind for pattern, kind in _KINDS if pattern.search(spec.name)), "")
    return found or ("linear" if len(spec.shape) == 2 else "vector" if len(spec.shape) < 2 else "")


def _fuse(spec: TensorSpec) -> str | None:
    found = _FUSED.match(spec.name)
    return f"{found[1]}.{'qkv' if 'attn' in found[2] else 'gate_up'}" if found else None


def _text(value: Any) -> str:
    if isinstance(value, LongArray):
        return f"[{value.count} items]"
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else shown(value)

"""A GGUF file as the checkpoint that it was made of: its names, its order of rows, its config.json.

Formats that are model folders ask for it (``Source.checkpoint``). What was permuted, stacked, transposed or offset on
the way into GGUF is undone; codes stay what they are. Imports torch on reading.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monoquant_core import kinds
from monoquant_core import rows as r
from monoquant_core.containers.entries import shown, tensor_at
from monoquant_core.encoding import Encoding
from monoquant_core.errors import SourceError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.reencode import lift
from monoquant_gguf.architectures import of_plugins
from monoquant_gguf.architectures.base import Architecture, Change, Model
from monoquant_gguf.architectures.keys import Keys
from monoquant_gguf.tokenizers.restore import Stored, Unrestorable, restore

if TYPE_CHECKING:
    import torch

    from monoquant_core.plugins import Registry
    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import ParamValue, QuantizedTensor
    from monoquant_gguf.source import GgufSource

#: tensors that are computed from config.json, which they become again
_COMPUTED = re.compile(r"^rope_(freqs|factors_(long|short))\.weight$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
MAX_VECTOR = 1 << 16  #: elements of a vector that goes into config.json


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint lies in the GGUF file."""

    stored: str
    first: int = 0  #: row of the stored tensor: experts of a stack follow one another
    change: Change | None = None  #: what happened to it on the way
    transposed: bool = False


class CheckpointSource:
    """The view.

    :raises SourceError: naming the pair or the tensor that a checkpoint has no place for.
    """

    def __init__(self, source: GgufSource, architecture: Architecture, keys: Keys) -> None:
        self._source = source
        config = {
            "architectures": [architecture.restored],
            "model_type": architecture.model_types[0],
            **architecture.config(keys),
            **_vocabulary(source, keys),
            "torch_dtype": _dtype(source.specs()),
        }
        notes = list(_notes(source, keys))
        try:
            files = restore(Stored(source.info.name, source.header.metadata, source.array))
        except Unrestorable as exc:
            files = {}
            notes.append(f"no tokenizer is written: {exc} is not made again; take the original model's files")
        self.info = ModelInfo(
            source.info.name, config=config, made_files=files, paths=source.info.paths, notes=tuple(notes)
        )
        model = Model(self.info, {})
        self._places: dict[str, Place] = {}
        specs: list[TensorSpec] = []
        for stored in source.specs():
            if _COMPUTED.search(stored.name):
                continue
            for spec, place in _original(stored, architecture, model, config["torch_dtype"]):
                self._places[spec.name] = place
                specs.append(spec)
        self._specs = kinds.annotate(specs, self.info)
        self._shapes = {spec.name: spec.shape for spec in specs}
        blocks = {int(found[1]) for spec in source.specs() if (found := _BLOCK.match(spec.name))}
        if blocks != set(range(model.layers if len(blocks) < 1 << 16 else 0)):
            raise SourceError(
                f"{self.info.name}: {model.layers} blocks expected, the tensors are those of {len(blocks)}"
            )

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file so far."""
        return self._source.bytes_read

    def fingerprint(self) -> str:
        """Tells the file, as it was when it was opened."""
        return self._source.fingerprint()

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order of the file."""
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor as one chunk of its rank.

        :raises SourceError: as the file's own.
        """
        if name not in self._places:
            raise SourceError(f"{tensor_at(self.info.name, name)}: there is none of this name")
        place, shape = self._places[name], self._shapes[name]
        change, count = place.change, r.row_count(shape)
        quantum = count if place.transposed or (change and change.undo) else 1
        if change is not None and change.rows is not None:
            quantum = change.rows.quantum
        window = range(rows.start // quantum * quantum, min(count, -(-rows.stop // quantum) * quantum))
        if place.transposed:
            value = _transposed(self._source.read(place.stored, range(shape[-1]), scratch))
        else:
            stored = range(place.first + window.start, place.first + window.stop)
            value = _shaped(self._source.read(place.stored, stored, scratch), r.chunk_shape(shape, window))
        if change is not None and change.undo is not None:
            assert not _is_quantized(value)
            value = change.undo(value)  # type: ignore[arg-type]
        if change is not None and change.rows is not None:
            from monoquant_core.gather import permuted

            value = permuted(value, change.rows.inverse)
        if window == rows:
            return value
        return _slice(value, rows.start - window.start, rows.stop - window.start)

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def checkpoint(source: GgufSource, registry: Registry | None = None) -> CheckpointSource | None:
    """The view of a file of an architecture that can be turned back, else None."""
    from monoquant_gguf.architectures import BUILT_IN

    name = source.header.metadata.get("general.architecture")
    if not isinstance(name, str):
        return None
    keys = Keys(
        source.info.name, name, source.header.metadata, {s.name: s.shape for s in source.specs()}, source.vector
    )
    for kind in (*BUILT_IN, *of_plugins(registry)):
        if kind.name == name and kind.restored and (architecture := kind()).is_of(keys):
            return CheckpointSource(source, architecture, keys)
    return None


def _original(
    stored: TensorSpec, architecture: Architecture, model: Model, dtype: str
) -> Iterator[tuple[TensorSpec, Place]]:
    """What one tensor of the file was in the checkpoint: one, or as many experts."""
    name = architecture.original(stored.name)
    if name is None:
        raise SourceError(
            f"{tensor_at(model.info.name, stored.name)}: no place in transformers' {architecture.restored}"
        )
    if stored.encoding is not None:
        stored = dataclasses.replace(stored, dtype=dtype)
    plain = dataclasses.replace(stored, kind="", fuse=None)
    if "{}" in name:
        count = stored.shape[0]
        shape, nbytes = stored.shape[1:], stored.nbytes // max(1, count)
        encoding = None if stored.encoding is None else lift(stored.encoding, len(stored.shape), len(shape))
        for i in range(count):
            spec = dataclasses.replace(plain, name=name.format(i), shape=shape, encoding=encoding, nbytes_stored=nbytes)
            yield spec, Place(stored.name, i * r.row_count(shape))
        return
    change = architecture.change(stored.name, stored, model)
    if change is not None and change.shape is not None:
        encoding = None if stored.encoding is None else _transposed_encoding(stored.encoding)
        yield (
            dataclasses.replace(plain, name=name, shape=change.shape, encoding=encoding),
            Place(stored.name, transposed=True),
        )
        return
    if change is not None and change.undo is not None and stored.encoding is not None:
        raise SourceError(f"{tensor_at(model.info.name, stored.name)}: is {stored.encoding}, and cannot be turned back")
    yield dataclasses.replace(plain, name=name), Place(stored.name, change=change)


def _vocabulary(source: GgufSource, keys: Keys) -> dict[str, Any]:
    """What config.json says of tokens and of the head."""
    embedding = next((s for s in source.specs() if s.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise SourceError(f"{source.info.name}: no token_embd.weight, which every checkpoint has")
    count = embedding.shape[0]
    keys.get("vocab_size")
    config: dict[str, Any] = {
        "vocab_size": count,
        "tie_word_embeddings": not any(s.name == "output.weight" for s in source.specs()),
    }
    for theirs, ours in _TOKENS.items():
        value = source.header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        config[f"{ours}_token_id"] = value if type(value) is int and 0 <= value < count else None
    return config


def _dtype(specs: Sequence[TensorSpec]) -> str:
    """What the model is to be run in: that of the scales, or of most floats."""
    if any(spec.encoding is not None for spec in specs):
        return "float16"
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.numel * (len(spec.shape) > 1)
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _notes(source: GgufSource, keys: Keys) -> Iterator[str]:
    yield "config.json is made of the file's metadata: what GGUF does not hold has transformers' defaults"
    if source.header.metadata.get("tokenizer.ggml.model") in ("gpt2", "llama", "bert"):
        yield "the tokenizer is made of the file's tokens: normalization that llama.cpp does not do is not in it"
    computed = [spec.name for spec in source.specs() if _COMPUTED.search(spec.name)]
    if computed:
        yield f"{', '.join(computed)} became rope_scaling of config.json"
    if keys.not_asked:
        yield f"config.json does not say {', '.join(map(shown, keys.not_asked[:8]))}"
    if keys.get("pooling_type") is not None:
        yield "how sentence-transformers pools is not written, and the pooler of BERT is not in the file"


def read_vector(source: GgufSource, name: str) -> list[float]:
    """A vector of float32.

    :raises SourceError: when it is not that.
    """
    info = source.header.tensors[name]
    if info.dtype != "float32" or len(info.shape) != 1 or info.shape[0] > MAX_VECTOR:
        raise SourceError(f"{tensor_at(source.info.name, name)}: a vector of float32 expected")
    return list(struct.unpack(f"<{info.shape[0]}f", source.bytes_of(info)))


def _is_quantized(value: object) -> bool:
    return hasattr(value, "codes")


def _transposed_encoding(encoding: Encoding) -> Encoding:
    params = {k: _transposed_encoding(p) if isinstance(p, Encoding) else p for k, p in encoding.params()}
    return Encoding(encoding.element, encoding.block[::-1], clip=encoding.clip, **params)


def _transposed(value: ParamValue) -> ParamValue:
    from monoquant_core.tensor import QuantizedTensor

    if not isinstance(value, QuantizedTensor):
        return value.t().contiguous()
    params = {label: _transposed(param) for label, param in value.params().items()}
    return QuantizedTensor(_transposed_encoding(value.encoding), value.codes.t().contiguous(), **params)


def _shaped(value: ParamValue, shape: tuple[int, ...]) -> ParamValue:
    """Of a stack's chunk the matrix."""
    if tuple(value.shape) == shape:
        return value
    from monoquant_core.gather import reshaped
    from monoquant_core.tensor import QuantizedTensor

    return reshaped(value, shape) if isinstance(value, QuantizedTensor) else value.reshape(shape)


def _slice(value: ParamValue, start: int, stop: int) -> ParamValue:
    """Some of the rows of a chunk of rank 1 or 2."""
    from monoquant_core.tensor import QuantizedTensor

    if not isinstance(value, QuantizedTensor):
        return value[start:stop] if value.ndim > 1 else value
    size = value.encoding.block[0]
    params = {label: _slice(param, start // size, -(-stop // size)) for label, param in value.params().items()}
    return QuantizedTensor(value.encoding, value.codes[start:stop], **params)

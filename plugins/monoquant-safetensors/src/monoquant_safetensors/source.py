"""Finished safetensors as sources: both conventions, read back to the IR they were written from.

Opening reads headers, config.json and a few numbers per module: shapes of packed weights and static ranges. Importing
this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core import kinds
from monoquant_core.containers import folder as folders
from monoquant_core.containers.entries import TensorEntry, check_name, parse_json, shown, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.containers.safetensors import read_header
from monoquant_core.encoding import FLOAT_BITS, ActivationQuant, Encoding
from monoquant_core.errors import EncodingError, SourceError
from monoquant_core.exporters import Exporter, Held, Holds, Output, Part
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.rows import all_rows, row_count
from monoquant_core.sources import SafetensorsSource
from monoquant_safetensors import arguments as ct
from monoquant_safetensors.compressed_tensors import CompressedTensorsExporter, config_of, module_parts
from monoquant_safetensors.generic import KEY, LAYOUT, VERSION, GenericExporter

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import ParamValue, QuantizedTensor

#: what a quantized module has in a file beside, or in place of, its weight
_WEIGHT_TENSORS = tuple(
    f"weight_{label}" for label in ("packed", "scale", "shape", "zero_point", "global_scale", "g_idx")
)
_INPUT_TENSORS = tuple(f"input_{label}" for label in ("scale", "zero_point", "global_scale"))
_CODES = ("int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2")  #: dtypes of weights that are not floats
_FLOAT_FORMATS = {"int8": ct.INT, "float8_e4m3fn": ct.FLOAT}


class CompressedTensorsReader:
    """Opens model folders whose config.json names compressed-tensors."""

    def __init__(self, options: object = None) -> None:
        pass

    def recognises(self, path: Path) -> bool:
        """Whether config.json says so and the weights are safetensors."""
        try:
            info = ModelInfo(str(path), folders.read_config(path))
            return config_of(info) is not None and folders.find_weights(path).files[0].suffix == ".safetensors"
        except SourceError:
            return False

    def open(self, path: Path) -> CompressedTensorsSource:
        """Open it.

        :raises SourceError: naming the file and the tensor.
        """
        return CompressedTensorsSource(path)


class GenericReader:
    """Opens what the generic convention wrote."""

    def __init__(self, options: object = None) -> None:
        pass

    def recognises(self, path: Path) -> bool:
        """Whether the metadata of some header is ours."""
        try:
            files = folders.find_weights(path).files if path.is_dir() else (path,)
            return any(KEY in _metadata(file) for file in files if file.suffix == ".safetensors")
        except SourceError:
            return False

    def open(self, path: Path) -> GenericSource:
        """Open it.

        :raises SourceError: naming the file and the tensor.
        """
        return GenericSource(path)


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a quantized tensor is stored."""

    out: Output
    held: Held
    parts: tuple[Part, ...]
    zeros: str = ""  #: name of a tensor that must be zero: zero points of a symmetric weight


class FinishedSource(SafetensorsSource):
    """Tensors of which some are quantized and stored as several."""

    exporter: Exporter  #: of the convention, for its ``unpack``

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self._stored: dict[str, _Stored] = {}
        try:
            self._specs = kinds.annotate(self._describe(), self.info)
        except BaseException:
            self.close()
            raise

    def _describe(self) -> list[TensorSpec]:
        """The specs, with ``_stored`` filled in."""
        raise NotImplementedError

    def read(  # type: ignore[override]
        self, name: str, rows: range, scratch: Scratch | None = None, *, slot: str = "source"
    ) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor; safe to call from several threads.

        :raises SourceError: when the file has changed, shrunk or cannot be read, or holds what cannot be.
        """
        stored = self._stored.get(name)
        if stored is None:
            return super().read(name, rows, scratch, slot=slot)
        total = row_count(stored.out.shape)
        # A record of a part may cover more rows than were asked for: zero points of several rows share a word.
        unit = math.lcm(*(part.rows for part in stored.parts if part.per == "rows"))
        whole = range(rows.start // unit * unit, min(total, -(-rows.stop // unit) * unit))
        parts = {
            part.name: self._piece(part.name, *part.span(total, whole), scratch, f"{slot}.{i}")
            for i, part in enumerate(stored.parts)
        }
        if stored.zeros and bool(self._piece(stored.zeros, 0, self.entries[stored.zeros].nbytes, None, "").any()):
            raise SourceError(
                f"{self._at(stored.zeros)}: zero points other than zero, and config.json calls the weight symmetric"
            )
        try:
            tensor = self.exporter.unpack(parts, stored.out, stored.held, whole.start)
            return tensor if whole == rows else _rows_of(tensor, rows, whole)
        except EncodingError as exc:
            raise SourceError(f"{self._at(name)}: {exc}") from exc

    def _piece(self, name: str, first: int, nbytes: int, scratch: Scratch | None, slot: str) -> torch.Tensor:
        """Bytes of a stored tensor as a vector of its dtype."""
        from monoquant_core.containers.strided import read_rows

        entry = self.entries[name]
        piece = dataclasses.replace(
            entry, shape=(nbytes // entry.itemsize,), offset=entry.offset + first, nbytes=nbytes, strides=None
        )
        return read_rows(self._readers[entry.path], name, piece, all_rows(piece.shape), scratch, slot)

    def _numbers(self, name: str, code: str) -> tuple[Any, ...]:
        """The values of a small tensor, without torch.

        :param code: of ``struct``, for one value.
        """
        entry = self.entries[name]
        data = self._readers[entry.path].read(entry.offset, entry.nbytes, f"tensor {name!r}")
        return struct.unpack(f"<{entry.nbytes // entry.itemsize}{code}", data)

    def _at(self, name: str) -> str:
        entry = self.entries.get(name)
        return tensor_at(entry.path if entry is not None else self.path, name)

    def _nbytes(self, parts: Sequence[Part]) -> int:
        return sum(self.entries[part.name].nbytes for part in parts)


def _rows_of(value: ParamValue, rows: range, whole: range) -> ParamValue:
    """Some of the rows of a matrix, whose parameters belong to one row each or to all of them."""
    from monoquant_core.tensor import QuantizedTensor

    if value.shape[0] != len(whole):
        return value
    part = slice(rows.start - whole.start, rows.stop - whole.start)
    if not isinstance(value, QuantizedTensor):
        return value[part]
    params = {label: _rows_of(param, rows, whole) for label, param in value.params().items()}
    return QuantizedTensor(value.encoding, value.codes[part], **params)


class GenericSource(FinishedSource):
    """What ``--convention generic`` wrote.

    :raises SourceError: naming the file and the tensor.
    """

    exporter = GenericExporter(0)

    def shares_storage(self, name: str, other: str) -> bool:
        """Whether two tied names are one tensor of the file, so that they need not be compared."""
        return self._ties.get(name) == other or self._ties.get(other) == name

    def _describe(self) -> list[TensorSpec]:
        found: dict[str, TensorSpec] = {}
        used: dict[str, str] = {}
        self._ties: dict[str, str] = {}
        for path, header in self.headers.items():
            if KEY not in header.metadata:
                continue
            described, tied = _described(path, header.metadata[KEY])
            self._ties |= tied
            for name, (encoding, dtype, shape, activation) in described.items():
                out, held = Output(name, shape, dtype, (name,)), Holds(LAYOUT, encoding)
                parts = tuple(self.exporter.parts(out, held))
                for part in parts:
                    _check_part(path, header.tensors.get(part.name), part)
                    if part.name in used:
                        raise SourceError(f"{tensor_at(path, part.name)}: part of {used[part.name]!r} and of {name!r}")
                    used[part.name] = name
                self._stored[name] = _Stored(out, held, parts)
                found[name] = TensorSpec(name, shape, dtype, encoding, activation, nbytes_stored=self._nbytes(parts))
        for name in found:
            if name in self.entries and name not in used:
                raise SourceError(f"{self._at(name)}: stored as it is, and described as quantized")
        specs = [
            found.pop(used[name]) if used.get(name) in found else TensorSpec(name, entry.shape, entry.dtype)
            for name, entry in self.entries.items()
            if name not in used or used[name] in found
        ]
        return [*specs, *self._tied_specs(specs)]

    def _tied_specs(self, specs: Sequence[TensorSpec]) -> Iterator[TensorSpec]:
        known = {spec.name: spec for spec in specs}
        for name, first in self._ties.items():
            if name in known or first not in known:
                raise SourceError(f"{self._at(name)}: cannot be tied to {shown(first)}")
            if first in self._stored:
                self._stored[name] = self._stored[first]
            else:
                self.entries = {**self.entries, name: self.entries[first]}
            yield dataclasses.replace(known[first], name=name, tied_to=first)


class CompressedTensorsSource(FinishedSource):
    """A folder of compressed-tensors, whoever wrote it.

    :raises SourceError: naming the file and the tensor, or what of the format is not supported.
    """

    def _describe(self) -> list[TensorSpec]:
        self.exporter = CompressedTensorsExporter(0, (), self.info)
        config = config_of(self.info)
        assert config is not None
        groups = _Groups(self.path / "config.json", config)
        owners: dict[str, str] = {}  # tensor -> prefix of its module
        for name, entry in self.entries.items():
            label = name.rpartition(".")[2]
            prefix, scaled = name.removesuffix(label), f"{name.removesuffix(label)}weight_scale" in self.entries
            if label == "weight":
                quantized = scaled or entry.dtype in _CODES
            else:
                quantized = label in _WEIGHT_TENSORS or (scaled and label in _INPUT_TENSORS)
            if quantized:
                owners[name] = prefix
        specs: list[TensorSpec] = []
        done: set[str] = set()
        for name, entry in self.entries.items():
            prefix = owners.get(name, "")
            if name not in owners:
                specs.append(TensorSpec(name, entry.shape, entry.dtype))
            elif prefix not in done:
                done.add(prefix)
                specs.append(self._module(prefix, groups))
        if any(stored.held.layout == ct.NVFP4 for stored in self._stored.values()):
            note = f"{self.path}: NVFP4 stores what its scales are divided by; they are multiplied by the reciprocal"
            self.info = dataclasses.replace(self.info, notes=(*self.info.notes, note))
        return specs

    def _module(self, prefix: str, groups: _Groups) -> TensorSpec:
        """The weight of one quantized module."""
        module = prefix.removesuffix(".")
        labels = ("weight", *_WEIGHT_TENSORS, *_INPUT_TENSORS)
        own = {label: f"{prefix}{label}" for label in labels if f"{prefix}{label}" in self.entries}
        where = self._at(next(iter(own.values())))
        if "weight" in own and self.entries[own["weight"]].dtype in FLOAT_BITS:
            raise SourceError(f"{where}: floats beside a scale: the weight is not compressed")
        for label in ("weight_g_idx", "input_global_scale"):
            if label in own:
                raise SourceError(f"{self._at(own[label])}: {label} is not supported")
        group = groups.of(module, where)
        try:
            weights = ct.read_weights(group.get("weights"), self._format(prefix, group, groups))
            activation = self._activation(prefix, group)
        except (ct.ArgumentError, EncodingError) as exc:
            raise SourceError(f"{groups.path}: module {module!r}: {exc}") from None
        if group.get("output_activations") is not None:
            raise SourceError(f"{groups.path}: module {module!r}: output_activations are not supported")
        scale = self.entries.get(f"{prefix}weight_scale")
        if scale is None:
            raise SourceError(f"{where}: {prefix}weight_scale is missing")
        if weights.format not in (ct.MXFP4, ct.MXFP8, ct.NVFP4) and scale.dtype not in FLOAT_BITS:
            raise SourceError(f"{self._at(own['weight_scale'])}: a scale of {scale.dtype}")
        encoding = ct.encoding_of(weights, scale.dtype)
        dtype = scale.dtype if scale.dtype in FLOAT_BITS else self._config_dtype()
        out = Output(f"{prefix}weight", self._shape(prefix, weights, where), dtype, (f"{prefix}weight",))
        held = Holds(weights.format, encoding)
        parts = tuple(p for p in module_parts(out, held) if p.name != f"{prefix}weight_shape")
        for part in parts:
            _check_part(self.path, self.entries.get(part.name), part, loose=part.name.endswith("_scale"))
        zeros = own.get("weight_zero_point", "") if weights.symmetric else ""
        self._stored[out.name] = _Stored(out, held, parts, zeros)
        stored = sum(self.entries[name].nbytes for name in own.values())
        return TensorSpec(out.name, out.shape, dtype, encoding, activation, nbytes_stored=stored)

    def _format(self, prefix: str, group: Mapping[str, Any], groups: _Groups) -> str:
        named = group.get("format") or groups.format
        if isinstance(named, str) and named != ct.MIXED:
            return named
        entry = self.entries.get(f"{prefix}weight")
        return ct.PACKED if entry is None else _FLOAT_FORMATS.get(entry.dtype, entry.dtype)

    def _shape(self, prefix: str, weights: ct.Weights, where: str) -> tuple[int, int]:
        """Rows and columns of the weight."""
        packed = weights.format in (ct.PACKED, ct.MXFP4, ct.NVFP4)
        entry = self.entries.get(f"{prefix}weight_packed" if packed else f"{prefix}weight")
        if entry is None or len(entry.shape) != 2:
            found = "missing" if entry is None else f"a tensor of shape {entry.shape}"
            raise SourceError(
                f"{where}: {prefix}{'weight_packed' if packed else 'weight'} is {found}, two axes expected"
            )
        rows, columns = entry.shape
        if weights.format != ct.PACKED:
            return rows, columns * 2 if packed else columns
        name = f"{prefix}weight_shape"
        at = self.entries.get(name)
        if at is None or at.shape != (2,) or at.dtype not in ("int64", "int32"):
            raise SourceError(f"{where}: {name}, two integers, is missing")
        shape: tuple[int, int] = self._numbers(name, "q" if at.dtype == "int64" else "i")
        if shape[0] != rows or -(-shape[1] * weights.bits // 32) != columns or shape[1] < 1:
            raise SourceError(
                f"{where}: {weights.bits}-bit codes of shape {shown(shape)} do not fit {entry.shape} words",
                hint="before June 2026 compressed-tensors packed 3, 5, 6 and 7 bits otherwise: "
                "start from the float checkpoint",
            )
        return shape

    def _activation(self, prefix: str, group: Mapping[str, Any]) -> ActivationQuant | None:
        name = f"{prefix}input_scale"
        scale, zero = self._scalar(name), self._scalar(f"{prefix}input_zero_point")
        return ct.read_activation(group.get("input_activations"), scale, int(zero or 0))

    def _scalar(self, name: str) -> float | None:
        """The one number that a tensor holds, if there is such a tensor."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        code = {"float16": "e", "float32": "f", "float64": "d", "int8": "b", "bfloat16": "H"}.get(entry.dtype)
        if code is None or entry.nbytes != entry.itemsize:
            raise ct.ArgumentError(f"{name}: one number expected, got {entry.dtype} {entry.shape}")
        (value,) = self._numbers(name, code)
        if code == "H":
            (value,) = struct.unpack("<f", struct.pack("<I", value << 16))
        return float(value)

    def _config_dtype(self) -> str:
        config = self.info.config or {}
        dtype = config.get("dtype") or config.get("torch_dtype")
        return dtype if dtype in FLOAT_BITS else "bfloat16"


class _Groups:
    """The config groups, and which of them a module belongs to."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.format = path, config.get("format")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise SourceError(f"{path}: quantization_config: config_groups is {shown(groups)}")
        self._refuse_unsupported(config)
        self.targets: dict[str, Mapping[str, Any]] = {}
        for name, group in groups.items():
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise SourceError(
                    f"{path}: quantization_config: {shown(name)} is no group with targets: {shown(group)}"
                )
            self.targets |= dict.fromkeys(targets, group)
        self._patterns = {t: self._compile(t) for t in sorted(self.targets) if t.startswith("re:")}

    def of(self, module: str, where: str) -> Mapping[str, Any]:
        """The group of a module: by its name, then by expression, then by class, as compressed-tensors has it.

        :raises SourceError: when there is none.
        """
        if module in self.targets:
            return self.targets[module]
        for target, pattern in self._patterns.items():
            if pattern.match(module):
                return self.targets[target]
        classes = [t for t in self.targets if "." not in t and not t.startswith("re:") and t[:1].isupper()]
        if "Linear" in classes or classes:
            return self.targets["Linear" if "Linear" in classes else classes[0]]
        raise SourceError(f"{where}: quantized, and no config group of {self.path.name} targets module {module!r}")

    def _compile(self, target: str) -> re.Pattern[str]:
        # Names of layers need no repeated groups, and those can take a time exponential in the length of a name.
        repeats = target.count("*") + target.count("+") + target.count("{")
        if len(target) > 1000 or repeats > 8 or re.search(r"(?<!\\)\)[*+{]", target):
            raise SourceError(f"{self.path}: target {shown(target)} is too intricate an expression to match safely")
        try:
            return re.compile(target.removeprefix("re:"))
        except re.error as exc:
            raise SourceError(f"{self.path}: target {target!r} is not a regular expression: {exc}") from None

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        status = config.get("quantization_status", "compressed")
        sparsity = config.get("sparsity_config") or {}
        sparse = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
        reason = ""
        if status != "compressed":
            reason = f"quantization_status is {shown(status)}: the weights are not stored as codes"
        elif sparse not in (None, "dense"):
            reason = f"sparsity format {shown(sparse)} is not supported"
        elif config.get("transform_config"):
            reason = "transform_config: rotated weights are not supported"
        if reason:
            raise SourceError(f"{self.path}: {reason}", hint="start from the float checkpoint")


def _check_part(path: Path, entry: TensorEntry | None, part: Part, *, loose: bool = False) -> None:
    """Refuse a part that is missing or something else. ``loose``: ones in the shape do not matter."""
    if entry is None:
        raise SourceError(f"{tensor_at(path, part.name)}: missing: {part.dtype} {part.shape} expected")
    same = entry.shape == part.shape or (loose and _squeezed(entry.shape) == _squeezed(part.shape))
    if entry.dtype != part.dtype or not same:
        raise SourceError(
            f"{tensor_at(entry.path, part.name)}: {entry.dtype} {entry.shape}, expected {part.dtype} {part.shape}"
        )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _metadata(path: Path) -> dict[str, str]:
    with FileReader(path) as reader:
        return read_header(reader).metadata


_Described = tuple[Encoding, str, tuple[int, ...], ActivationQuant | None]


def _described(path: Path, text: str) -> tuple[dict[str, _Described], dict[str, str]]:
    """Quantized tensors and ties that the metadata of one file speaks of."""
    where = f"{path}: metadata {KEY!r}"
    data = parse_json(text.encode(), where)
    if data.get("version") != VERSION:
        raise SourceError(f"{where}: version {shown(data.get('version'))}, this reader knows {VERSION}")
    encodings, tensors, ties = (data.get(key) for key in ("encodings", "tensors", "ties"))
    if not (isinstance(encodings, list) and isinstance(tensors, dict) and isinstance(ties, dict)):
        raise SourceError(f"{where}: encodings, tensors and ties expected, got {sorted(data)}")
    for name in (*tensors, *ties, *ties.values()):
        check_name(path, name)
    try:
        known = [Encoding.from_dict(item) for item in encodings]
    except EncodingError as exc:
        raise SourceError(f"{where}: {exc}") from exc
    found: dict[str, _Described] = {}
    for name, item in tensors.items():
        try:
            found[name] = _one(item, known)
            TensorSpec(name, found[name][2], found[name][1], found[name][0])
        except (EncodingError, KeyError, TypeError, ValueError, IndexError) as exc:
            raise SourceError(f"{tensor_at(path, name)}: impossible description {shown(item)}: {exc}") from exc
    return found, ties


def _one(item: Mapping[str, Any], encodings: Sequence[Encoding]) -> _Described:
    number, shape, dtype = item["encoding"], item["shape"], item["dtype"]
    if type(number) is not int or number < 0 or not isinstance(shape, list) or not isinstance(dtype, str):
        raise ValueError("encoding, dtype and shape expected")
    activation = ActivationQuant.from_dict(item["activation"]) if "activation" in item else None
    return encodings[number], dtype, tuple(shape), activation

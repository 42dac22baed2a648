"""What calibration learned of a model, and the file that keeps it. Importing this module imports no torch.

The file is safetensors: ``POINT/minimum``, ``/maximum``, ``/importance``, ``/low`` and ``/high`` for every point, and
one JSON document in the header, with a checksum over it and all values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.containers.entries import shown
from monoquant_core.containers.reader import FileReader
from monoquant_core.containers.safetensors import data_offsets, header_bytes, read_header
from monoquant_core.errors import CalibrationError, MonoquantError, SourceError
from monoquant_core.quality import Finding
from monoquant_core.stats import TensorStats

if TYPE_CHECKING:
    import torch

    from monoquant_core.model import Source

KEY = "monoquant.statistics"
VERSION = 1
SAMPLED_ROWS = 64  #: rows of a large tensor that tell it from others
WHOLE_BYTES = 1 << 20  #: tensors up to this size are compared whole

_TENSORS = ("minimum", "maximum", "importance", "low", "high")
_NUMBERS = ("clipped", "outlier", "moved")
_HINT = "calibrate again: monoquant calibrate SRC --data DATA -o FILE"


@dataclass(frozen=True, slots=True)
class Key:
    """What statistics are of. Those of another key are stale."""

    model: str
    data: str
    calibrator: str
    format: str = ""

    @property
    def name(self) -> str:
        """A name for a file."""
        text = json.dumps([VERSION, self.model, self.data, self.calibrator, self.format])
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


@dataclass(frozen=True)
class Statistics(Mapping[str, TensorStats]):
    """Statistics by point: ``"layer1.conv:input"`` for what the weight ``layer1.conv.weight`` is multiplied with."""

    points: Mapping[str, TensorStats]
    calibrator: str = ""  #: as declared, with options that are not its defaults: ``percentile percentile=99.9``
    samples: int = 0  #: how many were seen
    model: str = ""  #: tells the model whose statistics these are, see :func:`model_key`
    data: str = ""  #: tells the samples
    format: str = ""  #: the format whose graph was run; "" is the model's own module or program
    findings: tuple[Finding, ...] = ()  #: what speaks against the data
    notes: tuple[str, ...] = field(default=(), compare=False)  #: what else is to be said, such as casts of inputs

    def __getitem__(self, point: str) -> TensorStats:
        return self.points[point]

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the file: complete or not at all, and the same bytes for the same statistics.

        :raises OutputError: naming the path and the reason.
        """
        from monoquant_core.commit import Destination
        from monoquant_core.exporters import FilePlan

        with Destination(Path(path), [FilePlan("", self.to_bytes())], force=force) as out:
            out.commit()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read such a file.

        :raises CalibrationError: when it is damaged, or no file of statistics.
        """
        try:
            with FileReader(Path(path)) as reader:
                return _read(reader)
        except CalibrationError:
            raise
        except MonoquantError as exc:
            raise CalibrationError(f"{_prefixed(path, exc)}", hint=_HINT) from exc

    def to_bytes(self) -> bytes:
        """The content of the file."""
        import torch

        values: dict[str, torch.Tensor] = {}
        for point, stats in self.points.items():
            for label in _TENSORS:
                if (value := getattr(stats, label)) is not None:
                    values[f"{point}/{label}"] = value.detach().to("cpu", torch.float32).contiguous()
        entries = {name: ("float32", tuple(value.shape)) for name, value in values.items()}
        data = b"".join(values[name].numpy().tobytes() for name in data_offsets(entries))
        about = {
            "version": VERSION,
            "calibrator": self.calibrator,
            "samples": self.samples,
            "model": self.model,
            "data": self.data,
            "format": self.format,
            "findings": [[f.kind, f.text, list(f.points)] for f in self.findings],
            "notes": list(self.notes),
            "points": {p: {"count": s.count, **_numbers(s)} for p, s in sorted(self.points.items())},
        }
        text = json.dumps(about, sort_keys=True, separators=(",", ":"))
        return header_bytes(entries, {"checksum": _checksum(text, data), "format": "pt", KEY: text}) + data

    def differs(self, wanted: Key) -> str:
        """What of it is another than wanted; "" if nothing is."""
        names = {"model": "another model", "data": "other data", "calibrator": f"calibrator {self.calibrator!r}"}
        names["format"] = f"the graph of {self.format or 'the module'}"
        return ", ".join(text for label, text in names.items() if getattr(self, label) != getattr(wanted, label))

    def check_model(self, source: Source, name: str = "the statistics") -> None:
        """Refuse statistics of another model.

        :raises CalibrationError: naming both.
        """
        if self.model and self.model != model_key(source):
            raise CalibrationError(f"{name}: of another model than {source.info.name}", hint=_HINT)


def model_key(source: Source) -> str:
    """What tells a model: names, shapes and dtypes of all tensors, and their values.

    Of a tensor above 1 MiB rows at regular intervals stand for all: training changes every row.
    """
    from monoquant_core.rows import row_count, row_length
    from monoquant_core.tensor import QuantizedTensor, as_bytes

    digest = hashlib.sha256()
    for spec in sorted(source.specs(), key=lambda s: s.name):
        digest.update(json.dumps([spec.name, spec.shape, spec.dtype, str(spec.encoding)]).encode())
        if spec.tied_to is not None or spec.encoding is not None or not spec.numel:
            continue
        total = row_count(spec.shape)
        at_once = total if spec.nbytes <= WHOLE_BYTES else max(1, 4096 // max(1, row_length(spec.shape)))
        for start in range(0, total, max(at_once, math.ceil(total / SAMPLED_ROWS))):
            value = source.read(spec.name, range(start, min(total, start + at_once)))
            assert not isinstance(value, QuantizedTensor)
            digest.update(as_bytes(value.contiguous()).numpy().tobytes())
    return digest.hexdigest()


def _read(reader: FileReader) -> Statistics:
    import torch

    header = read_header(reader)
    text = header.metadata.get(KEY)
    if text is None:
        raise CalibrationError(f"{reader.path}: holds no statistics of monoquant", hint=_HINT)
    start = min((e.offset for e in header.tensors.values()), default=reader.size)
    data = reader.read(start, reader.size - start) if reader.size > start else b""
    if header.metadata.get("checksum") != _checksum(text, data):
        raise CalibrationError(f"{reader.path}: damaged: its checksum is another", hint=_HINT)
    try:
        about = json.loads(text)
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']!r}, {VERSION} is known")
        points = {}
        for point, numbers in about["points"].items():
            values: dict[str, Any] = {}
            for label in _TENSORS:
                entry = header.tensors.get(f"{point}/{label}")
                if entry is not None:
                    raw = bytearray(data[entry.offset - start : entry.offset - start + entry.nbytes])
                    values[label] = torch.frombuffer(raw, dtype=torch.float32).view(entry.shape)
            points[point] = TensorStats(**numbers, **values)
        findings = tuple(Finding(kind, said, tuple(where)) for kind, said, where in about["findings"])
        known = {label: about[label] for label in ("calibrator", "samples", "model", "data", "format")}
        stats = Statistics(points, **known, findings=findings, notes=tuple(about["notes"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, CalibrationError) as exc:
        # The checksum fits, so somebody made it this way, or the header's own part is damaged.
        raise CalibrationError(f"{reader.path}: not statistics of monoquant: {shown(str(exc))}", hint=_HINT) from exc
    if stats.to_bytes() != reader.read(0, reader.size):
        raise CalibrationError(f"{reader.path}: damaged: its header is another", hint=_HINT)
    return stats


def _numbers(stats: TensorStats) -> dict[str, float]:
    return {label: value for label in _NUMBERS if (value := getattr(stats, label)) is not None}


def _checksum(text: str, data: bytes) -> str:
    digest = hashlib.sha256(text.encode())
    digest.update(data)
    return digest.hexdigest()


def _prefixed(path: str | os.PathLike[str], exc: SourceError | MonoquantError) -> str:
    text = str(exc)
    return text if os.fspath(path) in text else f"{os.fspath(path)}: {text}"

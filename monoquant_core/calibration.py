"""Calibration: a model runs on batches, and what flows through it becomes statistics."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monoquant_core import options as opts
from monoquant_core.commit import cache_folder
from monoquant_core.declarations import CalibratorDeclaration
from monoquant_core.errors import CalibrationError, OutputError
from monoquant_core.model import Source
from monoquant_core.observers import Observer
from monoquant_core.quality import judge
from monoquant_core.runners import Batch, Runnable, Runner
from monoquant_core.statistics import Key, Statistics, model_key
from monoquant_core.stats import Calibrator, TensorStats
from monoquant_core.tensor import as_bytes, dtype_name

#: called with the samples seen so far
SampleProgress = Callable[[int], None]


class Collector:
    """Statistics in the making: an observer for every point, and what tells the samples.

    Those of several processes that saw different samples can be merged: ``state_dict`` is tensors only.

    :param make: constructs a calibrator; always with the same options.
    """

    def __init__(self, make: Callable[[], Calibrator]) -> None:
        self._make = make
        self.observers: dict[str, Observer] = {}
        self.samples = 0
        self.expected: tuple[str, ...] = ()  #: points that should be reached
        self.notes: list[str] = []
        self._seen: set[bytes] = set()
        self._duplicates = 0
        self._answers = _Answers()
        self._data = hashlib.sha256()

    def observe(self, point: str, values: torch.Tensor, axis: int = -1) -> None:
        """What a runner tells.

        :raises CalibrationError: for NaN and infinity, naming the point.
        """
        if not values.numel():
            return
        if point not in self.observers:
            self.observers[point] = Observer(self._make, axis)
        try:
            self.observers[point].observe(values)
        except CalibrationError as exc:
            raise CalibrationError(f"{point}: {exc}", hint=exc.hint) from exc

    def run(self, runner: Runner, batches: Iterable[Batch], progress: SampleProgress | None = None) -> None:
        """Run all batches and observe them.

        :raises CalibrationError: when a batch does not fit, the model fails, or nothing is given.
        """
        self.expected = tuple(runner.points)
        for given in batches:
            batch = as_batch(given)
            self._count(batch)
            self._answers.observe(runner.run(batch, self.observe))
            if progress is not None:
                progress(self.samples)
        self.notes = list(dict.fromkeys([*self.notes, *runner.notes]))
        if not self.samples:
            raise CalibrationError("there are no samples: the data is empty")

    def merge(self, other: Collector) -> None:
        """Take in what another collector of the same model and calibrator saw, as the later samples."""
        for point, observer in other.observers.items():
            if point not in self.observers:
                self.observers[point] = observer
            else:
                self.observers[point].merge(observer)
        self._duplicates += other._duplicates + len(self._seen & other._seen)
        self._seen |= other._seen
        self.samples += other.samples
        self._answers.merge(other._answers)
        self._data.update(other._data.digest())
        self.expected = tuple(dict.fromkeys([*self.expected, *other.expected]))
        self.notes = list(dict.fromkeys([*self.notes, *other.notes]))

    def statistics(self, calibrator: str = "", model: str = "") -> Statistics:
        """What was learned, judged.

        :raises CalibrationError: when no point was reached.
        """
        points: dict[str, TensorStats] = {}
        for point, observer in self.observers.items():
            points[point] = observer.stats()
        if not points:
            raise CalibrationError("no batch reached a weight: nothing was observed")
        findings = judge(
            points,
            samples=self.samples,
            duplicates=self._duplicates,
            unreached=[point for point in self.expected if point not in points],
            variety=self._answers.variety,
        )
        data = self._data.hexdigest()
        return Statistics(
            points, calibrator, self.samples, model, data, findings=tuple(findings), notes=tuple(self.notes)
        )

    def _count(self, batch: Batch) -> None:
        self.samples += batch_size(batch)
        for sample in hash_samples(batch):
            self._duplicates += sample in self._seen
            self._seen.add(sample)
            self._data.update(sample)


class _Answers:
    """How much of what a model answers differs between samples, where it answers each with a vector."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Take in the outputs of a batch."""
        vectors = {n: v.double().cpu() for n, v in outputs.items() if v.ndim == 2 and v.is_floating_point()}
        for name, value in vectors.items():
            sums, squares = self._sums.get(name, (torch.zeros(()), torch.zeros(())))
            if sums.ndim == 0 or sums.shape == value.shape[1:]:
                self._sums[name] = (sums + value.sum(0), squares + value.square().sum(0))
        self._count += len(next(iter(vectors.values()), ()))

    def merge(self, other: _Answers) -> None:
        """Take in what another one saw."""
        for name, (sums, squares) in other._sums.items():
            mine = self._sums.get(name)
            self._sums[name] = (sums, squares) if mine is None else (mine[0] + sums, mine[1] + squares)
        self._count += other._count

    @property
    def variety(self) -> float | None:
        """Variance over mean square, of the output that varies most; None where no output is one vector per sample."""
        shares = []
        for sums, squares in self._sums.values():
            energy = float(squares.sum()) / max(1, self._count)
            variance = float((squares / self._count - (sums / self._count).square()).sum()) if self._count else 0.0
            shares.append(variance / energy if energy > 0 else 0.0)
        return max(shares) if shares and self._count > 1 else None


@dataclass(frozen=True)
class Calibration:
    """Everything that a calibration is made of; nothing is run yet.

    :param source: the model whose statistics these become.
    :param graph: what runs: its module or program, or the graph that a format made of it.
    """

    source: Source
    graph: Runnable
    data: Iterable[Batch]
    declared: CalibratorDeclaration
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str = ""
    points: Collection[str] | None = None  #: what to watch; None is what the graph finds useful
    device: str = ""

    def run(self, progress: SampleProgress | None = None) -> Statistics:
        """Run the graph on the data and learn what its weights are multiplied with.

        :raises CalibrationError: when a batch does not fit, the model fails, or a value is NaN or infinite.
        """
        if self.device:
            from monoquant_core.engine import find_device

            find_device(self.device)
        make, label = bind(self.declared, self.options)
        collector = Collector(make)
        try:
            with self.graph.runner(self.points, self.device) as runner:
                collector.run(runner, self.data, progress)
        except CalibrationError as exc:
            name = getattr(self.data, "name", "")
            raise CalibrationError(f"{name}: {exc}" if name else str(exc), hint=exc.hint) from exc
        made = collector.statistics(label, model_key(self.source))
        notes = (*getattr(self.data, "notes", ()), *made.notes)
        return dataclasses.replace(made, format=self.format, notes=notes)

    def key(self) -> Key:
        """What the statistics would be of. Reads the data, and samples the weights."""
        if iter(self.data) is self.data:
            raise CalibrationError("data that can be read only once has no key", hint="give a list of batches")
        _, label = bind(self.declared, self.options)
        return Key(model_key(self.source), data_key(self.data), label, self.format)

    def cached(self, path: Path | None = None, progress: SampleProgress | None = None) -> Statistics:
        """Statistics from a file, if it holds these; else they are made, and written where nothing was.

        A damaged file, and one of another model, data or calibrator, is never used: a note says so.

        :param path: the file; None is one in the user's cache folder, which is replaced when it is damaged.
        """
        key = self.key()
        file = path or cache_folder() / "statistics" / key.name
        notes = []
        if file.exists():
            try:
                found = Statistics.load(file)
                difference = found.differs(key)
            except CalibrationError as exc:
                difference = str(exc)
            else:
                if not difference:
                    return dataclasses.replace(found, notes=(*found.notes, f"statistics are those of {file}"))
                difference = f"{file}: of {difference}"
            notes.append(f"{difference}; it is not used, and the model is calibrated anew")
        made = self.run(progress)
        if path is None or not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                made.save(file, force=path is None)
            except (OutputError, OSError) as exc:
                if path is not None:
                    raise
                notes.append(f"statistics are not kept: {exc}")
        return dataclasses.replace(made, notes=(*notes, *made.notes))


def bind(declared: CalibratorDeclaration, values: Mapping[str, Any]) -> tuple[Callable[[], Calibrator], str]:
    """What constructs a calibrator with options, and how it is printed.

    :raises OptionError: for an option that it does not take.
    """
    bound: Any = opts.build(declared.options, values, owner=f"--calibrator {declared.name}")
    changed = [
        f"{i.name}={v}" for i in opts.option_infos(declared.options) if (v := getattr(bound, i.name)) != i.default
    ]
    target = declared.load()

    def make() -> Calibrator:
        made: Calibrator = target(bound)
        return made

    make()  # refuses values that do not go together before anything is run
    return make, " ".join([declared.name, *changed])


def as_batch(batch: Any) -> Batch:
    """A batch with torch's tensors in the places of numpy's arrays."""
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch)
    if isinstance(batch, Mapping):
        return {name: as_batch(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(as_batch(value) for value in batch)
    made: Batch = batch
    return made


def data_key(batches: Iterable[Batch]) -> str:
    """What tells samples: the same key as that of statistics made of them. Reads them all.

    :raises CalibrationError: when there are none.
    """
    digest, any_samples = hashlib.sha256(), False
    for batch in batches:
        for sample in hash_samples(as_batch(batch)):
            digest.update(sample)
            any_samples = True
    if not any_samples:
        raise CalibrationError("there are no samples: the data is empty")
    return digest.hexdigest()


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the first extent of its first tensor."""
    tensors = _tensors(batch)
    if not tensors:
        raise CalibrationError(f"a batch is a tensor, a tuple or a dict of tensors, got {type(batch).__name__}")
    first = next(iter(tensors.values()))
    return len(first) if first.ndim else 1


def hash_samples(batch: Batch) -> list[bytes]:
    """A digest of every sample of a batch."""
    tensors, size = _tensors(batch), batch_size(batch)
    digests = [hashlib.sha256() for _ in range(size)]
    for name, tensor in sorted(tensors.items()):
        shared = not tensor.ndim or len(tensor) != size
        value = tensor.detach().cpu().contiguous()
        head = f"{name} {dtype_name(value.dtype)} {tuple(value.shape[0 if shared else 1 :])}".encode()
        for i, digest in enumerate(digests):
            digest.update(head)
            digest.update(as_bytes(value if shared else value[i].contiguous()).numpy().data)
    return [digest.digest() for digest in digests]


def _tensors(batch: Any) -> dict[str, torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return {"0": batch}
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, tuple | list) else ()
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}

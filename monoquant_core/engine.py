"""Carries out plans: reads rows, quantizes, packs, checks and writes them at offsets that are known beforehand.

A task is a range of rows of one output, or of several that are made of the same rows of the source. Tasks run on
threads, each with buffers of its own; neither the number of threads nor the size of the chunks changes a byte. A
journal of finished tasks would be written where their results arrive, in :meth:`Workers.map`, and read where the tasks
of a run are listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from monoquant_core.check import (
    Mismatch,
    check_params,
    check_quantized,
    first_nonfinite,
    magnitude,
    measure,
    square_sum,
)
from monoquant_core.commit import Destination, check_apart, commit_all
from monoquant_core.encoding import Encoding
from monoquant_core.errors import (
    CalibrationError,
    CheckError,
    DeviceError,
    EncodingError,
    MonoquantError,
    PlanError,
    QuantizationError,
)
from monoquant_core.exporters import BytesAt, Exporter, Part, PartAt
from monoquant_core.gather import Reading, ReadOnce, Rows, join, read_rows
from monoquant_core.memory import FreedMemory, peak_bytes, resident_bytes, usable_cores, working_bytes
from monoquant_core.metrics import Energies, energies
from monoquant_core.model import ModelInfo, Source, TensorSpec
from monoquant_core.planning import Decision, Plan, Step
from monoquant_core.reencode import reencode
from monoquant_core.report import Progress, ProgressCallback, Report, TensorReport
from monoquant_core.rows import chunks, quantum, row_count, row_length
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats, column_importance, input_stats
from monoquant_core.tasks import CHUNK_ELEMENTS, Task, check_steps, schedule, waits_for
from monoquant_core.tensor import QuantizedTensor, as_bytes, dtype_name, dtype_of, same_bits
from monoquant_core.workers import Stopped, Workers

DEVICE_CHUNKS = 64  #: a task for an accelerator is this many times larger

ALLOW = "--nonfinite allow keeps it as it is"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is carried out. None of it changes the bytes."""

    threads: int = 0  #: 0 is one per usable core
    chunk_elements: int = CHUNK_ELEMENTS
    device: str = "cpu"
    force: bool = False  #: replace what is there
    nonfinite: Literal["refuse", "allow"] = "refuse"  #: NaN and infinity in tensors that are not quantized


def write(
    plan: Plan,
    source: Source,
    destination: Path,
    options: RunOptions = RunOptions(),
    *,
    stats: Mapping[str, TensorStats] | None = None,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write the files of a plan. The destination holds what it held before, or the complete new output.

    :param stats: calibration statistics by point, or by source tensor's name.
    :param progress: called from this thread.
    :raises MonoquantError: naming the file and the tensor.
    """
    (report,) = write_all([(plan, destination)], source, options, stats=stats, progress=progress)
    return report


def write_all(
    outputs: Sequence[tuple[Plan, Path]],
    source: Source,
    options: RunOptions = RunOptions(),
    *,
    stats: Mapping[str, TensorStats] | None = None,
    progress: ProgressCallback | None = None,
) -> list[Report]:
    """Write the files of several plans of one source, each to its destination, in one pass: every row is read once.

    No destination gets its new content before all are complete and on the disk.

    :param stats: calibration statistics by point, or by source tensor's name.
    :param progress: called from this thread.
    :return: one report per plan; time and memory in it are those of the whole run.
    :raises MonoquantError: naming the file and the tensor.
    """
    plans = [plan for plan, _ in outputs]
    exporters = list(map(_exporter, plans))
    began, start_bytes = time.perf_counter(), resident_bytes()
    threads, device = _threads(options), find_device(options.device)
    predicted = working_bytes(plans, threads, _chunk_elements(options, device))
    steps = [step for plan in plans for step in plan.steps]
    for plan in plans:
        check_steps(plan.steps)
    works, tasks = _works(steps, options, device, stats)
    places = [_places(plan) for plan in plans]
    protect = [path for plan in plans for path in (*plan.info.paths, *plan.info.side_files.values())]
    tell = progress or (lambda _: None)
    with contextlib.ExitStack() as opened:
        destinations = [Destination(path, plan.files, force=options.force, sources=protect) for plan, path in outputs]
        check_apart(destinations)
        for destination in destinations:
            opened.enter_context(destination)
        workers = opened.enter_context(Workers(threads))
        rows = _RowWorker(source, options, device)
        _scan(works, tasks, rows, workers, tell)
        _compare_ties([d for plan in plans for d in plan.decisions], source, workers)
        stores: list[_Store] = []  # one per step
        for plan, exporter, out, where in zip(plans, exporters, destinations, places, strict=True):
            wanted = frozenset(name for step in plan.steps for name in waits_for(step))
            stores += [_Store(exporter, out, where, workers, plan.info, wanted)] * len(plan.steps)
        meter, freed = _Meter("write", works, tasks, tell), FreedMemory(start_bytes + predicted)

        def make(task: Task, scratch: Scratch) -> list[Energies]:
            reading, measured = _reading(source, task), []
            try:
                for index, r in task.outputs:
                    value, found = rows.make(works[index], r, reading, scratch)
                    stores[index].put(works[index], r, value)
                    measured.append(found)
            except BaseException as exc:
                for index, r in task.outputs:
                    works[index].tell_others(r, exc)
                raise
            return measured

        def finished(done: Sequence[Task]) -> None:
            meter.finished(done)
            freed.release()

        first = [task for task in tasks if not task.late]
        measured = workers.map(make, first, finished)
        for work, store in zip(works, stores, strict=True):
            if work.waits_for:
                work.receive(store.kept)
        measured += workers.map(make, tasks[len(first) :], finished)
        tell(Progress("sync", "", meter.total, meter.total))
        notes = commit_all(destinations)
        sizes = [destination.sizes() for destination in destinations]
    tell(Progress("done", "", meter.total, meter.total))
    seconds, peak, found = time.perf_counter() - began, peak_bytes(), iter(_tensor_reports(works, tasks, measured))
    return [
        Report(
            destination=path,
            files=files,
            source_bytes=plan.bytes_before,
            tensors=tuple(itertools.islice(found, len(plan.steps))),
            seconds=seconds,
            start_bytes=start_bytes,
            peak_bytes=peak,
            predicted_bytes=predicted,
            threads=threads,
            device=str(device),
            notes=(*plan.notes, *said),
        )
        for (plan, path), files, said in zip(outputs, sizes, notes, strict=True)
    ]


def compute(
    step: Step,
    source: Source,
    *,
    stats: Mapping[str, TensorStats] | None = None,
    options: RunOptions = RunOptions(),
) -> QuantizedTensor | torch.Tensor:
    """One whole output in memory: what :func:`write` would pack, checked in the same way.

    :raises MonoquantError: naming the file and the tensor.
    """
    device = find_device(options.device)
    check_steps([step])
    works, tasks = _works([step], options, device, stats)
    work = works[0]
    if work.waits_for:
        raise PlanError(f"{work.name}: is made of other outputs, which only a whole run makes")
    with Workers(_threads(options)) as workers:
        rows = _RowWorker(source, options, device)
        _scan(works, tasks, rows, workers, lambda _: None)
        ranges = [r for task in tasks for _, r in task.outputs]
        made = workers.map(lambda r, scratch: _owned(rows.make(work, r, source, scratch)[0]), ranges)
    try:
        return join(made, step.placed.output.shape)
    except EncodingError as exc:
        raise CheckError(f"{source.info.name}: {work.name}: {exc}", hint=_keep(work)) from exc


def find_device(name: str) -> torch.device:
    """The device of that name, tried out.

    :raises DeviceError: saying which devices there are.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        here = ["cpu"]
        if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
            here += [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
        reason = str(exc).strip().partition("\n")[0]
        raise DeviceError(f"no device {name!r} here: {reason}", hint=f"there is: {', '.join(here)}") from exc
    return device


class _Work:
    """A step with what its tasks share."""

    def __init__(self, step: Step, *, whole: bool, stats: Mapping[str, TensorStats], device: torch.device) -> None:
        self.step, self.whole = step, whole
        each = [input_stats(stats, spec.name) for spec in step.specs]
        self.stats = each[0] if each else None
        self.absmax: float | None = None
        # Parts per tensor come with the first task, and the check of every other one needs them.
        per_tensor = any(part.per == "tensor" for part in step.placed.parts)
        self.shared: Future[dict[str, torch.Tensor]] | None = Future() if per_tensor and not whole else None
        proposal = step.placed.proposal
        self.needs: frozenset[str] = proposal.needs if proposal is not None else frozenset()
        self.importance = self._importance(each, device) if step.action == "quantize" else None

    @property
    def name(self) -> str:
        """What the user calls it: the name of its source, if it has just one."""
        return self.step.specs[0].name if len(self.step.specs) == 1 else self.step.placed.output.name

    @functools.cached_property
    def spec(self) -> TensorSpec:
        """The tensor that is quantized, as the scheme saw it in planning."""
        out, specs = self.step.placed.output, self.step.specs
        if len(specs) == 1 and specs[0].shape == out.shape:
            return specs[0]
        return dataclasses.replace(
            specs[0], name=out.name, shape=out.shape, dtype=out.dtype, encoding=None, nbytes_stored=None
        )

    @property
    def wants_absmax(self) -> bool:
        """Whether the scheme must be told the largest magnitude: by a first pass, unless it gets all rows at once."""
        return self.step.action == "quantize" and "absmax" in self.needs

    @property
    def waits_for(self) -> tuple[tuple[str, str], ...]:
        """Parts of other outputs that this one is made of."""
        return waits_for(self.step)

    def receive(self, parts: Mapping[tuple[str, str], torch.Tensor]) -> None:
        """Take the parts that it waited for."""
        placed = self.step.placed
        transform = placed.output.transform
        assert transform is not None
        apply, found = transform.apply, [parts[name] for name in transform.of]
        given = dataclasses.replace(transform, apply=lambda inputs: apply([*inputs, *found]))
        output = dataclasses.replace(placed.output, transform=given)
        self.step = dataclasses.replace(self.step, placed=dataclasses.replace(placed, output=output))

    def tell_others(self, rows: range, failure: BaseException) -> None:
        """Let the tasks that wait for the first one know that it failed."""
        if rows.start == 0 and self.shared is not None and not self.shared.done():
            self.shared.set_exception(failure)

    def _importance(self, each: Sequence[TensorStats | None], device: torch.device) -> torch.Tensor | None:
        """Of the columns of a weight as it lies in the source; of layers that are stacked, each layer's own."""
        members = zip(each, self.step.specs, strict=True)
        found = [column_importance(stats, spec) if stats is not None else None for stats, spec in members]
        known = [importance for importance in found if importance is not None]
        if not known:
            if "importance" in self.needs:
                raise CalibrationError(f"{self.name}: {self.step.scheme} needs the importance of its columns")
            return None
        if len(found) == 1:
            return known[0].to(device)
        # An expert that calibration did not reach has all columns alike.
        return torch.stack([torch.ones_like(known[0]) if i is None else i for i in found]).to(device)


class _Place(NamedTuple):
    """Where a part goes."""

    file: int
    offset: int  #: of its first byte
    part: Part
    dtype: torch.dtype
    record: int  #: bytes that ``part.rows`` rows of the output take; of a part per tensor, all of them

    @property
    def per_rows(self) -> bool:
        """Whether every task writes some of it."""
        return self.part.per == "rows"

    def span(self, rows: range) -> tuple[int, int]:
        """As :meth:`Part.span`, which counts everything anew."""
        if self.part.per == "tensor":
            return 0, self.record
        first = rows.start // self.part.rows
        return first * self.record, (-(-rows.stop // self.part.rows) - first) * self.record


class _RowWorker:
    """Reads rows and makes of them what is to be stored."""

    def __init__(self, source: Source, options: RunOptions, device: torch.device) -> None:
        self.source, self.device, self.nonfinite = source, device, options.nonfinite

    def make(self, work: _Work, rows: range, reading: Reading, scratch: Scratch) -> tuple[Rows, Energies]:
        """Rows of an output as they are stored, and how far they are from their source. Checked."""
        try:
            value = read_rows(work.step, reading, rows, scratch)
            if self.device.type != "cpu":
                value = value.to(self.device)
            if isinstance(value, QuantizedTensor):
                return self._repacked(value, work)
            if work.step.action == "quantize":
                return self._quantized(value, work, rows, scratch)
            return self._floats(value, work, rows, scratch)
        except QuantizationError as exc:
            if self.source.info.name in str(exc):
                raise
            raise QuantizationError(f"{self.source.info.name}: {exc}", hint=exc.hint) from exc
        except (Mismatch, EncodingError, torch.OutOfMemoryError) as exc:
            raise self._named(exc, work, rows) from exc

    def absmax(self, work: _Work, rows: range, reading: Reading, scratch: Scratch) -> float:
        """Largest magnitude of rows of an output."""
        try:
            value = read_rows(work.step, reading, rows, scratch)
            assert isinstance(value, torch.Tensor)
            found = magnitude(value, scratch)
            if not math.isfinite(found):
                raise self._refusal(value, first_nonfinite(value), work, rows, ", which no scheme can quantize")
        except EncodingError as exc:
            raise self._named(exc, work, rows) from exc
        return found

    def _quantized(self, value: torch.Tensor, work: _Work, rows: range, scratch: Scratch) -> tuple[Rows, Energies]:
        step, proposal, quantizer = work.step, work.step.placed.proposal, work.step.quantizer
        assert proposal is not None
        assert quantizer is not None
        made, held = proposal.encoding, step.placed.held.encoding
        assert isinstance(made, Encoding)
        assert held is not None
        x = value
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = scratch.take("engine.float", x.shape, torch.float32, x.device).copy_(x)
        signal = square_sum(x)
        if not math.isfinite(signal):
            raise self._refusal(value, first_nonfinite(x), work, rows, ", which no scheme can quantize")
        absmax = work.absmax
        if work.wants_absmax and absmax is None:
            absmax = magnitude(value, scratch)
        context = Context(work.spec, rows, scratch, absmax, work.importance)
        if "ranges" in work.needs:
            context.extra = {"stats": work.stats}
        q = quantizer.quantize(x, made, context)
        if q.encoding != made or q.shape != tuple(x.shape):
            raise Mismatch(f"{step.scheme} made {q.shape} of {q.encoding}, and promised {tuple(x.shape)} of {made}")
        if made != held:
            q = reencode(q, held)
        return q, check_quantized(x, q, signal, scratch, nearest=quantizer.nearest, keeps_zero=quantizer.keeps_zero)

    def _repacked(self, value: QuantizedTensor, work: _Work) -> tuple[Rows, Energies]:
        held = work.step.placed.held.encoding
        assert held is not None
        if self.nonfinite == "refuse":
            check_params(value)
        made = reencode(value, held)
        if value.encoding == held or not made.codes.numel():
            return made, Energies()
        if not same_bits(made.codes, value.codes):
            raise Mismatch("its codes changed")
        check_params(made)
        before, after = value.dequantize(), made.dequantize()
        if bool(((after == 0) & (before != 0)).any()):
            raise Mismatch(f"parameters of {held} are too narrow: values became zero")
        return made, measure(before, after)

    def _floats(self, value: torch.Tensor, work: _Work, rows: range, scratch: Scratch) -> tuple[Rows, Energies]:
        dtype = dtype_of(work.step.placed.output.dtype)
        if (
            work.step.action == "derive"
            and value.dtype != dtype
            and not (value.is_floating_point() and dtype.is_floating_point)
        ):
            raise PlanError(f"{work.name}: the format's transform made {value.dtype} of {dtype}: a bug of the format")
        if value.dtype == dtype:
            if self.nonfinite == "refuse" and not math.isfinite(magnitude(value, scratch)):
                raise self._refusal(value, first_nonfinite(value), work, rows, hint=ALLOW)
            return value, Energies()
        made = scratch.take("engine.cast", value.shape, dtype, value.device).copy_(value)
        if not (value.is_floating_point() and made.is_floating_point()):
            if not torch.equal(made.to(value.dtype), value):
                raise Mismatch(f"has values that {dtype_name(dtype)} does not hold")
            return made, Energies()
        finite = math.isfinite(magnitude(made, scratch))
        if not finite:
            lost = ~made.isfinite() & value.isfinite()
            if bool(lost.any()):
                index = int(lost.reshape(-1).to(torch.uint8).argmax())
                raise self._refusal(value, index, work, rows, f", which does not fit {dtype_name(dtype)}")
            if self.nonfinite == "refuse":
                raise self._refusal(value, first_nonfinite(value), work, rows, hint=ALLOW)
        if not finite or torch.float64 in (value.dtype, dtype):
            return made, energies(value, made)
        source = scratch.take("engine.float", value.shape, torch.float32, value.device).copy_(value)
        return made, measure(source, scratch.take("check.values", value.shape, torch.float32, value.device).copy_(made))

    def _named(self, failure: Exception, work: _Work, rows: range) -> MonoquantError:
        """The failure, saying of which tensor of which file it is."""
        file = self.source.info.name
        if isinstance(failure, Mismatch):
            where = _element(work.step.placed.output.shape, rows, failure.index)
            return CheckError(f"{file}: {work.name}{where} {failure.reason}", hint=_keep(work))
        if isinstance(failure, torch.OutOfMemoryError):
            return DeviceError(
                f"{self.device}: out of memory for {work.name}", hint="fewer --threads, another --device"
            )
        return CheckError(f"{file}: {work.name}: {failure}", hint=_keep(work))

    def _refusal(
        self, value: torch.Tensor, index: int, work: _Work, rows: range, reason: str = "", hint: str = ""
    ) -> QuantizationError:
        where = _element(work.step.placed.output.shape, rows, index)
        return QuantizationError(
            f"{self.source.info.name}: {work.name}{where} is {value.reshape(-1)[index].item()}{reason}",
            hint=hint or f"{_keep(work)} (with --nonfinite allow for NaN and infinity)",
        )


class _Store:
    """Packs rows, checks that they unpack to what they were, and writes them."""

    def __init__(
        self,
        exporter: Exporter,
        out: Destination,
        places: Mapping[str, Mapping[str, _Place]],
        workers: Workers,
        info: ModelInfo,
        wanted: Collection[tuple[str, str]] = (),
    ) -> None:
        self.exporter, self.out, self.places, self.workers, self.info = exporter, out, places, workers, info
        #: parts that other outputs are made of, by the names of output and part
        self.kept = {
            (output, part): torch.empty(place.part.shape, dtype=place.dtype)
            for output, found in places.items()
            for part, place in found.items()
            if (output, part) in wanted
        }

    def put(self, work: _Work, rows: range, value: Rows) -> None:
        """Store rows of an output.

        :raises CheckError: when they do not unpack to the same bits.
        :raises OutputError: when they cannot be written.
        """
        placed, places = work.step.placed, self.places[work.step.placed.output.name]
        packed = self.exporter.pack(value, placed.output, placed.held, rows.start)
        spans = {name: place.span(rows) for name, place in places.items()}
        wrong = [name for name, tensor in packed.items() if not _fits(tensor, places.get(name), spans.get(name))]
        wrong += [n for n, place in places.items() if n not in packed and (place.per_rows or rows.start == 0)]
        if wrong:
            raise CheckError(
                f"{self.info.name}: {work.name}: the format packed {sorted(wrong)} otherwise than it announced: "
                "a bug of the format"
            )
        parts = packed if work.shared is None else {**packed, **self._shared(work, rows, packed)}
        back = self.exporter.unpack(parts, placed.output, placed.held, rows.start)
        if not _same(value, back):
            raise CheckError(
                f"{self.info.name}: {work.name}: packed as {placed.held.layout}, it does not unpack to the same bits",
                hint=_keep(work),
            )
        for name, tensor in packed.items():
            place = places[name]
            if place.per_rows or rows.start == 0:
                data = as_bytes(tensor.cpu())
                self._write(place.file, place.offset + spans[name][0], data)
                if (kept := self.kept.get((placed.output.name, name))) is not None:
                    as_bytes(kept)[spans[name][0] :][: len(data)] = data

    def _shared(self, work: _Work, rows: range, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts of the whole tensor as its first rows gave them."""
        assert work.shared is not None
        if rows.start == 0:
            names = [part.name for part in work.step.placed.parts if part.per == "tensor"]
            work.shared.set_result({name: packed[name].clone() for name in names})
        return work.shared.result()

    def _write(self, file: int, offset: int, data: torch.Tensor) -> None:
        memory = data.numpy().data
        if self.workers.stopped.is_set():  # the files may be gone
            raise Stopped
        self.out.write_at(file, offset, memory)


def _fits(tensor: torch.Tensor, place: _Place | None, span: tuple[int, int] | None) -> bool:
    """Whether a packed part is what was announced."""
    return place is not None and span is not None and tensor.dtype == place.dtype and tensor.nbytes == span[1]


class _Meter:
    """Turns finished tasks into progress, by the bytes of their sources."""

    def __init__(
        self, stage: Literal["scan", "write"], works: Sequence[_Work], tasks: Sequence[Task], tell: ProgressCallback
    ) -> None:
        self.stage, self.works, self.tell, self.done = stage, works, tell, 0
        self.total = sum(task.nbytes for task in tasks)

    def finished(self, tasks: Sequence[Task]) -> None:
        """Count tasks."""
        self.done += sum(task.nbytes for task in tasks)
        last, _ = tasks[-1].outputs[-1]
        self.tell(Progress(self.stage, self.works[last].step.placed.output.name, self.done, self.total))


def _exporter(plan: Plan) -> Exporter:
    if plan.exporter is None or not plan.files:
        raise PlanError(f"{plan.info.name}: a plan without a format cannot be written")
    return plan.exporter


def _threads(options: RunOptions) -> int:
    if options.threads < 0 or options.chunk_elements < 1:
        raise PlanError(f"threads {options.threads} and chunk elements {options.chunk_elements} must be positive")
    return options.threads or usable_cores()


def _chunk_elements(options: RunOptions, device: torch.device) -> int:
    return options.chunk_elements * (1 if device.type == "cpu" else DEVICE_CHUNKS)


def _works(
    steps: Sequence[Step], options: RunOptions, device: torch.device, stats: Mapping[str, TensorStats] | None
) -> tuple[list[_Work], list[Task]]:
    """What there is to do, one per step, and the tasks that do it."""
    tasks = schedule(steps, _chunk_elements(options, device))
    counts = Counter(index for task in tasks for index, _ in task.outputs)
    known = stats or {}
    works = [_Work(s, whole=counts[i] == 1, stats=known, device=device) for i, s in enumerate(steps)]
    return works, tasks


def _reading(source: Source, task: Task) -> Reading:
    return source if len(task.outputs) == 1 else ReadOnce(source, task.pieces)


def _scan(
    works: Sequence[_Work], tasks: Sequence[Task], rows: _RowWorker, workers: Workers, tell: ProgressCallback
) -> None:
    """The first pass: numbers of whole tensors, for those that are not taken in one piece anyway."""
    wanted = {index for index, work in enumerate(works) if work.wants_absmax and not work.whole}
    chosen = [
        dataclasses.replace(task, outputs=outputs)
        for task in tasks
        if wanted and (outputs := tuple(o for o in task.outputs if o[0] in wanted))
    ]

    def absmax(task: Task, scratch: Scratch) -> list[float]:
        reading = _reading(rows.source, task)
        return [rows.absmax(works[index], r, reading, scratch) for index, r in task.outputs]

    found = workers.map(absmax, chosen, _Meter("scan", works, chosen, tell).finished)
    for task, values in zip(chosen, found, strict=True):
        for (index, _), value in zip(task.outputs, values, strict=True):
            works[index].absmax = max(works[index].absmax or 0.0, value)


def _compare_ties(decisions: Sequence[Decision], source: Source, workers: Workers) -> None:
    """Tensors that are left out because the model shares them must be the same in the file."""
    specs = {d.spec.name: d.spec for d in decisions}
    shares: Callable[[str, str], bool] = getattr(source, "shares_storage", lambda *_: False)
    dropped = {d.spec.name: d.spec for d in decisions if d.action == "drop"}  # by several plans perhaps
    tasks: list[tuple[TensorSpec, TensorSpec, range]] = []
    for spec in dropped.values():
        first = specs.get(spec.tied_to or "")
        if first is None or shares(spec.name, first.name):
            continue
        if (spec.shape, spec.dtype, spec.encoding) != (first.shape, first.dtype, first.encoding):
            raise _untied(source, spec, first)
        own = quantum(spec.shape, spec.encoding, tensor_wide=True)
        tasks += [(spec, first, r) for r in chunks(spec.shape, own, CHUNK_ELEMENTS)]

    def compare(task: tuple[TensorSpec, TensorSpec, range], scratch: Scratch) -> None:
        spec, first, rows = task
        if not _same(source.read(spec.name, rows, scratch), source.read(first.name, rows, Scratch())):
            raise _untied(source, spec, first)

    workers.map(compare, tasks)


def _untied(source: Source, spec: TensorSpec, first: TensorSpec) -> CheckError:
    return CheckError(
        f"{source.info.name}: {spec.name} is tied to {first.name}, and the file holds another tensor under each name",
        hint='set "tie_word_embeddings" in config.json to false if the model has both',
    )


def _places(plan: Plan) -> dict[str, dict[str, _Place]]:
    """Where every part goes; each exactly once, inside its file, beside the others.

    :raises PlanError: a bug of the format.
    """
    parts = {
        (s.placed.output.name, part.name): (part, _record(part, row_count(s.placed.output.shape)))
        for s in plan.steps
        for part in s.placed.parts
    }
    found: dict[str, dict[str, _Place]] = {s.placed.output.name: {} for s in plan.steps}
    for number, file in enumerate(plan.files):
        end = len(file.prefix)
        placed: list[PartAt | BytesAt] = [*file.parts, *file.between]
        for at in sorted(placed, key=_span):
            if isinstance(at, BytesAt):
                if at.offset < end:
                    raise PlanError(f"{file.path or plan.format}: bytes at {at.offset} overlap: a bug of the format")
                end = at.offset + len(at.data)
                continue
            known = parts.pop((at.output, at.part), None)
            if known is None or known[0].nbytes != at.nbytes or at.offset < end:
                raise PlanError(f"{file.path or plan.format}: {at.part} is laid out wrongly: a bug of the format")
            end = at.offset + at.nbytes
            found[at.output][at.part] = _Place(number, at.offset, known[0], dtype_of(known[0].dtype), known[1])
    if parts:
        raise PlanError(f"{plan.format}: no file has {[part for _, part in parts][:3]}: a bug of the format")
    return found


def _span(at: PartAt | BytesAt) -> tuple[int, int]:
    return at.offset, len(at.data) if isinstance(at, BytesAt) else at.nbytes


def _record(part: Part, rows: int) -> int:
    records = 1 if part.per == "tensor" else max(1, -(-rows // part.rows))
    if part.nbytes % records:
        raise PlanError(f"{part.name}: {part.nbytes} bytes are not {records} records: a bug of the format")
    return part.nbytes // records


def _tensor_reports(
    works: Sequence[_Work], tasks: Sequence[Task], measured: Sequence[Sequence[Energies]]
) -> Iterator[TensorReport]:
    totals = [Energies() for _ in works]
    for task, found in zip(tasks, measured, strict=True):
        for (index, _), one in zip(task.outputs, found, strict=True):
            totals[index] = totals[index].plus(one)
    for work, total in zip(works, totals, strict=True):
        step = work.step
        action = "repack" if step.action == "keep" and step.placed.held.encoding is not None else step.action
        out, layout = step.placed.output, step.placed.held.layout
        yield TensorReport(out.name, action, layout, out.numel, *total, nbytes=step.nbytes)


def _element(shape: tuple[int, ...], rows: range, index: int | None) -> str:
    """``[3, 17]``: an element of the whole tensor, from its index in a chunk."""
    if index is None:
        return ":"
    flat = rows.start * row_length(shape) + index
    place: list[int] = []
    for extent in reversed(shape):
        flat, inside = divmod(flat, extent)
        place.append(inside)
    return f"[{', '.join(map(str, reversed(place)))}]" if shape else ""


def _keep(work: _Work) -> str:
    return f"leave it as it is: --keep '{work.name}'"


def _same(a: Rows, b: Rows) -> bool:
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equal(b)
    return same_bits(a, b)


def _owned(value: Rows) -> Rows:
    """A copy on the CPU that shares nothing with buffers or the source, and that autograd may use."""
    with torch.inference_mode(False), torch.no_grad():
        return value.to("cpu").clone()

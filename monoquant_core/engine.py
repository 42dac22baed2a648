"""Carries out plans: reads rows, quantizes, packs, checks and writes them at offsets that are known beforehand.

A task is a range of rows of one output, or of several that are made of the same rows of the source. Tasks run on
threads, each with buffers of its own; neither the number of threads nor the size of the chunks changes a byte. A
journal of finished tasks would be written where their results arrive, in :meth:`Workers.map`, and read where the tasks
of a run are listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from monoquant_core.commit import Destination, check_apart, commit_all
from monoquant_core.errors import CheckError, DeviceError, EncodingError, PlanError
from monoquant_core.exporters import Exporter
from monoquant_core.gather import Reading, ReadOnce, Rows, join
from monoquant_core.memory import FreedMemory, default_threads, peak_bytes, resident_bytes, working_bytes
from monoquant_core.metrics import Energies
from monoquant_core.model import Source, TensorSpec
from monoquant_core.planning import Decision, Plan, Step
from monoquant_core.report import Progress, ProgressCallback, Report, TensorReport
from monoquant_core.rows import chunks, quantum
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats
from monoquant_core.store import Store, places_of, same_rows
from monoquant_core.tasks import CHUNK_ELEMENTS, Task, check_steps, elements_of_tasks, schedule, waits_for
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.work import RowMaker, Work, keep_hint
from monoquant_core.workers import Workers

DEVICE_CHUNKS = 64  #: a task for an accelerator is this many times larger
DEVICE_THREADS = 4  #: enough to keep it busy while others read and write; each has a chunk on it


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is carried out. None of it changes the bytes."""

    threads: int = 0  #: 0 is one per usable core, at most eight, for an accelerator four
    chunk_elements: int = 0  #: 0 is what suits the threads
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
    began, start_bytes, earlier_bytes = time.perf_counter(), resident_bytes(), peak_bytes()
    device = find_device(options.device)
    threads = _threads(options, device)
    predicted = working_bytes(plans, threads, _chunk_elements(options, threads, device))
    steps = [step for plan in plans for step in plan.steps]
    for plan in plans:
        check_steps(plan.steps)
    works, tasks = _works(steps, _chunk_elements(options, threads, device), device, stats)
    places = [places_of(plan) for plan in plans]
    protect = [path for plan in plans for path in (*plan.info.paths, *plan.info.side_files.values())]
    tell = progress or (lambda _: None)
    with contextlib.ExitStack() as opened:
        destinations = [Destination(path, plan.files, force=options.force, sources=protect) for plan, path in outputs]
        check_apart(destinations)
        for destination in destinations:
            opened.enter_context(destination)
        workers = opened.enter_context(Workers(threads))
        rows = RowMaker(source, device, options.nonfinite)
        _scan(works, tasks, rows, workers, tell)
        _compare_ties([d for plan in plans for d in plan.decisions], source, workers)
        stores: list[Store] = []  # one per step
        for plan, exporter, out, where in zip(plans, exporters, destinations, places, strict=True):
            wanted = frozenset(name for step in plan.steps for name in waits_for(step))
            stores += [Store(exporter, out, where, workers, plan.info, wanted)] * len(plan.steps)
        meter, freed = _Meter("write", works, tasks, tell), FreedMemory(start_bytes + predicted)

        def make(task: Task, scratch: Scratch) -> list[Energies]:
            reading, measured = _reading(source, task), []
            try:
                for index, r in task.outputs:
                    with _limits_of(device, works[index]):
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
            earlier_bytes=earlier_bytes,
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
    threads = _threads(options, device)
    works, tasks = _works([step], _chunk_elements(options, threads, device), device, stats)
    work = works[0]
    if work.waits_for:
        raise PlanError(f"{work.name}: is made of other outputs, which only a whole run makes")
    with Workers(threads) as workers:
        rows = RowMaker(source, device, options.nonfinite)
        _scan(works, tasks, rows, workers, lambda _: None)
        ranges = [r for task in tasks for _, r in task.outputs]

        def make(r: range, scratch: Scratch) -> Rows:
            with _limits_of(device, work):
                return _owned(rows.make(work, r, source, scratch)[0])

        made = workers.map(make, ranges)
    try:
        return join(made, step.placed.output.shape)
    except EncodingError as exc:
        raise CheckError(f"{source.info.name}: {work.name}: {exc}", hint=keep_hint(work)) from exc


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


@contextlib.contextmanager
def _limits_of(device: torch.device, work: Work) -> Iterator[None]:
    """Where a device's memory may run out, or it lacks float64: an error that says for what."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise DeviceError(f"{device}: out of memory for {work.name}", hint="fewer --threads, another --device") from exc
    except TypeError as exc:
        if device.type == "cpu" or "float64" not in str(exc):
            raise
        reason = f"{device}: {work.name}: has no float64, which {work.step.scheme} searches with"
        raise DeviceError(reason, hint="--rounding nearest, or --device cpu") from exc


class _Meter:
    """Turns finished tasks into progress, by the bytes of their sources."""

    def __init__(
        self, stage: Literal["scan", "write"], works: Sequence[Work], tasks: Sequence[Task], tell: ProgressCallback
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


def _threads(options: RunOptions, device: torch.device) -> int:
    if options.threads < 0 or options.chunk_elements < 0:
        raise PlanError(f"threads {options.threads} and chunk elements {options.chunk_elements} must not be negative")
    return options.threads or (default_threads() if device.type == "cpu" else min(default_threads(), DEVICE_THREADS))


def _chunk_elements(options: RunOptions, threads: int, device: torch.device) -> int:
    return (options.chunk_elements or elements_of_tasks(threads)) * (1 if device.type == "cpu" else DEVICE_CHUNKS)


def _works(
    steps: Sequence[Step], chunk_elements: int, device: torch.device, stats: Mapping[str, TensorStats] | None
) -> tuple[list[Work], list[Task]]:
    """What there is to do, one per step, and the tasks that do it."""
    tasks = schedule(steps, chunk_elements)
    counts = Counter(index for task in tasks for index, _ in task.outputs)
    known = stats or {}
    works = [Work(s, whole=counts[i] == 1, stats=known, device=device) for i, s in enumerate(steps)]
    return works, tasks


def _reading(source: Source, task: Task) -> Reading:
    return source if len(task.outputs) == 1 else ReadOnce(source, task.pieces)


def _scan(
    works: Sequence[Work], tasks: Sequence[Task], rows: RowMaker, workers: Workers, tell: ProgressCallback
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
        if not same_rows(source.read(spec.name, rows, scratch), source.read(first.name, rows, Scratch())):
            raise _untied(source, spec, first)

    workers.map(compare, tasks)


def _untied(source: Source, spec: TensorSpec, first: TensorSpec) -> CheckError:
    return CheckError(
        f"{source.info.name}: {spec.name} is tied to {first.name}, and the file holds another tensor under each name",
        hint='set "tie_word_embeddings" in config.json to false if the model has both',
    )


def _tensor_reports(
    works: Sequence[Work], tasks: Sequence[Task], measured: Sequence[Sequence[Energies]]
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


def _owned(value: Rows) -> Rows:
    """A copy on the CPU that shares nothing with buffers or the source, and that autograd may use."""
    with torch.inference_mode(False), torch.no_grad():
        return value.to("cpu").clone()

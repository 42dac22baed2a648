"""Carries out plans: reads rows, quantizes, packs, checks and writes them at offsets that are known beforehand.

A task is a range of rows of one output, or of several that are made of the same rows of the source. Tasks run on
threads, each with buffers of its own; neither the number of threads nor the size of the chunks changes a byte. Those
that are done are noted now and then, and a run goes on where one that was interrupted had come to: see
:mod:`monoquant_core.checkpoints`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from monoquant_core.checkpoints import SECONDS, Checkpoints, noted_chunk
from monoquant_core.commit import Destination, check_apart, commit_all
from monoquant_core.errors import CheckError, DeviceError, EncodingError, PlanError
from monoquant_core.exporters import Exporter
from monoquant_core.gather import Rows, join
from monoquant_core.identity import run_key
from monoquant_core.memory import FreedMemory, default_threads, peak_bytes, resident_bytes, working_bytes
from monoquant_core.model import Source
from monoquant_core.passes import Meter, compare_ties, limit_of, scan, scans_of, tensor_reports, write_rows
from monoquant_core.planning import Plan, Step
from monoquant_core.report import Progress, ProgressCallback, Report
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats
from monoquant_core.store import Store, places_of
from monoquant_core.tasks import FEW_THREADS, Task, check_steps, elements_of_tasks, schedule, waits_for
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
    fresh: bool = False  #: begin anew, whatever an interrupted run had done
    checkpoint_seconds: float = SECONDS  #: until the first checkpoint, and between them


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
    protect = [path for plan in plans for path in (*plan.info.paths, *plan.info.side_files.values())]
    destinations = [
        Destination(path, plan.files, force=options.force, sources=protect, journaled=True) for plan, path in outputs
    ]
    chunk = _chunk_elements(options, threads, device)
    if not options.fresh:
        usual = {_chunk_elements(options, count, device) for count in (1, FEW_THREADS + 1)}
        chunk = noted_chunk(destinations[0], usual, chunk)
    predicted = working_bytes(plans, threads, chunk)
    for plan in plans:
        check_steps(plan.steps)
    works, tasks = _works([step for plan in plans for step in plan.steps], chunk, device, stats)
    scans = scans_of(works, tasks)
    places = [places_of(plan) for plan in plans]
    tell = progress or (lambda _: None)
    scanned, written = Meter("scan", works, scans, tell), Meter("write", works, tasks, tell)
    freed = FreedMemory(start_bytes + predicted)

    def key() -> dict[str, str]:
        return run_key(plans, source, stats, tasks, device=device, nonfinite=options.nonfinite)

    with contextlib.ExitStack() as opened:
        check_apart(destinations)
        for destination in destinations:
            opened.enter_context(destination)
        workers = opened.enter_context(Workers(threads))
        log = Checkpoints(
            destinations,
            key,
            written.say,
            chunk_elements=chunk,
            seconds=options.checkpoint_seconds,
            fresh=options.fresh,
        )
        opened.enter_context(log)
        rows = RowMaker(source, device, options.nonfinite)
        resumed = scanned.skip(log.known("scan")) + written.skip(log.known("write"))
        share = resumed / max(1, scanned.total + written.total)
        if resumed:
            written.say(f"resuming: {int(100 * share)} % was done by a run that was interrupted")
        scan(works, scans, rows, workers, log, scanned)
        compare_ties([d for plan in plans for d in plan.decisions], source, workers, log)
        stores: list[Store] = []  # one per step
        for plan, exporter, out, where in zip(plans, exporters, destinations, places, strict=True):
            wanted = frozenset(name for step in plan.steps for name in waits_for(step))
            stores += [Store(exporter, out, where, workers, plan.info, wanted)] * len(plan.steps)
        measured = write_rows(works, stores, tasks, rows, workers, log, written, freed.release)
        log.finish()
        tell(Progress("sync", "", written.total, written.total))
        notes = commit_all(destinations)
        sizes = [destination.sizes() for destination in destinations]
    tell(Progress("done", "", written.total, written.total))
    seconds, peak, found = time.perf_counter() - began, peak_bytes(), iter(tensor_reports(works, tasks, measured))
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
            notes=(*plan.notes, *log.notes, *said),
            resumed=share,
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
        scan(works, scans_of(works, tasks), rows, workers)
        ranges = [r for task in tasks for _, r in task.outputs]

        def make(r: range, scratch: Scratch) -> Rows:
            try:
                return _owned(rows.make(work, r, source, scratch)[0])
            except Exception as exc:
                if (limit := limit_of(device, work, exc)) is not None:
                    raise limit from exc
                raise

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


def _owned(value: Rows) -> Rows:
    """A copy on the CPU that shares nothing with buffers or the source, and that autograd may use."""
    with torch.inference_mode(False), torch.no_grad():
        return value.to("cpu").clone()

"""The passes of a run over its tasks: numbers of whole tensors, tensors that must be the same, and the outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from monoquant_core.checkpoints import Checkpoints, FileAt
from monoquant_core.errors import CheckError, DeviceError
from monoquant_core.gather import Reading, ReadOnce
from monoquant_core.metrics import Energies
from monoquant_core.model import Source, TensorSpec
from monoquant_core.planning import Decision
from monoquant_core.report import Progress, ProgressCallback, TensorReport
from monoquant_core.rows import chunks, quantum
from monoquant_core.scratch import Scratch
from monoquant_core.store import Store, same_rows
from monoquant_core.tasks import CHUNK_ELEMENTS, Task
from monoquant_core.work import RowMaker, Work
from monoquant_core.workers import Workers


class Meter:
    """Turns finished tasks into progress, by the bytes of their sources."""

    def __init__(
        self, stage: Literal["scan", "write"], works: Sequence[Work], tasks: Sequence[Task], tell: ProgressCallback
    ) -> None:
        self.stage, self.works, self.tasks, self.tell = stage, works, tasks, tell
        self.done = self.before = 0
        self.total = sum(task.nbytes for task in tasks)

    def skip(self, numbers: Iterable[int]) -> int:
        """Count tasks that were done before, by their numbers; the bytes that these are."""
        self.done = self.before = sum(self.tasks[number].nbytes for number in numbers)
        return self.before

    def finished(self, tasks: Sequence[Task]) -> None:
        """Count tasks."""
        self.done += sum(task.nbytes for task in tasks)
        last, _ = tasks[-1].outputs[-1]
        self._tell(self.works[last].step.placed.output.name)

    def say(self, note: str) -> None:
        """Tell what the user should know right away."""
        self._tell("", note)

    def _tell(self, tensor: str, note: str = "") -> None:
        self.tell(Progress(self.stage, tensor, self.done, self.total, self.before, note))


def scans_of(works: Sequence[Work], tasks: Sequence[Task]) -> list[Task]:
    """Tasks of the first pass: of tensors whose numbers are wanted, and that are not taken in one piece anyway."""
    wanted = {index for index, work in enumerate(works) if work.wants_absmax and not work.whole}
    return [
        dataclasses.replace(task, outputs=outputs)
        for task in tasks
        if wanted and (outputs := tuple(o for o in task.outputs if o[0] in wanted))
    ]


def scan(
    works: Sequence[Work],
    scans: Sequence[Task],
    rows: RowMaker,
    workers: Workers,
    log: Checkpoints | None = None,
    meter: Meter | None = None,
) -> None:
    """The first pass: numbers of whole tensors."""

    def absmax(task: Task, scratch: Scratch) -> list[float]:
        reading = _reading(rows.source, task)
        return [rows.absmax(works[index], r, reading, scratch) for index, r in task.outputs]

    if log is None:
        found: Sequence[Sequence[float]] = workers.map(absmax, scans)
    else:
        assert meter is not None
        found = log.map(workers, "scan", absmax, scans, range(len(scans)), meter.finished)
    for task, values in zip(scans, found, strict=True):
        for (index, _), value in zip(task.outputs, values, strict=True):
            works[index].absmax = max(works[index].absmax or 0.0, value)


def compare_ties(decisions: Sequence[Decision], source: Source, workers: Workers, log: Checkpoints) -> None:
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

    def compare(task: tuple[TensorSpec, TensorSpec, range], scratch: Scratch) -> tuple[()]:
        spec, first, rows = task
        if not same_rows(source.read(spec.name, rows, scratch), source.read(first.name, rows, Scratch())):
            raise _untied(source, spec, first)
        return ()

    log.map(workers, "ties", compare, tasks, range(len(tasks)))


def write_rows(
    works: Sequence[Work],
    stores: Sequence[Store],
    tasks: Sequence[Task],
    rows: RowMaker,
    workers: Workers,
    log: Checkpoints,
    meter: Meter,
    release: Callable[[], None],
) -> list[Sequence[float]]:
    """The main pass: rows read, made, packed, checked and written.

    :param works: one per step, as ``stores`` are.
    :param release: called now and then.
    :return: for each task, the energies of its outputs one after another.
    """
    files = [store.files_of(work.step.placed.output.name) for work, store in zip(works, stores, strict=True)]

    def make(task: Task, scratch: Scratch) -> list[float]:
        reading, measured = _reading(rows.source, task), list[float]()
        try:
            for index, r in task.outputs:
                work = works[index]
                value, found = rows.make(work, r, reading, scratch)
                stores[index].put(work, r, value)
                measured += found
        except BaseException as exc:
            for index, r in task.outputs:
                works[index].tell_others(r, exc)
            if (limit := limit_of(rows.device, work, exc)) is not None:
                raise limit from exc
            raise
        return measured

    def finished(done: Sequence[Task]) -> None:
        meter.finished(done)
        release()

    def writes(task: Task) -> Iterator[FileAt]:
        return itertools.chain.from_iterable(files[index] for index, _ in task.outputs)

    _recall(works, stores, tasks, log.known("write"), rows.device)
    early = sum(not task.late for task in tasks)
    measured = log.map(workers, "write", make, tasks, range(early), finished, writes)
    for work, store in zip(works, stores, strict=True):
        if work.waits_for:
            work.receive(store.kept)
    return measured + log.map(workers, "write", make, tasks, range(early, len(tasks)), finished, writes)


def limit_of(device: torch.device, work: Work, failure: BaseException) -> DeviceError | None:
    """What a failure says of the device, if it does: its memory ran out, or it lacks float64."""
    if isinstance(failure, torch.OutOfMemoryError):
        return DeviceError(f"{device}: out of memory for {work.name}", hint="fewer --threads, another --device")
    if isinstance(failure, TypeError) and device.type != "cpu" and "float64" in str(failure):
        reason = f"{device}: {work.name}: has no float64, which {work.step.scheme} searches with"
        return DeviceError(reason, hint="--rounding nearest, or --device cpu")
    return None


def tensor_reports(
    works: Sequence[Work], tasks: Sequence[Task], measured: Sequence[Sequence[float]]
) -> Iterator[TensorReport]:
    """What was measured of every output.

    :param measured: of every task, as :func:`write_rows` gives it.
    """
    totals = [Energies() for _ in works]
    for task, found in zip(tasks, measured, strict=True):
        each = iter(found)
        for index, _ in task.outputs:
            totals[index] = totals[index].plus(Energies(*itertools.islice(each, len(Energies._fields))))
    for work, total in zip(works, totals, strict=True):
        step = work.step
        action = "repack" if step.action == "keep" and step.placed.held.encoding is not None else step.action
        out, layout = step.placed.output, step.placed.held.layout
        yield TensorReport(out.name, action, layout, out.numel, *total, nbytes=step.nbytes)


def _reading(source: Source, task: Task) -> Reading:
    return source if len(task.outputs) == 1 else ReadOnce(source, task.pieces)


def _recall(
    works: Sequence[Work],
    stores: Sequence[Store],
    tasks: Sequence[Task],
    known: Mapping[int, object],
    device: torch.device,
) -> None:
    """What later tasks need of those that an interrupted run had done: it is in the files."""
    if not known:
        return
    unfinished = {index for number, task in enumerate(tasks) if number not in known for index, _ in task.outputs}
    for number in known:
        for index, r in tasks[number].outputs:
            if r.start == 0 and index in unfinished:
                stores[index].recall(works[index], device)
    for store in {id(store): store for store in stores}.values():
        store.recall_kept()


def _untied(source: Source, spec: TensorSpec, first: TensorSpec) -> CheckError:
    return CheckError(
        f"{source.info.name}: {spec.name} is tied to {first.name}, and the file holds another tensor under each name",
        hint='set "tie_word_embeddings" in config.json to false if the model has both',
    )

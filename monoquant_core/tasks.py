"""How outputs are cut into tasks: ranges of rows that are worked on together. Imports no torch."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from monoquant_core.encoding import Encoding, param_shape
from monoquant_core.errors import EncodingError, PlanError
from monoquant_core.model import TensorSpec
from monoquant_core.planning import Step
from monoquant_core.reencode import can_reencode, lift
from monoquant_core.rows import all_rows, chunk_shape, chunks, quantum, row_count, row_length

CHUNK_ELEMENTS = 1 << 19  #: large beside what a task costs, small beside a cache (docs/performance.md)
FEW_THREADS = 4  #: more wait for one another between torch's operations, unless these take longer


@dataclass(frozen=True, slots=True)
class Task:
    """What one thread works on at a time: rows of one output, or of several that are made of the same rows."""

    outputs: tuple[tuple[int, range], ...]  #: (index of the step, rows of its output), to be made in this order
    nbytes: int  #: of the source that are read for it
    pieces: int = 1  #: reads from the source, each of another tensor
    late: bool = False  #: after all that are not, because it is made of parts of theirs


def elements_of_tasks(threads: int) -> int:
    """How many elements a task should have, so that threads seldom wait for Python's lock."""
    return CHUNK_ELEMENTS * (1 if threads <= FEW_THREADS else 2)


def schedule(steps: Sequence[Step], chunk_elements: int = CHUNK_ELEMENTS) -> list[Task]:
    """All tasks of a run, in order.

    Outputs that are made of the same tensors, in one plan or in several, share tasks, so that every row of the source
    is read once. Their chunks are multiples of what each of them asks for. Where one of them needs more in one piece
    (a tensor that is transposed, several experts at once), the others get the same piece.
    """
    early, late = list[Task](), list[Task]()
    for group in _groups(steps):
        waits = any(waits_for(steps[i]) for i in group)
        for task in _group_tasks(steps, group, chunk_elements):
            (late if waits else early).append(dataclasses.replace(task, late=waits) if waits else task)
    return early + late


def largest_tasks(steps: Sequence[Step], count: int, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[Task]:
    """For each set of outputs that share tasks, as many of those that take the most memory; without making all."""
    for group in _groups(steps):
        tasks = _group_tasks(steps, group, chunk_elements)
        if _alike(steps, group):
            yield from itertools.islice(tasks, count)  # of one tensor: the last one may be smaller, none is larger
        else:
            yield from heapq.nlargest(count, tasks, key=lambda task: sum(len(rows) for _, rows in task.outputs))


def task_rows(step: Step) -> int:
    """Rows of the output that must be worked on together.

    The least common multiple of what the encodings on both sides, the parts, the permutation and the source ask for.
    """
    out, placed = step.placed.output, step.placed
    proposal = placed.proposal
    needs = proposal.needs if proposal is not None else frozenset()
    count = max(1, row_count(out.shape))
    if not step.specs or "whole" in needs or (out.transform is not None and out.transform.per == "tensor"):
        return count
    if any(row_length(s.shape) != row_length(out.shape) for s in step.specs):
        return count
    # What belongs to the whole tensor is known beforehand: from the file, or from the first pass.
    known = step.action != "quantize" or "absmax" in needs
    made = [placed.held.encoding, proposal.encoding if proposal is not None else None]
    own = [quantum(out.shape, e, tensor_wide=known) for e in made if isinstance(e, Encoding)]
    theirs = [quantum(s.shape, s.encoding, tensor_wide=True) for s in step.specs]
    stored = [part.rows for part in placed.parts if part.per == "rows"]
    mapped = out.rows.quantum if out.rows is not None else 1
    return min(count, math.lcm(mapped, *own, *theirs, *stored))


def task_ranges(step: Step, chunk_elements: int = CHUNK_ELEMENTS, multiple: int = 1) -> list[range]:
    """The row ranges of an output that make one task each, in order.

    :param multiple: rows that others, who share the tasks, must have together.
    """
    shape = step.placed.output.shape
    found = list(chunks(shape, math.lcm(task_rows(step), multiple), chunk_elements))
    if len(found) > 1 and any(s.shape != shape for s in step.specs) and not _readable(step, found):
        return [all_rows(shape)]
    return found


def pieces(step: Step, rows: range) -> list[tuple[TensorSpec, range]]:
    """Which rows of which inputs are these rows of the output, before its permutation."""
    shape = step.placed.output.shape
    if len(step.specs) == 1 and step.specs[0].shape == shape:
        return [(step.specs[0], rows)]
    if len(rows) == row_count(shape):
        return [(spec, all_rows(spec.shape)) for spec in step.specs]
    found, first = [], 0
    for spec in step.specs:
        count = row_count(spec.shape)
        start, stop = max(rows.start - first, 0), min(rows.stop - first, count)
        if start < stop:
            found.append((spec, range(start, stop)))
        first += count
    return found


def waits_for(step: Step) -> tuple[tuple[str, str], ...]:
    """Parts of other outputs that an output is made of, by the names of both."""
    transform = step.placed.output.transform
    return transform.of if transform is not None else ()


def check_steps(steps: Sequence[Step]) -> None:
    """Refuse what no task could do, before anything is read.

    :raises PlanError: naming the output.
    """
    parts = {(s.placed.output.name, p.name) for s in steps for p in s.placed.parts if not waits_for(s)}
    for step in steps:
        out, rows = step.placed.output, step.placed.output.rows
        per_tensor = out.transform is not None and out.transform.per == "tensor"
        if len(steps) > 1 and waits_for(step) and not (per_tensor and parts.issuperset(waits_for(step))):
            raise PlanError(f"{out.name}: waits for parts that no other output has: a bug of the format")
        if not step.specs and out.transform is None:
            raise PlanError(f"{out.name}: has no inputs and nothing that computes it: a bug of the format")
        if not per_tensor and step.specs and sum(s.numel for s in step.specs) != out.numel:
            shapes = ", ".join(str(s.shape) for s in step.specs[:4])
            raise PlanError(f"{out.name}: {out.shape} cannot be made of {shapes}: a bug of the format")
        _check_repack(step)
        if rows is None:
            continue
        if per_tensor and len(step.specs) > 1:
            raise PlanError(f"{out.name}: joined inputs are permuted before a transform that wants each of them")
        if row_count(out.shape) % rows.quantum:
            raise PlanError(f"{out.name}: {row_count(out.shape)} rows are not whole blocks of {rows.quantum}")
        for spec in step.specs:
            if step.action == "keep" and spec.encoding is not None and not _follows_rows(spec.shape, spec.encoding):
                raise PlanError(
                    f"{spec.name}: rows are permuted, and blocks of {spec.encoding} span several of them",
                    hint="--on-unsupported dequantize",
                )


def _groups(steps: Sequence[Step]) -> list[list[int]]:
    """Indices of the steps that share inputs, directly or by way of others."""
    sets, first = _Sets(len(steps)), dict[str, int]()
    for index, step in enumerate(steps):
        for spec in step.specs:
            sets.join(first.setdefault(spec.name, index), index)
    found = []
    awaited = {output for step in steps for output, _ in waits_for(step)}
    for group in sets.groups():
        late = [i for i in group if waits_for(steps[i])]
        if late and any(steps[i].placed.output.name in awaited for i in group):
            # The others cannot wait as well, so that these read the same rows again.
            found += [[i for i in group if i not in late], *([i] for i in late)]
        else:
            found.append(group)
    return found


def _group_tasks(steps: Sequence[Step], group: Sequence[int], chunk_elements: int) -> Iterator[Task]:
    own = {i: task_rows(steps[i]) for i in group}
    parts = [n for i, n in own.items() if n < row_count(steps[i].placed.output.shape)]
    common = math.lcm(*parts)
    first = steps[group[0]]
    if _alike(steps, group) and (len(group) == 1 or len(parts) == len(group)):  # nearly all: a model has many chunks
        nbytes, count = first.specs[0].nbytes, max(1, row_count(first.specs[0].shape))
        for rows in task_ranges(first, chunk_elements, common):
            yield Task(tuple([(i, rows) for i in group]), _share(nbytes, rows, count))
        return
    if len(group) == 1:
        for rows in task_ranges(first, chunk_elements):
            yield _task(steps, {group[0]: rows})
        return
    cut = [(i, rows) for i in group for rows in task_ranges(steps[i], chunk_elements, common)]
    found = [_joined(steps, [cut[n] for n in members]) for members in _overlapping(steps, cut).groups()]
    together = [task for task in found if task is not None]
    if len(together) == len(found) and _in_order(together):
        yield from together
    else:  # inputs that are joined in different orders, or in pieces that are no boxes
        yield _task(steps, {i: all_rows(steps[i].placed.output.shape) for i in group})


def _alike(steps: Sequence[Step], group: Sequence[int]) -> bool:
    """Whether every output has the rows of one tensor, which is the same for all."""
    return all(len(steps[i].specs) == 1 and steps[i].specs[0].shape == steps[i].placed.output.shape for i in group)


def _overlapping(steps: Sequence[Step], cut: Sequence[tuple[int, range]]) -> _Sets:
    """Which row ranges of outputs read rows in common."""
    sets, spans = _Sets(len(cut)), dict[str, list[tuple[int, int, int]]]()
    for number, (index, rows) in enumerate(cut):
        for spec, inner in pieces(steps[index], rows):
            spans.setdefault(spec.name, []).append((inner.start, max(inner.stop, inner.start + 1), number))
    for found in spans.values():
        found.sort()
        _, end, first = found[0]
        for start, stop, number in found:
            if start >= end:
                first = number
            sets.join(first, number)
            end = max(end, stop)
    return sets


def _joined(steps: Sequence[Step], members: Sequence[tuple[int, range]]) -> Task | None:
    """One task of row ranges that read rows in common; None where they do not make one range of each output."""
    joined: dict[int, range] = {}
    for index, rows in members:
        known = joined.get(index, range(rows.start, rows.start))
        if known.stop != rows.start:
            return None
        joined[index] = range(known.start, rows.stop)
    reads: dict[str, range] = {}
    for index, rows in joined.items():
        if not _readable(steps[index], [rows]):
            return None
        for spec, inner in pieces(steps[index], rows):
            if reads.setdefault(spec.name, inner) != inner:
                return None
    return _task(steps, joined)


def _task(steps: Sequence[Step], rows: dict[int, range]) -> Task:
    reads = {spec.name: (spec, inner) for i, r in rows.items() for spec, inner in pieces(steps[i], r)}
    shares = (_share(spec.nbytes, inner, max(1, row_count(spec.shape))) for spec, inner in reads.values())
    return Task(tuple(rows.items()), sum(shares), len(reads))


def _share(nbytes: int, rows: range, count: int) -> int:
    """How many of the bytes of ``count`` rows are those of ``rows``, so that all shares make the whole."""
    return nbytes * rows.stop // count - nbytes * rows.start // count


def _in_order(tasks: Sequence[Task]) -> bool:
    """Whether the rows of every output come in order: later ones may wait for what the first ones find out."""
    reached: dict[int, int] = {}
    for index, rows in itertools.chain.from_iterable(task.outputs for task in tasks):
        if rows.start < reached.get(index, 0):
            return False
        reached[index] = rows.stop
    return True


class _Sets:
    """Disjoint sets of the numbers below ``count``."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def join(self, a: int, b: int) -> None:
        """Make the sets of both one."""
        a, b = self._root(a), self._root(b)
        self._parents[max(a, b)] = min(a, b)

    def groups(self) -> list[list[int]]:
        """The sets, in order of their smallest members."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parents)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def _check_repack(step: Step) -> None:
    """A finished tensor, or several that are stacked, must fit the encoding that is to be stored."""
    out, held = step.placed.output, step.placed.held.encoding
    if step.action != "keep" or held is None:
        return
    encodings = {spec.encoding for spec in step.specs}
    (source,) = encodings if len(encodings) == 1 else (None,)
    if source is None:
        raise PlanError(f"{out.name}: is made of tensors of different encodings", hint="--on-unsupported dequantize")
    try:
        lifted = lift(source, len(step.specs[0].shape), len(out.shape))
        given = sum(math.prod(param_shape(s.shape, source.block)) for s in step.specs)
        wanted = math.prod(param_shape(out.shape, lifted.block))
        answer = can_reencode(lifted, held, out.shape) if given == wanted else f"{given} blocks are not {wanted}"
    except EncodingError as exc:
        answer = str(exc)
    if answer not in ("exact", "rounds"):
        raise PlanError(
            f"{out.name}: {source} cannot be stored as {held}: {answer}", hint="--on-unsupported dequantize"
        )


def _readable(step: Step, ranges: Sequence[range]) -> bool:
    """Whether every task reads boxes of whole blocks of its inputs, as :meth:`Source.read` wants them."""
    try:
        for r in ranges:
            chunk_shape(step.placed.output.shape, r)
        for spec, rows in itertools.chain.from_iterable(pieces(step, r) for r in ranges):
            own = quantum(spec.shape, spec.encoding, tensor_wide=True)
            if rows.start % own or (rows.stop % own and rows.stop != row_count(spec.shape)):
                return False
            chunk_shape(spec.shape, rows)
    except EncodingError:
        return False
    return True


def _follows_rows(shape: tuple[int, ...], encoding: Encoding) -> bool:
    """Whether every parameter belongs to one row, or to all of them, at every level."""
    block = encoding.block
    follows = len(block) == len(shape) and (
        all(b == 1 for b in block[:-1]) or quantum(shape, encoding) >= row_count(shape)
    )
    return follows and all(_follows_rows(shape, p) for _, p in encoding.params() if isinstance(p, Encoding))

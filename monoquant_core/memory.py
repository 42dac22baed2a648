"""How outputs are cut into tasks, and what memory that takes. Imports no torch."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from monoquant_core.encoding import Encoding, param_shape
from monoquant_core.errors import EncodingError, PlanError
from monoquant_core.model import DTYPE_BITS, TensorSpec
from monoquant_core.planning import Plan, Step
from monoquant_core.reencode import can_reencode, lift
from monoquant_core.rows import all_rows, chunk_shape, chunks, quantum, row_count, row_length

CHUNK_ELEMENTS = 1 << 19  #: large beside what a task costs, small beside a cache (docs/performance.md)

_OVERHEAD = 16 << 20  #: threads' stacks, allocator arenas, headers and plan; measured
_HELD = 4 << 20  #: more than what is in use, before freed memory is looked for again


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


def task_ranges(step: Step, chunk_elements: int = CHUNK_ELEMENTS) -> list[range]:
    """The row ranges of an output that make one task each, in order."""
    shape = step.placed.output.shape
    found = list(chunks(shape, task_rows(step), chunk_elements))
    if len(found) > 1 and any(s.shape != shape for s in step.specs) and not _readable(step, found):
        return [all_rows(shape)]
    return found


def pieces(step: Step, rows: range) -> list[tuple[TensorSpec, range]]:
    """Which rows of which inputs are these rows of the output, before its permutation."""
    shape = step.placed.output.shape
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


def check_steps(steps: Sequence[Step]) -> None:
    """Refuse what no task could do, before anything is read.

    :raises PlanError: naming the output.
    """
    for step in steps:
        out, rows = step.placed.output, step.placed.output.rows
        per_tensor = out.transform is not None and out.transform.per == "tensor"
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


def working_bytes(plan: Plan, threads: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Predicted peak memory above what the process has at the start of a run: workers x chunk, never the model."""
    largest = heapq.nlargest(max(1, threads), (_task_bytes(step, chunk_elements) for step in plan.steps))
    return _OVERHEAD + sum(largest)


def usable_cores() -> int:
    """Processors this process may use: its affinity, and the quota of its control groups."""
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available is not None else os.cpu_count() or 1
    quota = min(_quotas(), default=math.inf)
    return max(1, min(cores, math.ceil(quota) if math.isfinite(quota) else cores))


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where it cannot be told."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most resident memory this process has had."""
    if found := _status("VmHWM"):
        return found
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class FreedMemory:
    """Gives freed memory back to the system once the process holds more than it should.

    Small objects that live on split what large ones leave, and the C library keeps the pieces: without this a run may
    hold 10 MB more for every GB of the model. Does nothing where the library cannot be asked (glibc can).

    :param limit: resident bytes up to which nothing happens.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def release(self) -> None:
        """To be called now and then."""
        if resident_bytes() <= self._limit or (trim := _malloc_trim()) is None:
            return
        trim(0)
        # What is in use after all must not have this called for ever.
        self._limit = max(self._limit, resident_bytes() + _HELD)


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
    for spec, rows in itertools.chain.from_iterable(pieces(step, r) for r in ranges):
        own = quantum(spec.shape, spec.encoding, tensor_wide=True)
        if rows.start % own or (rows.stop % own and rows.stop != row_count(spec.shape)):
            return False
        try:
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


def _task_bytes(step: Step, chunk_elements: int) -> int:
    """Buffers of the largest task of a step: what is read, floats and their check, codes, and packed parts."""
    out = step.placed.output
    if any(s.shape != out.shape for s in step.specs):
        rows = max(map(len, task_ranges(step, chunk_elements)))
    else:
        rows = len(next(chunks(out.shape, task_rows(step), chunk_elements)))
    elements = rows * row_length(out.shape)
    stored = DTYPE_BITS[out.dtype] / 8
    read = max((DTYPE_BITS[s.dtype] / 8 for s in step.specs), default=stored)
    encoding = step.placed.held.encoding
    if step.action == "quantize" and encoding is not None:
        per_element = read + 19  # float32 rows; the scheme's buffers; the check's; codes, packed and unpacked
        # Codes that are looked up, and searches, take more of the scheme's and the check's.
        per_element += 20 if encoding.element.table is not None else 14 if encoding.element.bits < 8 else 0
    elif encoding is not None:
        per_element = 6.0
    else:
        per_element = read + 2 * stored + 8
    if len(step.specs) > 1 or out.rows is not None or out.transform is not None:
        per_element += 2 * max(read, stored)
    return math.ceil(elements * per_element)


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    import ctypes

    try:
        return cast("Callable[[int], int]", ctypes.CDLL(None).malloc_trim)
    except (OSError, TypeError, AttributeError):
        return None


def _quotas() -> list[float]:
    """Processors that the control groups of this process allow, one number per group with a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, names = Path("/sys/fs/cgroup"), ["cpu.max"]
        elif "cpu" in controllers.split(","):
            folder, names = Path("/sys/fs/cgroup/cpu"), ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inner = folder.joinpath(*Path(group).parts[1:])
        for place in (inner, *inner.parents):
            if place != folder and folder not in place.parents:
                break
            try:
                quota, period = " ".join((place / name).read_text().strip() for name in names).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
    return found

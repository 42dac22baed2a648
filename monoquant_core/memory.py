"""What memory a run takes: predicted from its plan, and measured. Imports no torch."""

from __future__ import annotations

import functools
import heapq
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from monoquant_core.encoding import FULL
from monoquant_core.model import DTYPE_BITS
from monoquant_core.planning import Plan, Step
from monoquant_core.rows import row_length
from monoquant_core.tasks import Task, elements_of_tasks, largest_tasks

MEMBERSHIP, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_OVERHEAD = 24 << 20  #: threads' stacks, allocator arenas, headers and plan; measured
_MOST_THREADS = 8  #: more make torch's operations wait for Python's lock; measured on 16 cores (docs/decisions/0022)
_HELD = 4 << 20  #: more than what is in use, before freed memory is looked for again


def working_bytes(plans: Sequence[Plan], threads: int, chunk_elements: int = 0) -> int:
    """Predicted peak memory above what the process has at the start of a run: workers x chunk, never the model.

    :param plans: of the outputs that are written in one pass.
    :param threads: 0 is what a run takes by itself.
    :param chunk_elements: 0 is what suits the threads.
    """
    threads = threads or default_threads()
    chunk_elements = chunk_elements or elements_of_tasks(threads)
    steps = [step for plan in plans for step in plan.steps]
    tasks = (_task_bytes(task, steps) for task in largest_tasks(steps, threads, chunk_elements))
    # Schemes share what they load.
    once = max(map(_process_bytes, steps), default=0)
    return _OVERHEAD + once + sum(heapq.nlargest(threads, tasks))


def usable_cores() -> int:
    """Processors this process may use: its affinity, and the quota of its control groups."""
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available is not None else os.cpu_count() or 1
    quota = min(_quotas(), default=math.inf)
    return max(1, min(cores, math.ceil(quota) if math.isfinite(quota) else cores))


def default_threads() -> int:
    """How many threads a run has on the CPU, unless it is told."""
    return min(usable_cores(), _MOST_THREADS)


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


def _process_bytes(step: Step) -> int:
    """What its scheme loads before it can quantize."""
    asked, encoding = getattr(step.quantizer, "process_bytes", None), step.placed.held.encoding
    return int(asked(step.spec, encoding)) if asked is not None and encoding is not None else 0


def _task_bytes(task: Task, steps: Sequence[Step]) -> int:
    """Buffers of a task: those of each output's scheme, and copies of what several outputs are made of."""
    copies = task.nbytes if len(task.outputs) > 1 and task.pieces > 1 else 0
    return copies + sum(_output_bytes(steps[index], len(rows)) for index, rows in task.outputs)


def _output_bytes(step: Step, rows: int) -> int:
    """Buffers for rows of an output: what is read, floats and their check, codes, and packed parts."""
    out = step.placed.output
    elements = rows * row_length(out.shape)
    stored = DTYPE_BITS[out.dtype] / 8
    read = max((DTYPE_BITS[s.dtype] / 8 for s in step.specs), default=stored)
    encoding = step.placed.held.encoding
    if step.action == "quantize" and encoding is not None:
        per_element = read + 19  # float32 rows; the scheme's buffers; the check's; codes, packed and unpacked
        # Codes that are looked up, and searches, take more of the scheme's and the check's; and more than that where
        # the elements of a block do not follow one another, and are copied together.
        searched = encoding.element.table is not None or encoding.element.bits < 8
        per_element += 20 if encoding.element.table is not None else 14 if searched else 0
        per_element += 48 if searched and _scattered(encoding.block) else 0
    elif encoding is not None:
        per_element = 6.0
    else:
        per_element = read + 2 * stored + 18
    if len(step.specs) > 1 or out.rows is not None or out.transform is not None:
        per_element += 2 * max(read, stored)
    return math.ceil(elements * per_element)


def _scattered(block: tuple[int, ...]) -> bool:
    """Whether the elements of a block are apart in memory: it has an extent, and after it one that is not whole."""
    first = next((i for i, extent in enumerate(block) if extent != 1), len(block))
    return any(extent != FULL for extent in block[first + 1 :])


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


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, the innermost first; and whether they are of version 2.

    :param controller: "cpu", "memory": of version 1, which has a hierarchy for each.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
        own = top.joinpath(*Path(group).parts[1:])
        yield from ((folder, not controllers) for folder in (own, *own.parents) if top in (folder, *folder.parents))


def _quotas() -> list[float]:
    """Processors that the control groups of this process allow, one number per group with a limit."""
    found = []
    for folder, unified in control_groups("cpu"):
        names = ["cpu.max"] if unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = " ".join((folder / name).read_text().strip() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            found.append(int(quota) / int(period))
    return found

"""How far a run is: a bar on a terminal, a line every few seconds elsewhere, nothing when quiet."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from monoquant_core.cli.render import duration, note, printable, size
from monoquant_core.report import Progress, ProgressCallback

LINE_SECONDS = 3.0

STAGES = {"scan": "first pass", "write": "writing", "sync": "to disk", "done": "done"}


@contextmanager
def reporter(*, quiet: bool) -> Iterator[ProgressCallback | None]:
    """A callback that shows progress on stderr. It may be called from any thread."""
    if quiet:
        yield None
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield _Lines()


@contextmanager
def sample_reporter(total: int, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A callback that shows how many samples a model has seen, on stderr."""
    if quiet:
        yield None
    elif sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("calibrating", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        said = time.monotonic()

        def show(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                print(f"calibrating: {done} of {total} samples", file=sys.stderr, flush=True)

        yield show


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # transient: the summary says it all, and stdout may be the same terminal
    console = Console(stderr=True)
    bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task("", total=None)
    stage = ""

    def show(event: Progress) -> None:
        nonlocal stage
        if event.note:
            console.print(printable(event.note), markup=False, highlight=False)
        if event.note or event.stage == "done":
            return
        if event.stage != stage:
            stage = event.stage
            # What was done before this run says nothing about its rate.
            bar.reset(task, total=event.total_bytes, completed=event.done_bytes, description=STAGES[stage])
            bar.start()  # not before: what is refused in planning has nothing to show
        bar.update(task, completed=event.done_bytes)

    try:
        yield show
    finally:
        bar.stop()


class _Lines:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage = ""
        self._began = self._said = self._last = time.monotonic()
        self._before = 0  # bytes that an interrupted run had done

    def __call__(self, event: Progress) -> None:
        if event.note:
            note(event.note)
            return
        with self._lock:
            now = time.monotonic()
            if event.stage != self._stage:
                self._stage, self._began, self._before = event.stage, self._last, event.before_bytes
            self._last = now
            if now - self._said < LINE_SECONDS or not event.total_bytes:
                return
            self._said = now
            rate = (event.done_bytes - self._before) / max(now - self._began, 1e-3)
            left = duration((event.total_bytes - event.done_bytes) / rate) if rate else "?"
            done = f"{size(event.done_bytes)} of {size(event.total_bytes)}"
            line = f"{STAGES[event.stage]}: {done}, {size(rate)}/s, {left} left"
        print(line, file=sys.stderr, flush=True)

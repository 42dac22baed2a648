"""Runs that are killed and gone on with: the same bytes, the same report, and nothing is read that was done."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import DictSource, RawExporter, Tiny, make_plan

from monoquant_core import checkpoints, commit, journal, tasks, workers
from monoquant_core.engine import RunOptions, write, write_all
from monoquant_core.errors import OutputError, QuantizationError
from monoquant_core.exporters import Output, Transform
from monoquant_core.model import ModelInfo
from monoquant_core.planning import Plan
from monoquant_core.report import Progress, Report
from monoquant_core.tasks import pieces, schedule

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

HERE = Path(__file__).parent
CHUNK = 512


class Stored(DictSource):
    """Tensors that count as those of a file; every row that is read is noted in another file."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"t{i}": torch.randn(64, 64, generator=generator) for i in range(4)}
        tensors |= {"bias": torch.randn(64, generator=generator), "tied": tensors["t3"].clone()}
        super().__init__(tensors, {"tied": "t3"})
        self.file, self.log = folder / "model.raw", folder / "reads"
        if not self.file.exists():
            self.file.write_bytes(tensors["t0"].numpy().tobytes())
        self.info = ModelInfo("model.raw", paths=(self.file,))
        self.before_read: Callable[[], None] = lambda: None

    def fingerprint(self) -> str:
        return "of the tests"

    def read(self, name: str, rows: range, scratch: Any = None) -> Any:
        self.before_read()
        with open(self.log, "a") as log:
            log.write(f"{name} {rows.start} {rows.stop}\n")
        return super().read(name, rows, scratch)

    def rows_read(self) -> Counter[tuple[str, int]]:
        """How often each row was read since the last call."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        found = [(name, range(int(start), int(stop))) for name, start, stop in map(str.split, lines)]
        return Counter((name, row) for name, rows in found for row in rows)


def steps(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.round(inputs[0] / (0.5 * inputs[1].reshape(-1)))


def plans_of(source: Stored, kind: str) -> list[Plan]:
    """One file, one folder, or both: with numbers of a first pass, parts per tensor, a late output and a tie."""
    waits = Transform(steps, "tensor", "in steps of a weight's", of=(("t0", "t0.scale"),))
    outputs = [Output("bias", (64,), "float32", ("bias",), transform=waits)]
    outputs += [Output(f"t{i}", (64, 64), "float32", (f"t{i}",)) for i in range(4)]
    plans = []
    for folder in {"file": [False], "folder": [True], "two": [False, True]}[kind]:
        exporter = RawExporter(outputs)
        exporter.folder, exporter.sparing = folder, True
        schemes = {"t0": Tiny(8), "t1": Tiny(4, 8), "t2": Tiny(8, -1)}
        plans.append(make_plan(source, exporter, schemes, {"tied": "drop"}))
    return plans


def names(kind: str) -> list[str]:
    return {"file": ["file"], "folder": ["folder"], "two": ["file", "folder"]}[kind]


def content(path: Path) -> Any:
    if not path.is_dir():
        return path.read_bytes() if path.exists() else None
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def comparable(report: Report) -> dict[str, Any]:
    """What does not depend on the time and the memory that a run took."""
    found = dataclasses.asdict(report)
    return {name: found[name] for name in ("files", "source_bytes", "tensors", "notes")}


def run(base: Path, kind: str, source: Stored | None = None, **options: Any) -> list[Report]:
    source = source or Stored(base)
    progress = options.pop("progress", None)
    outputs = list(zip(plans_of(source, kind), (base / name for name in names(kind)), strict=True))
    chosen = {"threads": 2, "chunk_elements": CHUNK, "checkpoint_seconds": 0.001, **options}
    return write_all(outputs, source, RunOptions(**chosen), progress=progress)


def forked(base: Path, kind: str, die_at: int = 0, **options: Any) -> int:
    """The status of a process that runs it.

    :param die_at: the number of the read at which it is killed, once the journal has all tasks that were done by then.
    """
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        workers.POLL_SECONDS, checkpoints.SHARE = 0.002, 0.0
        source, reads = Stored(base), itertools.count(1)
        append, noted = journal.Journal.append, 0

        def appended(self: journal.Journal, done: Any) -> None:
            nonlocal noted
            append(self, done)
            noted += sum(map(len, done.values()))

        journal.Journal.append = appended  # type: ignore[method-assign]

        def die() -> None:
            number = next(reads)
            if not 0 < die_at <= number:
                return
            while number > die_at or noted < die_at - 2:  # the tie is one task of two reads
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)

        source.before_read = die
        reports = run(base, kind, source, **options)
        found = {"reports": list(map(comparable, reports)), "resumed": [report.resumed for report in reports]}
        (base / "result").write_text(json.dumps(found, default=str))
        os._exit(0)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
    finally:
        os._exit(70)


def undone(base: Path, kind: str) -> Counter[tuple[str, int]]:
    """The rows that a run must read which goes on with what the journal tells."""
    recorded = journal.read_journal(base / f".{names(kind)[0]}.journal")
    assert recorded is not None
    every = [step for plan in plans_of(Stored(base), kind) for step in plan.steps]
    tasks = schedule(every, CHUNK)
    scans = [task for task in tasks if any(every[i].placed.output.name == "t2" for i, _ in task.outputs)]
    found: Counter[tuple[str, int]] = Counter()
    for phase, items in (("scan", scans), ("write", tasks)):
        for number, task in enumerate(items):
            if number not in recorded.done.get(phase, {}):
                found.update({(s.name, row) for i, r in task.outputs for s, rs in pieces(every[i], r) for row in rs})
    if not recorded.done.get("ties"):
        found.update((name, row) for name in ("t3", "tied") for row in range(64))
    return found


SCENARIOS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_resume import *

base, seen = Path(sys.argv[2]), []
for kind in ("file", "folder", "two"):
    known = base / f"known {kind}"
    known.mkdir()
    assert forked(known, kind, checkpoint_seconds=1000.0) == 0
    whole = Stored(known).rows_read()
    wanted = [content(known / name) for name in names(kind)]
    expected = json.loads((known / "result").read_text())
    assert expected["resumed"] == [0.0] * len(wanted)
    for number, kills in enumerate([(4,), (30,), (12, 9), (5, 5, 20)]):
        place = base / f"{kind} {number}"
        place.mkdir()
        for die_at in kills:
            status = forked(place, kind, die_at)
            assert status == signal.SIGKILL, (kind, kills, die_at, status)
            assert [content(place / name) for name in names(kind)] == [None] * len(wanted)
            killed = Stored(place).rows_read()
        left = undone(place, kind)
        assert forked(place, kind) == 0
        again = Stored(place).rows_read()
        assert again == left, (again - left, left - again)
        assert sum(again.values()) < sum(whole.values())
        assert [content(place / name) for name in names(kind)] == wanted, (kind, kills)
        found = json.loads((place / "result").read_text())
        assert found["reports"] == expected["reports"], (kind, kills)
        assert sorted(p.name for p in place.iterdir()) == sorted(["model.raw", "result", *names(kind)])
        seen.append(found["resumed"][0])
print(json.dumps(seen))
"""


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    """Once, twice, three times; the rows that are read again are those of tasks that the journal does not tell."""
    done = subprocess.run([sys.executable, "-c", SCENARIOS, str(HERE), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == 12
    assert all(0 < share < 1 for share in seen)
    assert max(seen) > 0.6


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are handed over and noted many times a second."""
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(checkpoints, "SHARE", 0.0)


def slow(base: Path, seed: int = 0) -> Stored:
    source = Stored(base, seed)
    source.before_read = lambda: time.sleep(0.005)
    return source


def hidden(base: Path) -> list[str]:
    return sorted(p.name for p in base.iterdir() if p.name.startswith("."))


def interrupted(base: Path, kind: str, source: Stored | None = None, **options: Any) -> None:
    """A run that Ctrl-C ends in the middle of its main pass, when there is a journal."""
    journals = [base / f".{name}.journal" for name in names(kind)]

    def stop(progress: Progress) -> None:
        if progress.stage == "write" and 2 * progress.done_bytes > progress.total_bytes:
            until = time.monotonic() + 10
            while not all(map(Path.exists, journals)) and time.monotonic() < until:
                time.sleep(0.002)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, kind, source or slow(base), progress=stop, **options)
    partial = [f".{name}.partial" for name in names(kind)]
    assert {*partial, *(p.name for p in journals)} <= set(hidden(base))


def expected(base: Path, kind: str, seed: int = 0) -> list[Any]:
    """What an uninterrupted run writes."""
    place = base / f"expected-{seed}"
    place.mkdir(exist_ok=True)
    run(place, kind, Stored(place, seed), force=True)
    return [content(place / name) for name in names(kind)]


def told(base: Path, kind: str, **options: Any) -> tuple[list[Report], list[str]]:
    """A run, and what it said on the way."""
    notes: list[str] = []
    reports = run(base, kind, progress=lambda p: notes.append(p.note) if p.note else None, **options)
    return reports, notes


@pytest.mark.parametrize("kind", ["file", "folder", "two"])
def test_ctrl_c_keeps_what_is_noted_and_the_next_run_says_so(tmp_path: Path, quick: None, kind: str) -> None:
    wanted, first = expected(tmp_path, kind), []
    interrupted(tmp_path, kind)

    def tell(progress: Progress) -> None:
        first.append(progress)

    reports = run(tmp_path, kind, progress=tell)
    assert 0.4 < reports[0].resumed <= 1
    assert first[0].note == f"resuming: {int(100 * reports[0].resumed)} % was done by a run that was interrupted"
    assert first[0].done_bytes == first[0].before_bytes > 0  # progress starts there
    assert [p.note for p in first[1:]] == [""] * (len(first) - 1)
    assert [content(tmp_path / name) for name in names(kind)] == wanted
    assert hidden(tmp_path) == []


def test_ctrl_c_of_a_short_run_leaves_nothing(tmp_path: Path, quick: None) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "folder", checkpoint_seconds=1000.0, progress=stop)
    assert hidden(tmp_path) == []


def test_another_number_of_threads_goes_on_with_the_same_tasks(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are larger for many threads: whoever ran out of memory takes fewer."""
    monkeypatch.setattr(tasks, "CHUNK_ELEMENTS", CHUNK)
    wanted = expected(tmp_path, "file")
    assert tasks.elements_of_tasks(2) != tasks.elements_of_tasks(8)
    for first, second in ((8, 2), (2, 8)):
        interrupted(tmp_path, "file", threads=first, chunk_elements=0, force=True)
        assert run(tmp_path, "file", threads=second, chunk_elements=0, force=True)[0].resumed > 0.4
        assert [content(tmp_path / "file")] == wanted


def test_fresh_begins_anew(tmp_path: Path, quick: None) -> None:
    wanted = expected(tmp_path, "file")
    interrupted(tmp_path, "file")
    reports, notes = told(tmp_path, "file", fresh=True)
    assert (reports[0].resumed, notes) == (0.0, [])
    assert [content(tmp_path / "file")] == wanted
    assert hidden(tmp_path) == []


def test_a_refused_run_leaves_what_another_one_can_go_on_with(tmp_path: Path, quick: None) -> None:
    (tmp_path / "file").write_bytes(b"old")
    interrupted(tmp_path, "file", force=True)
    left = hidden(tmp_path)
    with pytest.raises(OutputError, match="file: already exists"):
        run(tmp_path, "file")
    assert hidden(tmp_path) == left
    assert run(tmp_path, "file", force=True)[0].resumed > 0.4
    assert [content(tmp_path / "file")] == expected(tmp_path, "file")


def other_options(base: Path) -> list[Report]:
    source = Stored(base)
    return run_plan(base, source, make_plan(source, RawExporter(), {"t0": Tiny(4)}, {"tied": "drop"}))


def run_plan(base: Path, source: Stored, plan: Plan, **options: Any) -> list[Report]:
    return [write(plan, source, base / "file", RunOptions(**{"chunk_elements": CHUNK, **options}))]


def changed_source(base: Path) -> list[Report]:
    (base / "model.raw").write_bytes(bytes(16384))
    return run(base, "file", Stored(base, seed=1))


def same_size_and_time(base: Path) -> list[Report]:
    """As in images of containers, where all files have one time."""
    status = (base / "model.raw").stat()
    (base / "model.raw").write_bytes(bytes(status.st_size))
    os.utime(base / "model.raw", ns=(status.st_atime_ns, status.st_mtime_ns))
    return run(base, "file", Stored(base, seed=1))


def no_fingerprint(base: Path) -> list[Report]:
    source = Stored(base)
    source.fingerprint = lambda: None  # type: ignore[assignment,method-assign]
    return run(base, "file", source)


def shortened(base: Path) -> list[Report]:
    os.truncate(base / ".file.partial", 100)
    return run(base, "file")


def vanished(base: Path) -> list[Report]:
    (base / ".file.partial").unlink()
    return run(base, "file")


def linked(base: Path) -> list[Report]:
    (base / ".file.partial").rename(base / "elsewhere")
    (base / ".file.partial").symlink_to(base / "elsewhere")
    return run(base, "file")


def damaged(base: Path) -> list[Report]:
    path = base / ".file.journal"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    return run(base, "file")


def together(base: Path) -> list[Report]:
    return run(base, "two")


SOMETHING_ELSE = "it wrote something else: another scheme, format, rule or option"
NOT_RESUMED = "{base}/file: an interrupted run cannot be resumed: {reason}; starting anew"
ANEW: list[tuple[Callable[[Path], list[Report]], str]] = [
    (other_options, NOT_RESUMED.replace("{reason}", f"{SOMETHING_ELSE}; it was cut into other tasks")),
    (changed_source, NOT_RESUMED.replace("{reason}", "the source is another, or has changed")),
    (same_size_and_time, NOT_RESUMED.replace("{reason}", "the source is another, or has changed")),
    (
        lambda base: run(base, "file", chunk_elements=1024),
        NOT_RESUMED.replace("{reason}", "it was cut into other tasks"),
    ),
    (lambda base: run(base, "file", nonfinite="allow"), NOT_RESUMED.replace("{reason}", "--nonfinite was another")),
    (
        no_fingerprint,
        NOT_RESUMED.replace("{reason}", "model.raw does not say what its result depends on (it has no fingerprint)"),
    ),
    (shortened, NOT_RESUMED.replace("{reason}", "its files are not as it left them")),
    (vanished, NOT_RESUMED.replace("{reason}", "its files are not as it left them")),
    (linked, NOT_RESUMED.replace("{reason}", "its files are not as it left them")),
    (together, NOT_RESUMED.replace("{reason}", "it wrote other outputs")),
    (
        damaged,
        "warning: {base}/.file.journal: damaged at byte 0: its checksum is another; "
        "what an interrupted run had done is done again",
    ),
]


@pytest.mark.parametrize(("again", "note"), ANEW, ids=[getattr(again, "__name__", "") for again, _ in ANEW])
def test_another_run_begins_anew_and_says_why(
    tmp_path: Path, quick: None, again: Callable[[Path], list[Report]], note: str
) -> None:
    interrupted(tmp_path, "file")
    reports = again(tmp_path)
    assert note.replace("{base}", str(tmp_path)) in reports[0].notes
    assert reports[0].resumed == 0.0
    made = content(tmp_path / "file")
    assert hidden(tmp_path) == []
    (tmp_path / "file").unlink()
    if again is together:
        commit._remove(tmp_path / "folder")
    if again not in (damaged, shortened, vanished, linked):
        again(tmp_path)  # as one that never was interrupted
        assert made == content(tmp_path / "file")
    else:
        assert [made] == expected(tmp_path, "file")


def test_outputs_of_one_run_are_gone_on_with_together(tmp_path: Path, quick: None) -> None:
    """A run of one of them in between takes its journal away, whatever its files look like."""
    interrupted(tmp_path, "two")
    interrupted(tmp_path, "folder")
    reports, notes = told(tmp_path, "two")
    assert notes == [f"{tmp_path}/file: an interrupted run cannot be resumed: it wrote other outputs; starting anew"]
    assert reports[0].resumed == 0.0
    assert [content(tmp_path / name) for name in names("two")] == expected(tmp_path, "two")
    assert hidden(tmp_path) == []


def test_a_torn_line_is_left_out(tmp_path: Path, quick: None) -> None:
    interrupted(tmp_path, "file")
    path = tmp_path / ".file.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    reports, notes = told(tmp_path, "file")
    assert len(notes) == (reports[0].resumed > 0)
    assert [content(tmp_path / "file")] == expected(tmp_path, "file")


def test_what_is_wrong_with_a_tensor_leaves_nothing(tmp_path: Path, quick: None) -> None:
    source = slow(tmp_path)
    source.tensors["t3"][-1, 5] = float("nan")
    source.tensors["tied"] = source.tensors["t3"]
    with pytest.raises(QuantizationError, match=r"t3\[63, 5\] is nan"):
        run(tmp_path, "file", source)
    assert hidden(tmp_path) == []


class Failing:
    """Stands in for ``os``: one function fails."""

    def __init__(self, name: str, code: int, after: int = 0) -> None:
        self.name, self.code, self.left = name, code, after

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name != self.name:
            return real

        def call(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


def until_failed(base: Path, failing: Failing) -> Stored:
    """A source whose last rows are not read before that."""
    source, reads = Stored(base), itertools.count()

    def wait() -> None:
        time.sleep(0.01)
        until = time.monotonic() + 10
        while next(reads) > 20 and failing.left >= 0 and time.monotonic() < until:
            time.sleep(0.005)

    source.before_read = wait
    return source


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="no fdatasync")
@pytest.mark.parametrize("after", [0, 1])
def test_data_that_do_not_reach_the_disk_end_the_run(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A disk tells that once, so that the last fsync might know nothing of it."""
    failing = Failing("fdatasync", errno.EIO, after)
    monkeypatch.setattr(commit, "os", failing)
    with pytest.raises(OutputError, match="file: cannot be written: Input/output error"):
        run(tmp_path, "file", until_failed(tmp_path, failing))
    assert hidden(tmp_path) == []
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(("name", "after"), [("open", 0), ("fsync", 0), ("write", 1), ("fsync", 1)])
def test_a_journal_that_cannot_be_written_is_no_reason_to_end(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    notes: list[str] = []
    failing = Failing(name, errno.ENOSPC, after)
    source = until_failed(tmp_path, failing)
    with monkeypatch.context() as patched:
        patched.setattr(journal, "os", failing)
        reports = run(tmp_path, "file", source, progress=lambda p: notes.append(p.note) if p.note else None)
    assert notes == [
        f"{tmp_path}/.file.journal: cannot be written: No space left on device; if this run is interrupted, what it "
        "does from now on is lost"
    ]
    assert list(reports[0].notes) == notes
    assert [content(tmp_path / "file")] == expected(tmp_path, "file")
    assert hidden(tmp_path) == []


def test_what_cannot_be_resumed_says_so_once_it_matters(tmp_path: Path, quick: None) -> None:
    source = slow(tmp_path)
    plan = make_plan(source, RawExporter(), {"t0": Tiny(8)}, {"tied": "drop"})
    reason = "if this run is interrupted it cannot be resumed: "
    assert run_plan(tmp_path, source, plan, force=True)[0].notes == ()  # over before a checkpoint was due
    (report,) = run_plan(tmp_path, source, plan, checkpoint_seconds=0.001, force=True)
    assert report.notes == ()
    source.info = ModelInfo("Module")
    (report,) = run_plan(tmp_path, source, plan, checkpoint_seconds=0.001, force=True)
    assert report.notes == (f"{reason}Module: its tensors are not those of files",)
    source = slow(tmp_path)
    plan.exporter.fingerprint = None  # type: ignore[union-attr]
    (report,) = run_plan(tmp_path, source, plan, checkpoint_seconds=0.001, force=True)
    said = "format raw does not say what its result depends on (it has no fingerprint)"
    assert report.notes == (f"{reason}{said}",)

    def fails() -> str:
        raise ValueError("a bug\nof the plugin")

    plan.exporter.fingerprint = fails  # type: ignore[union-attr]
    (report,) = run_plan(tmp_path, source, plan, checkpoint_seconds=0.001, force=True)
    assert report.notes == (f"{reason}format raw: its fingerprint failed: ValueError('a bug\\nof the plugin')",)
    assert hidden(tmp_path) == []

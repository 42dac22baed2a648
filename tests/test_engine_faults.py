"""Runs that are cut off: by the disk, by signals, by kill -9. The output's name holds the old output or the new one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import DictSource, RawExporter, Tiny, make_plan

from monoquant_core import commit
from monoquant_core.engine import RunOptions, write
from monoquant_core.errors import MonoquantError, OutputError, SourceError
from monoquant_core.report import Progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def model(seed: int) -> tuple[DictSource, Any, dict[str, Tiny]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{i}": torch.randn(20, 16, generator=generator) for i in range(4)}
    exporter = RawExporter()
    exporter.folder = True
    return DictSource(tensors), exporter, {"t0": Tiny(8), "t1": Tiny(4, 8), "t2": Tiny(8, -1)}


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def expected(tmp_path: Path, seed: int) -> dict[str, bytes]:
    source, exporter, schemes = model(seed)
    path = tmp_path / f"expected-{seed}"
    write(make_plan(source, exporter, schemes), source, path)
    return content(path)


class Failing:
    """Stands in for ``os`` in the commit: the n-th call that changes something fails."""

    WATCHED = ("open", "pwrite", "posix_fallocate", "fsync", "replace", "rename", "mkdir")

    def __init__(self, fail_at: int) -> None:
        self.fail_at, self.calls = fail_at, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.WATCHED:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call


def test_whichever_call_fails_the_folder_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = expected(tmp_path, 0), expected(tmp_path, 1)
    place = tmp_path / "place"
    place.mkdir()
    source, exporter, schemes = model(1)
    plan = make_plan(source, exporter, schemes)
    first, _, _ = model(0)
    options = RunOptions(threads=2, chunk_elements=100, force=True)
    for number in range(1, 500):
        if content(place / "out") != old:
            write(plan, first, place / "out", options)
        failing = Failing(number)
        failure = ""
        with monkeypatch.context() as patched:
            patched.setattr(commit, "os", failing)
            try:
                write(plan, source, place / "out", options)
            except OutputError as exc:
                failure = str(exc)
        found = content(place / "out")
        assert [p.name for p in place.iterdir()] == ["out"]
        if failing.calls < number:
            assert found == new
            assert not failure
            assert number > 40
            return
        assert failure == f"{place / 'out'}: cannot be written: No space left on device"
        assert found in (old, new)
    pytest.fail("no run succeeded")


def test_a_source_that_shrinks_leaves_the_old_output(tmp_path: Path) -> None:
    old = expected(tmp_path, 0)
    source, exporter, schemes = model(1)
    plan = make_plan(source, exporter, schemes)
    for reads in (0, 1, 5, 11):
        source.reads.clear()
        source.fail_after = reads
        with pytest.raises(SourceError, match=r"^model.raw: t\d: the file shrank"):
            write(plan, source, tmp_path / "expected-0", RunOptions(threads=2, chunk_elements=100, force=True))
        assert content(tmp_path / "expected-0") == old
        assert [p.name for p in tmp_path.iterdir()] == ["expected-0"]


def test_a_second_run_with_the_same_output_says_so_and_does_nothing(tmp_path: Path) -> None:
    new = expected(tmp_path, 1)
    source, exporter, schemes = model(1)
    plan = make_plan(source, exporter, schemes)
    refused: list[str] = []

    def again(progress: Progress) -> None:
        if progress.stage == "write" and not refused:
            other, _, _ = model(0)
            with pytest.raises(MonoquantError) as found:
                write(plan, other, tmp_path / "out", RunOptions(force=True))
            refused.append(str(found.value))
            assert other.reads == []

    write(plan, source, tmp_path / "out", progress=again)
    assert refused == [f"{tmp_path / 'out'}: in use by another run of monoquant"]
    assert content(tmp_path / "out") == new


KILLS = """
import json, os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from engine_kit import DictSource, RawExporter, Tiny, make_plan
from monoquant_core import commit
from monoquant_core.engine import RunOptions, write

def model(seed):
    generator = torch.Generator().manual_seed(seed)
    return DictSource({f"t{i}": torch.randn(64, 64, generator=generator) for i in range(4)})

def plan_for(source, folder):
    exporter = RawExporter()
    exporter.folder = folder
    return make_plan(source, exporter, {"t0": Tiny(8), "t1": Tiny(4, 8), "t2": Tiny(8, -1)})

def content(path):
    if not path.is_dir():
        return path.read_bytes() if path.exists() else None
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}

class Dying:
    def __init__(self, at):
        self.at, self.calls = at, 0
    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "pwrite", "posix_fallocate", "fsync", "replace", "rename", "mkdir", "unlink", "close"):
            return real
        def call(*args, **options):
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call

def run(seed, folder, path, dying=None):
    source = model(seed)
    plan = plan_for(source, folder)
    pid = os.fork()
    if pid == 0:
        if dying:
            commit.os = Dying(dying)
        write(plan, source, path, RunOptions(threads=2, chunk_elements=2048, force=True))
        os._exit(0)
    return pid

def killed(base, mode, kind, count):
    folder = kind != "file"
    exchanges = commit._renameat2
    if kind == "folder without exchange":
        commit._renameat2 = lambda: None
    base.mkdir()
    known = []
    for seed in (0, 1):
        os.waitpid(run(seed, folder, base / "known"), 0)
        known.append(content(base / "known"))
    path = base / "out"
    began = time.perf_counter()
    os.waitpid(run(0, folder, path), 0)
    duration = time.perf_counter() - began
    assert content(path) == known[0]
    rng, seen = random.Random(7), []
    for number in range(1, count + 1):
        before = content(path)
        turn = 1 - known.index(before) if before in known else 1
        pid = run(turn, folder, path, dying=number if mode == "call" else None)
        if mode == "moment":
            time.sleep(rng.random() * duration * 1.2)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found = content(path)
        # Where names cannot be exchanged there is a moment without any; the next run puts the old output back.
        gone = found is None and kind == "folder without exchange" and (base / ".out.old").exists()
        assert found in known or gone, f"a mixture after {mode} {number}"
        seen.append("gone" if gone else "new" if found == known[turn] else "old")
        if mode == "call" and os.WIFEXITED(status):
            break
    os.waitpid(run(0, folder, path), 0)
    assert content(path) == known[0]
    left = sorted(p.name for p in base.iterdir())
    assert left == ["known", "out"], left
    commit._renameat2 = exchanges
    return seen

cases = [("moment", "file", 15), ("moment", "folder", 30)]
cases += [("call", kind, 300) for kind in ("file", "folder", "folder without exchange")]
print(json.dumps([killed(Path(sys.argv[2]) / str(i), *case) for i, case in enumerate(cases)]))
"""


def test_kill_9_leaves_the_old_output_or_the_new_one(tmp_path: Path) -> None:
    """At random moments, thirty of them over a folder, and then at every call that changes something."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(HERE), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments, calls = (found := json.loads(done.stdout))[:2], found[2:]
    assert [len(seen) for seen in moments] == [15, 30]
    assert {outcome for seen in moments for outcome in seen} <= {"old", "new"}
    for seen in calls:
        assert seen[0] == "old"
        assert seen[-1] == "new"
    assert ["gone" in seen for seen in calls] == [False, False, True]


SIGNALS = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from engine_kit import DictSource, RawExporter, Tiny, make_plan
from monoquant_core.engine import RunOptions, write

def stop(*_):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have

def slow(q, context):
    time.sleep(0.2)
    return q

source = DictSource({"w": torch.randn(1000, 64)})
exporter = RawExporter()
exporter.folder = sys.argv[3] == "folder"
plan = make_plan(source, exporter, {"w": Tiny(8, spoil=slow)})
def tell(progress):
    print(progress.stage, flush=True)
try:
    write(plan, source, Path(sys.argv[2]), RunOptions(threads=2, chunk_elements=64, force=True), progress=tell)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "status", "kind"), [(signal.SIGINT, 130, "folder"), (signal.SIGTERM, 143, "file")], ids=["int", "term"]
)
def test_signals_end_a_run_soon_and_leave_nothing(tmp_path: Path, number: int, status: int, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
        (path / "config.json").write_bytes(b"old")
    else:
        path.write_bytes(b"old")
    command = [sys.executable, "-c", SIGNALS, str(HERE), str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "write\n", child.stderr and child.stderr.read()
        began = time.monotonic()
        child.send_signal(number)
        assert child.wait(20) == status
        assert time.monotonic() - began < 5  # the promise itself, not a speed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert ((path / "config.json") if kind == "folder" else path).read_bytes() == b"old"

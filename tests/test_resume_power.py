"""Runs that end with the power, or in the middle of their commit: what is gone on with is what was on the disk."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_resume import Stored, content, expected, hidden, names, quick, run, told  # noqa: F401

from monoquant_core import commit, journal

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc for the names of open files")

HERE = Path(__file__).parent
SECTOR = 512


class Disk:
    """Stands in for ``os``: notes what is on the disk for certain, each time that a journal gets there."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.folders: dict[str, set[str]] = {}
        self.moments: list[tuple[dict[str, bytes], dict[str, set[str]]]] = []

    @property
    def records(self) -> int:
        """Lines of journals after the first."""
        found = [data for path, data in list(self.files.items()) if path.endswith(".journal")]
        return sum(max(0, data.count(b"\n") - 1) for data in found)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path):
            self.folders[path] = set(os.listdir(path))
        else:
            self.files[path] = Path(path).read_bytes()
        if path.endswith(".journal") or os.path.isdir(path):
            self.moments.append((dict(self.files), {name: set(found) for name, found in self.folders.items()}))


def survives(base: Path, path: str, folders: dict[str, set[str]]) -> bool:
    """Whether a file is there after all, by the names that are on the disk."""
    while path != str(base):
        folder, name = os.path.split(path)
        if name not in folders.get(folder, set()):
            return False
        path = folder
    return True


@pytest.mark.parametrize("kind", ["file", "folder", "two"])
def test_after_power_loss_the_journal_never_says_too_much(
    tmp_path: Path,
    quick: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Only what was synced is there, and of the rest some sectors: as they became, or as zeros."""
    base, disk, rng = tmp_path / "base", Disk(), random.Random(1)
    base.mkdir()
    wanted = expected(tmp_path, kind)
    source, reads = Stored(base), itertools.count(1)

    def wait() -> None:
        """Every tenth read for a checkpoint, whatever the disk of this machine takes for one."""
        if next(reads) % 10 == 0:
            before, until = disk.records, time.monotonic() + 20
            while disk.records == before and time.monotonic() < until:
                time.sleep(0.002)

    source.before_read = wait
    with monkeypatch.context() as patched:
        patched.setattr(commit, "os", disk)
        patched.setattr(journal, "os", disk)
        run(base, kind, source)
    assert [content(base / name) for name in names(kind)] == wanted
    shares = []
    moments = disk.moments[:6] + disk.moments[6 : -1 : max(1, len(disk.moments) // 5)]
    for number, (files, folders) in enumerate(moments):
        place = tmp_path / str(number)
        place.mkdir()
        shutil.copy2(base / "model.raw", place / "model.raw")
        for path, data in files.items():
            if not survives(base, path, folders):
                continue
            there = place / Path(path).relative_to(base)
            final = base / str(Path(path).relative_to(base)).replace(".partial", "").replace("/.", "/").lstrip(".")
            mixed = bytearray(data)
            if not path.endswith(".journal"):
                later = final.read_bytes()
                assert len(later) == len(data)
                for start in range(0, len(mixed), SECTOR):
                    if rng.random() < 0.3:
                        mixed[start : start + SECTOR] = later[start : start + SECTOR]
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(mixed)
        reports, _ = told(place, kind)
        assert [content(place / name) for name in names(kind)] == wanted
        assert hidden(place) == []
        shares.append(reports[0].resumed)
        shutil.rmtree(place)
    assert shares[0] == 0
    assert max(shares) > 0.3
    assert len(set(shares)) > 2


KILLS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_resume import *

class Dying:
    def __init__(self, at):
        self.at, self.calls = at, itertools.count(1)
    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir", "open"):
            return real
        def call(*args, **options):
            if next(self.calls) == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call

def dying(base, kind, at, exchanges):
    # dies at that call since everything was written
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        if not exchanges:
            commit._renameat2 = lambda: None
        workers.POLL_SECONDS, checkpoints.SHARE = 0.002, 0.0
        finish, died = checkpoints.Checkpoints.finish, Dying(at)
        def finished(self):
            while self._journal is None or self._pending:
                time.sleep(0.002)
            finish(self)
            commit.os = died
            if exchanges:
                real = commit._exchange
                def exchange(*args):
                    if next(died.calls) == died.at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)
                commit._exchange = exchange
        checkpoints.Checkpoints.finish = finished
        run(base, kind, force=True)
        os._exit(0)
    finally:
        os._exit(70)

base, seen = Path(sys.argv[2]), {}
for kind, exchanges in (("file", True), ("folder", True), ("folder", False), ("two", True)):
    wanted = expected(base, kind)
    shutil.rmtree(base / "expected-0")
    label = f"{kind} {exchanges}"
    place = base / label
    place.mkdir()
    # what is replaced has the same names and sizes, as another quantization of the same model has
    old = [content(place / name) for name in names(kind) if run(place, kind, Stored(place, seed=1), force=True)]
    old = [content(place / name) for name in names(kind)]
    (place / "model.raw").unlink()
    Stored(place)
    kept = base / "kept"
    shutil.copytree(place, kept)
    for at in range(1, 60, 1 if label == "folder True" else 3):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        status = dying(place, kind, at, exchanges)
        found = [content(place / name) for name in names(kind)]
        for one, new, before in zip(found, wanted, old):
            gone = one is None and not exchanges and (place / ".folder.old").exists()
            assert gone or one in (new, before), (label, at)
        journaled = (place / f".{names(kind)[0]}.journal").exists()
        reports = run(place, kind, force=True, checkpoint_seconds=1000.0)
        assert [content(place / name) for name in names(kind)] == wanted, (label, at)
        assert hidden(place) == [], (label, at)
        assert (reports[0].resumed > 0) == (journaled and status == 9), (label, at, reports[0].resumed)
        seen.setdefault(label, []).append(reports[0].resumed)
        if status == 0:
            break
    assert status == 0
    shutil.rmtree(kept)
print(json.dumps(seen))
"""


def test_kill_9_in_the_commit_never_takes_the_old_output_for_the_new_one(tmp_path: Path) -> None:
    """At every call that changes names: a folder that is exchanged leaves the old one where the partial was."""
    done = subprocess.run(
        [sys.executable, "-c", KILLS.replace("import json, sys", "import json, shutil, sys"), str(HERE), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert sorted(seen) == ["file True", "folder False", "folder True", "two True"]
    for shares in seen.values():
        assert shares[0] > 0.9  # everything was done but the last tasks
        assert shares[-1] == 0.0

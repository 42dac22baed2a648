"""An output's name holds nothing, the old output or the complete new one, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from monoquant_core import commit
from monoquant_core.commit import Destination
from monoquant_core.errors import OutputError, PlanError, SourceError
from monoquant_core.exporters import BytesAt, FilePlan, PartAt

NEW = b"head" + bytes(4) + b"body" + b"tail"
ONE = FilePlan("", b"head", (PartAt("t", "p", 8, 4),), b"tail")
FOLDER = (
    FilePlan("model.safetensors", b"head", (PartAt("t", "p", 8, 4),), b"tail"),
    FilePlan("1_Pooling/config.json", b"{}"),
    FilePlan("config.json", b"{}"),
)
WATCHED = ("open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "rename", "mkdir", "close", "unlink")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MONOQUANT_CACHE", str(folder))
    return folder


def save(path: Path, plans: tuple[FilePlan, ...] = (ONE,), **options: Any) -> list[str]:
    with Destination(path, plans, **options) as out:
        for number, plan in enumerate(plans):
            for part in plan.parts:
                out.write_at(number, part.offset, memoryview(b"body"))
        return out.commit()


def content(path: Path) -> Any:
    """What is there: None, bytes, or a dict of files."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_bytes() if path.exists() else None


NEW_FOLDER = {"model.safetensors": NEW, "1_Pooling/config.json": b"{}", "config.json": b"{}"}
OLD_FOLDER = {"model.safetensors": b"old", "config.json": b"old", "model-2.safetensors": b"older"}


def old_folder(path: Path) -> Path:
    path.mkdir()
    for name, data in OLD_FOLDER.items():
        (path / name).write_bytes(data)
    return path


def test_a_file_has_its_parts_at_their_offsets_zeros_between_and_the_umasks_mode(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        assert save(tmp_path / "out.bin") == []
    finally:
        os.umask(mask)
    assert content(tmp_path) == {"out.bin": NEW}
    assert stat.S_IMODE((tmp_path / "out.bin").stat().st_mode) == 0o640


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    side = tmp_path / "tokenizer.json"
    side.write_bytes(b"x" * (commit.COPY_BYTES + 5))
    copied = FilePlan("tokenizer.json", copy_of=side, copy_nbytes=commit.COPY_BYTES + 5)
    with Destination(tmp_path / "out", (*FOLDER, copied)) as out:
        out.write_at(0, 8, memoryview(b"body"))
        assert not (tmp_path / "out").exists()
        out.commit()
        assert out.sizes() == {
            "model.safetensors": 16,
            "1_Pooling/config.json": 2,
            "config.json": 2,
            "tokenizer.json": commit.COPY_BYTES + 5,
        }
    assert content(tmp_path / "out") == NEW_FOLDER | {"tokenizer.json": side.read_bytes()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer.json"]


def test_without_a_commit_nothing_is_left(tmp_path: Path) -> None:
    for plans in ((ONE,), FOLDER):
        with Destination(tmp_path / "out", plans):
            assert content(tmp_path) != {}
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(KeyboardInterrupt), Destination(tmp_path / "out", plans):
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plans", [(ONE,), FOLDER])
def test_what_exists_is_kept_without_force(tmp_path: Path, plans: tuple[FilePlan, ...]) -> None:
    path = tmp_path / "out"
    save(path, plans)
    before = content(path)
    with pytest.raises(OutputError, match="already exists") as refused:
        save(path, plans)
    assert refused.value.hint == "--force replaces it"
    assert content(tmp_path) == content(tmp_path)
    assert content(path) == before


def test_force_replaces_a_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    save(tmp_path / "file", force=True)
    assert content(tmp_path / "file") == NEW
    old_folder(tmp_path / "folder")
    assert save(tmp_path / "folder", FOLDER, force=True) == []
    assert content(tmp_path / "folder") == NEW_FOLDER
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_force_replaces_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", FOLDER, force=True)
    assert content(tmp_path / "out") == NEW_FOLDER


def _link_to_file(path: Path) -> None:
    (path.parent / "other").write_bytes(b"precious")
    path.symlink_to("other")


def _link_to_folder(path: Path) -> None:
    old_folder(path.parent / "other")
    path.symlink_to("other")


def _with(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        old_folder(path)
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"precious")

    return make


def _stranger(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_bytes(b"precious")


def _inner_link(path: Path) -> None:
    old_folder(path)
    (path / "data").symlink_to("/")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "plans", "reason"),
    [
        (Path.mkdir, (ONE,), "is a folder"),
        (_link_to_file, (ONE,), "a symbolic link"),
        (_link_to_folder, FOLDER, "a symbolic link"),
        (_pipe, (ONE,), "a pipe"),
        (Path.touch, FOLDER, "is a file"),
        (_stranger, FOLDER, "does not look like the folder of a model"),
        (_with("train.py"), FOLDER, "contains train.py"),
        (_with(".git/HEAD"), FOLDER, "contains .git"),
        (_with("sub/.hidden/x.json"), FOLDER, "contains sub/.hidden"),
        (_with("sub/thesis.docx"), FOLDER, "contains sub/thesis.docx"),
        (_inner_link, FOLDER, "contains data"),
    ],
)
def test_force_does_not_replace_everything(
    tmp_path: Path, make: Callable[[Path], None], plans: tuple[FilePlan, ...], reason: str
) -> None:
    path = tmp_path / "out"
    make(path)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(OutputError, match=reason) as refused:
        save(path, plans, force=True)
    assert str(path) in str(refused.value)
    assert refused.value.hint
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize(
    "names",
    [
        ("README.md", "LICENSE", ".gitattributes"),
        ("1_Pooling/config.json", "onnx/model.onnx"),
        (".cache/huggingface/x.lock",),
    ],
)
def test_force_replaces_what_models_come_with(tmp_path: Path, names: tuple[str, ...]) -> None:
    _with(*names)(tmp_path / "out")
    save(tmp_path / "out", FOLDER, force=True)
    assert content(tmp_path / "out") == NEW_FOLDER


def test_devices_and_special_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, plans, reason in (
        (Path("/dev/null"), (ONE,), "a device"),
        (Path("/proc"), FOLDER, "mount point"),
        (Path("/"), FOLDER, "not a name"),
        (tmp_path / "..", FOLDER, "not a name"),
        (Path(), FOLDER, "not a name"),
    ):
        with pytest.raises(OutputError, match=reason):
            save(path, plans, force=True)
    home = old_folder(tmp_path / "home")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(OutputError, match="your home folder"):
        save(home, FOLDER, force=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (home / "sub").mkdir()
    monkeypatch.chdir(home / "sub")
    with pytest.raises(OutputError, match="the current folder"):
        save(home, FOLDER, force=True)
    assert (home / "model.safetensors").read_bytes() == b"old"


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    model = old_folder(tmp_path / "model")
    weights = model / "model.safetensors"
    linked = tmp_path / "link"
    linked.symlink_to(model)
    (tmp_path / "hard").hardlink_to(weights)
    blob = tmp_path / "blob.safetensors"
    blob.write_bytes(b"blob")
    (model / "linked.safetensors").symlink_to(blob)
    for path, plans, sources in (
        (model, FOLDER, [weights]),
        (model, FOLDER, [linked / "model.safetensors"]),
        (model, FOLDER, [model]),
        (model, FOLDER, [model / "linked.safetensors"]),
        (weights, (ONE,), [weights]),
        (linked / "model.safetensors", (ONE,), [weights]),
        (tmp_path / "hard", (ONE,), [weights]),
    ):
        with pytest.raises(OutputError, match="the input"):
            save(path, plans, force=True, sources=sources)
    assert weights.read_bytes() == b"old"
    save(model / "int8", FOLDER, sources=[weights])  # inside the input's folder is fine
    assert content(model / "int8") == NEW_FOLDER


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """By whatever way the folder is reached; and the second touches nothing."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Destination(tmp_path / "real" / "out", FOLDER) as first:
        before = sorted(map(str, tmp_path.rglob("*")))
        with pytest.raises(OutputError, match="in use by another run"):
            save(tmp_path / "link" / "out", FOLDER, force=True)
        assert sorted(map(str, tmp_path.rglob("*"))) == before
        save(tmp_path / "real" / "other", FOLDER)
        first.write_at(0, 8, memoryview(b"body"))
        first.commit()
    assert content(tmp_path / "real" / "out") == NEW_FOLDER
    save(tmp_path / "link" / "out", FOLDER, force=True)


def test_a_lock_held_elsewhere_counts_and_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from monoquant_core.commit import Destination\n"
        "from monoquant_core.exporters import FilePlan\n"
        "with Destination(Path(sys.argv[1]), [FilePlan('', b'x')]):\n    print('here', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        with pytest.raises(OutputError, match="in use by another run"):
            save(tmp_path / "out")
        child.kill()
    assert (tmp_path / ".out.partial").exists()
    save(tmp_path / "out")
    assert content(tmp_path) == {"out": NEW}


def test_what_dead_runs_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    save(tmp_path / "out")
    (tmp_path / "out").unlink()
    (tmp_path / ".out.partial").write_bytes(b"half")
    save(tmp_path / "out", FOLDER)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").touch()
    (tmp_path / ".out.partial").symlink_to(precious)
    save(tmp_path / "out", FOLDER, force=True)
    assert (precious / "x").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    old_folder(tmp_path / ".out.old")
    with pytest.raises(OutputError, match="already exists"):
        save(tmp_path / "out", FOLDER)
    assert content(tmp_path / "out") == OLD_FOLDER
    old_folder(tmp_path / ".out.old")
    save(tmp_path / "out", FOLDER, force=True)
    assert content(tmp_path / "out") == NEW_FOLDER
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", [None, lambda *_: _unsupported()])
def test_folders_are_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.setattr(commit, "_renameat2", lambda: call)
    old_folder(tmp_path / "out")
    save(tmp_path / "out", FOLDER, force=True)
    assert content(tmp_path / "out") == NEW_FOLDER
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _unsupported() -> int:
    import ctypes

    ctypes.set_errno(errno.EINVAL)
    return -1


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def fail(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(commit, "_renameat2", lambda: fail)
    old_folder(tmp_path / "out")
    with pytest.raises(OutputError, match="Input/output error"):
        save(tmp_path / "out", FOLDER, force=True)
    assert content(tmp_path) == {f"out/{k}": v for k, v in OLD_FOLDER.items()}


class Faults:
    """Stands in for ``os`` in one module: the n-th of the watched calls fails."""

    def __init__(self, fail_at: int, code: int = errno.EIO) -> None:
        self.fail_at, self.code, self.calls = fail_at, code, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WATCHED:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                if name == "close":  # Linux closes it all the same
                    real(*args)
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return call

    @property
    def failed(self) -> bool:
        return self.calls >= self.fail_at


@pytest.mark.parametrize("kind", ["new file", "file", "new folder", "folder", "folder without exchange"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whatever_call_fails_the_name_holds_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    """As SQLite tests it: the first call fails, then the second, until a run succeeds."""
    path = tmp_path / "out"
    plans = FOLDER if "folder" in kind else (ONE,)
    new: Any = NEW_FOLDER if "folder" in kind else NEW
    if "without" in kind:
        monkeypatch.setattr(commit, "_renameat2", lambda: None)
    for number in range(1, 200):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        old: Any = None
        if kind == "file":
            path.write_bytes(b"old")
            old = b"old"
        elif kind.startswith("folder"):
            old_folder(path)
            old = OLD_FOLDER
        faults = Faults(number, code)
        with monkeypatch.context() as patched:
            patched.setattr(commit, "os", faults)
            failure = None
            try:
                save(path, plans, force=True)
            except OutputError as exc:
                failure = str(exc)
        if failure is None:
            assert content(path) == new
        else:
            assert faults.failed
            assert failure == f"{path}: cannot be written: {os.strerror(code)}"
        assert content(path) in (old, new)
        left = {p.name for p in tmp_path.iterdir()} - {"out"}
        # Only where the deletion itself was made to fail may something stay; the next run removes it.
        assert left <= {".out.partial", ".out.old"}
        if left:
            save(path, plans, force=True)
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            assert content(path) == new
        if not faults.failed:
            assert number > 8
            return
    pytest.fail("no run succeeded")


def test_an_old_folder_that_cannot_be_deleted_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(tmp_path / "out")

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with Destination(tmp_path / "out", FOLDER, force=True) as out:
        out.write_at(0, 8, memoryview(b"body"))
        monkeypatch.setattr(commit.shutil, "rmtree", refuse)
        (note,) = out.commit()
    assert ".out.partial" in note
    assert "Permission denied" in note
    assert content(tmp_path / "out") == NEW_FOLDER


def test_a_full_disk_shows_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = FilePlan("", b"", (PartAt("t", "p", 0, 1 << 60),))
    with pytest.raises(OutputError, match="needs 1,152,921,504,606,846,976 bytes") as refused:
        save(tmp_path / "out", (huge,))
    assert "free some space" in refused.value.hint
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: real._replace(free=15))
    with pytest.raises(OutputError, match="15 are free"):
        save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quota_shows_before_any_work(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from monoquant_core.commit import Destination\n"
        "from monoquant_core.exporters import FilePlan, PartAt; from monoquant_core.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "plan = FilePlan('', b'x', (PartAt('t', 'p', 1, 10000),))\n"
        "try:\n    with Destination(Path(sys.argv[1]), [plan]): print('entered')\n"
        "except OutputError as exc: print(exc)"
    )
    out = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert out.stdout == f"{tmp_path / 'out'}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_others_fill(tmp_path: Path) -> None:
    """Blocks are allocated beforehand, so that nothing that others write later can fail a run."""
    with small_disk(tmp_path) as disk:
        plan = FilePlan("", b"", (PartAt("t", "p", 0, 40_000),))
        with Destination(disk / "out", (plan,)) as out:
            with pytest.raises(OSError, match="No space"):
                (disk / "other").write_bytes(bytes(60_000))
            out.write_at(0, 0, memoryview(bytes(40_000)))
            out.commit()
        assert (disk / "out").stat().st_size == 40_000
        with pytest.raises(OutputError, match="free in"):
            save(disk / "more", (plan,))


def test_a_folder_without_write_access(tmp_path: Path) -> None:
    drop = "import os; os.setgid(65534); os.setuid(65534)\n" if os.getuid() == 0 else ""
    script = (
        "import sys; from pathlib import Path; from monoquant_core.commit import Destination\n"
        "from monoquant_core.exporters import FilePlan; from monoquant_core.errors import OutputError\n"
        "import filelock\n"
        + drop
        + "try:\n    with Destination(Path(sys.argv[1]), [FilePlan('', b'x')]): print('entered')\n"
        "except OutputError as exc: print(exc, '|', exc.hint)"
    )
    outer = Path(tempfile.mkdtemp())  # not below a folder that only its owner may enter
    folder = outer / "folder"
    folder.mkdir(mode=0o555)
    try:
        outer.chmod(0o777)
        environment = {**os.environ, "MONOQUANT_CACHE": "/nowhere/at/all", "TMPDIR": str(outer)}
        out = subprocess.run(
            [sys.executable, "-c", script, folder / "out"], capture_output=True, text=True, env=environment
        )
        assert out.stdout == (
            f"{folder / 'out'}: cannot be written: Permission denied | write to a folder where you may create files\n"
        )
        assert list(folder.iterdir()) == []
    finally:
        shutil.rmtree(outer)


def test_without_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")
    plan = FilePlan("", b"", (PartAt("t", "p", 0, 64 * 1000),))
    with Destination(tmp_path / "out", (plan,)) as out:
        threads = [
            threading.Thread(
                target=lambda i=i: [out.write_at(0, 64 * j, memoryview(bytes([i]) * 64)) for j in range(i, 1000, 4)]
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out.commit()
    assert content(tmp_path / "out") == b"".join(bytes([j % 4]) * 64 for j in range(1000))


def test_a_disk_that_writes_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    save(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OutputError, match="nothing was written"):
        save(tmp_path / "out", force=True)
    assert content(tmp_path) == {"out": NEW}


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    save(tmp_path / "out")
    assert content(tmp_path / "out") == NEW


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, name: str = name) -> Any:
            order.append(f"{name} {os.readlink(f'/proc/self/fd/{args[0]}')}" if name == "fsync" else name)
            return real(*args)

        monkeypatch.setattr(os, name, call)
    save(tmp_path / "out", FOLDER)
    named = order.index("rename")
    hidden = tmp_path / ".out.partial"
    synced = {hidden, hidden / "1_Pooling", *(hidden / plan.path for plan in FOLDER)}
    assert {f"fsync {p}" for p in synced} == set(order[:named])
    assert order[named + 1 :] == [f"fsync {tmp_path}"]
    order.clear()
    save(tmp_path / "file")
    assert order == [f"fsync {tmp_path / '.file.partial'}", "replace", f"fsync {tmp_path}"]


def test_companions_get_their_names_before_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), real(a, b))[1])
    plans = (FilePlan("", b"graph", last=True), FilePlan("model.0123.data", b"weights"))
    save(tmp_path / "model.onnx", plans)
    assert names == ["model.0123.data", "model.onnx"]
    assert content(tmp_path) == {"model.onnx": b"graph", "model.0123.data": b"weights"}
    (tmp_path / "model.onnx").unlink()
    save(tmp_path / "model.onnx", plans)  # as after a run that died between both
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.0123.data").write_bytes(b"something else")
    with pytest.raises(OutputError, match=r"model.0123.data: already exists"):
        save(tmp_path / "model.onnx", plans)


def graph_and_data(number: int) -> tuple[FilePlan, ...]:
    data = f"model.000{number}.data"
    return (
        FilePlan("", data.encode(), last=True, companions="model.[0-9][0-9][0-9][0-9].data"),
        FilePlan(data, b"head", (PartAt("t", "p", 8, 4),), b"tail"),
    )


def test_data_of_an_earlier_output_goes_after_the_file_that_named_it(tmp_path: Path) -> None:
    for name in ("model.abcd.data", "model.0009.data.bak", "other.0001.data"):
        (tmp_path / name).write_bytes(b"not ours")
    save(tmp_path / "model.onnx", graph_and_data(1))
    (tmp_path / ".model.0007.data.partial").write_bytes(b"of a dead run with another plan")
    (tmp_path / "model.0008.data").write_bytes(b"of a run that died between its renames")
    save(tmp_path / "model.onnx", graph_and_data(2), force=True)
    kept = {"model.abcd.data", "model.0009.data.bak", "other.0001.data"}
    assert set(content(tmp_path)) == kept | {"model.onnx", "model.0002.data"}
    small = FilePlan("", b"all in one", companions="model.[0-9][0-9][0-9][0-9].data")
    save(tmp_path / "model.onnx", (small,), force=True)
    assert set(content(tmp_path)) == kept | {"model.onnx"}


def test_data_that_cannot_be_deleted_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model.onnx", graph_and_data(1))
    monkeypatch.setattr(commit, "_remove", lambda path: (_ for _ in ()).throw(OSError(errno.EPERM, "not yours")))
    monkeypatch.setattr(Destination, "_repair", lambda self: None)
    (note,) = save(tmp_path / "model.onnx", graph_and_data(2), force=True)
    assert note == f"{tmp_path / 'model.0001.data'}: what was replaced could not be deleted: not yours"
    assert content(tmp_path / "model.onnx") == b"model.0002.data"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_never_leaves_a_graph_without_its_data(tmp_path: Path) -> None:
    """Killed at every call that changes something: the file under the name always names data that is complete."""
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from test_commit import NEW, graph_and_data, save
        from monoquant_core import commit

        class Dying:
            def __init__(self, at):
                self.at, self.calls = at, 0
            def __getattr__(self, name):
                real = getattr(os, name)
                if name not in ("open", "pwrite", "fsync", "replace", "unlink", "close", "posix_fallocate"):
                    return real
                def call(*args, **options):
                    self.calls += 1
                    if self.calls == self.at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)
                return call

        folder = Path(sys.argv[2])
        path = folder / "model.onnx"
        save(path, graph_and_data(0))
        seen = set()
        for number in range(1, 200):
            pid = os.fork()
            if pid == 0:
                commit.os = Dying(number)
                save(path, graph_and_data(number % 10), force=True)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            named = path.read_text()
            assert (folder / named).read_bytes() == NEW, number
            seen.add(named == f"model.000{number % 10}.data")
            if os.WIFEXITED(status):
                break
        assert seen == {True, False}
        assert sorted(p.name for p in folder.iterdir()) == sorted(["model.onnx", named])
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_bytes_lie_between_parts(tmp_path: Path) -> None:
    plan = FilePlan("", b"head", (PartAt("t", "p", 8, 4),), between=(BytesAt(5, b"!!"), BytesAt(12, b"more")))
    assert plan.nbytes == 16
    save(tmp_path / "out", (plan,))
    assert content(tmp_path / "out") == b"head\0!!\0bodymore"


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a//b", "./a", "a\\b", "c:x", "a\0b"])
def test_names_outside_the_output_are_refused(tmp_path: Path, path: str) -> None:
    for plans in ((FilePlan(path, b"x"), FilePlan("config.json", b"x")), (ONE, FilePlan(path, b"x"))):
        with pytest.raises(PlanError, match="a bug of the format"):
            save(tmp_path / "out", plans)
    assert list(tmp_path.iterdir()) == []


def test_names_are_given_once(tmp_path: Path) -> None:
    for plans in ((), (FilePlan("a", b"x"), FilePlan("a", b"y")), (ONE, ONE), (ONE, FilePlan("a/b", b"x"))):
        with pytest.raises(PlanError, match="a bug of the format"):
            save(tmp_path / "out", plans)


def test_side_files_that_change_or_vanish(tmp_path: Path) -> None:
    side = tmp_path / "tokenizer.json"
    for planned, there in ((5, b"1234"), (3, b"1234")):
        side.write_bytes(there)
        with pytest.raises(SourceError, match=r"tokenizer.json: its size changed"):
            save(tmp_path / "out", (*FOLDER, FilePlan("tokenizer.json", copy_of=side, copy_nbytes=planned)))
    side.unlink()
    with pytest.raises(SourceError, match=r"tokenizer.json: cannot be read: No such file"):
        save(tmp_path / "out", (*FOLDER, FilePlan("tokenizer.json", copy_of=side, copy_nbytes=3)))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder") as refused:
        save(tmp_path / "a" / "out")
    assert refused.value.hint == f"make it: mkdir -p '{tmp_path / 'a'}'"
    (tmp_path / "f").touch()
    with pytest.raises(OutputError, match="there is no folder"):
        save(tmp_path / "f" / "out")
    with pytest.raises(OutputError, match="File name too long"):
        save(tmp_path / ("x" * 250))


def test_no_place_for_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save(tmp_path / "out")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="no place for its lock") as refused:
        save(tmp_path / "out2")
    assert "MONOQUANT_CACHE" in refused.value.hint


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONOQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for platform, folder in (
        ("linux", "/some/cache/monoquant"),
        ("darwin", "/home/someone/Library/Caches/monoquant"),
        ("win32", "/local/monoquant"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert commit.cache_folder() == Path(folder)

"""Outputs that appear complete or not at all: written under a hidden name beside their own, then renamed.

The output's name holds nothing, what it held before, or the complete new output, whenever the process dies. A dead run
leaves ``.NAME.partial``, or ``.NAME.old`` where a folder cannot be exchanged in one step; the next run with the same
output removes the one, unless there is a ``.NAME.journal`` and it goes on with it, and puts back the other. A file may
have companions, whose names it contains: they get their names first, and those of the file that it replaces go last.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import functools
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from monoquant_core.errors import OutputError, PlanError, SourceError

if TYPE_CHECKING:
    from monoquant_core.exporters import FilePlan

COPY_BYTES = 1 << 20

#: what a folder of a model may hold, so that ``--force`` may replace it
MODEL_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data", ".msgpack", ".h5"),
    *(".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".yaml", ".yml", ".toml", ".tiktoken", ".spm", ".vocab"),
}
MODEL_NAMES = {"LICENSE", "NOTICE", "README", "USE_POLICY", ".gitattributes", ".gitignore"}
MODEL_ENTRIES = 10_000  #: a folder with more of them is no model

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OPEN_FLAGS: int = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class Destination:
    """One output being written: a file, with companions beside it if the format has any, or a folder.

    A context manager. Entering takes the lock, repairs what a dead run left, refuses what must not be replaced, checks
    the free space and creates the files at their full size; leaving without :meth:`commit` removes them again, unless
    an interruption ends a run that has a journal.

    :param path: the output. It is a file when one of the plans has the path "".
    :param force: replace what is there, if it is a regular file or looks like the folder of a model.
    :param sources: files and folders that are being read, which must not be replaced.
    :param journaled: entering leaves the files, and those of a dead run that has a journal, to :meth:`begin`.
    :raises OutputError: naming the path and the reason.
    """

    def __init__(
        self,
        path: Path,
        plans: Sequence[FilePlan],
        *,
        force: bool = False,
        sources: Sequence[Path] = (),
        journaled: bool = False,
    ) -> None:
        self.path = path
        # The parent is resolved, the name is not: a symbolic link of this name is refused, never followed.
        self._target = Path(os.path.realpath(path.parent)) / path.name
        self._plans, self._force, self._sources = tuple(plans), force, tuple(sources)
        self._is_file = any(plan.path == "" for plan in plans)
        self._partial, self._old = _hidden(self._target, "partial"), _hidden(self._target, "old")
        self.journal = _hidden(self._target, "journal")  #: of this run, or of a dead one until :meth:`begin`
        self._journaled = journaled
        self._files: list[_File] = []
        self._lock = contextlib.ExitStack()
        self._begun = False

    def __enter__(self) -> Destination:
        _check_paths(self._plans, self._is_file, self.path)
        if self.path.name in ("", ".", ".."):
            raise OutputError(f"{self.path}: not a name for an output", hint="end the path with a name")
        folder = self._target.parent
        with _os_errors(self.path):
            exists = folder.is_dir()
        if not exists:
            raise OutputError(f"{self.path}: there is no folder {folder}", hint=f"make it: mkdir -p '{folder}'")
        try:
            self._lock.enter_context(_locked(self._target, self.path))
            with _os_errors(self.path):
                self._repair()
                self._check_replaceable()
            if not self._journaled:
                self.begin()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What interrupts a run says nothing against what it has written, and a journal tells the next one what that is.
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._close(keep=interrupted and os.path.lexists(self.journal))

    def begin(self, *, adopt: bool = False) -> None:
        """Create the files, in the place of what a dead run left.

        :param adopt: go on with its files, which are :meth:`as_planned`, and its journal.
        :raises OutputError: naming the path and the reason.
        """
        self._begun = True
        with _os_errors(self.path):
            if not adopt:
                if os.path.lexists(self.journal):
                    self._remove_dead()
                self._check_space()
            self._create(adopt=adopt)

    def as_planned(self) -> bool:
        """Whether a dead run left every file, each of the size that it is to have, and nothing else."""
        with _os_errors(self.path):
            return self._left() == {self._working(plan): plan.nbytes for plan in self._plans}

    def _left(self) -> dict[Path, int]:
        """Sizes of what a dead run left; -1 for what is no regular file."""
        wanted = [self._working(plan) for plan in self._plans]
        if self._is_file:
            paths = wanted
        else:
            folders = {self._partial, *(p for path in wanted for p in path.parents if self._partial in p.parents)}
            if not all(stat.S_ISDIR(_mode(folder) or 0) for folder in sorted(folders)):
                return {}
            paths = [folder / name for folder in folders for name in os.listdir(folder)]
            paths = [path for path in paths if path not in folders]
        found = {path: status for path in paths if (status := _status(path)) is not None}
        return {path: status.st_size if stat.S_ISREG(status.st_mode) else -1 for path, status in found.items()}

    def drop_journal(self) -> None:
        """Remove the journal, for good, before anything happens that it does not tell."""
        with _os_errors(self.path):
            if os.path.lexists(self.journal):
                _remove(self.journal)
                _sync_folder(self._target.parent)

    def write_at(self, file: int, offset: int, data: memoryview) -> None:
        """Write bytes into the file of the plan of this index. Safe to call from several threads."""
        try:
            self._files[file].write_at(offset, data)
        except OSError as exc:
            raise _output_error(self.path, exc) from exc

    def read_at(self, file: int, offset: int, nbytes: int) -> bytearray:
        """Bytes that the file of the plan of this index holds by now."""
        with _os_errors(self.path):
            return self._files[file].read_at(offset, nbytes)

    def flush(self, files: Collection[int] | None = None) -> None:
        """Wait until what was written into the files of the plans of these indices is on the disk.

        :param files: None is all of them, and their names, too.
        """
        with _os_errors(self.path):
            for index in range(len(self._files)) if files is None else sorted(files):
                self._files[index].flush()
        if files is None:
            self.flush_names()

    def flush_names(self) -> None:
        """Wait until the names of the files, and of the journal, are on the disk."""
        with _os_errors(self.path):
            if not self._is_file:
                self._sync_folders()
            _sync_folder(self._target.parent)

    def commit(self) -> list[str]:
        """Make everything durable and give it its name.

        :return: what the user should know, such as an old folder that could not be deleted.
        :raises OutputError: when the disk refuses; the name then holds what it held before, or the new output.
        """
        (notes,) = commit_all([self])
        return notes

    def names(self) -> set[Path]:
        """Every name that this output takes, hidden ones included."""
        companions = {self._target.with_name(plan.path) for plan in self._plans if self._is_file and plan.path}
        return {self._target, self._old, self.journal, *companions, *self._hidden_paths()}

    def takes(self, names: Collection[Path]) -> bool:
        """Whether one of these names may be taken for a companion that an earlier output left."""
        here = [path.name for path in names if path.parent == self._target.parent]
        return any(fnmatch.filter(here, pattern) for pattern in self._companion_patterns())

    def _sync(self) -> None:
        """Make everything durable under its hidden name."""
        with _os_errors(self.path):
            for file in self._files:
                file.finish()
            if not self._is_file:
                self._sync_folders()

    def _check(self) -> None:
        """Refuse again what must not be replaced: it may have changed since."""
        with _os_errors(self.path):
            self._check_replaceable()

    def _rename(self) -> list[str]:
        with _os_errors(self.path):
            if self._is_file:
                self._name_files()
            else:
                self._swap()
            _sync_folder(self._target.parent)
        notes = []
        for left in self._old_companions() if self._is_file else (self._partial, self._old):
            try:
                _remove(left)
            except OSError as exc:
                notes.append(f"{left}: what was replaced could not be deleted: {_reason(exc)}")
        return notes

    def sizes(self) -> dict[str, int]:
        """Bytes of every committed file by its plan's path, as the file system tells."""
        with _os_errors(self.path):
            return {file.plan.path: file.final.stat().st_size for file in self._files}

    def _repair(self) -> None:
        """Put back a folder that a dead run had moved aside, and remove partial outputs that no run goes on with."""
        if os.path.lexists(self._old):
            if os.path.lexists(self._target):
                _remove(self._old)
            else:
                os.rename(self._old, self._target)
        if not (self._journaled and os.path.lexists(self.journal)):
            self._remove_dead()

    def _remove_dead(self) -> None:
        """Remove everything that a dead run left. The journal goes first: without it nothing else counts."""
        self.drop_journal()
        for dead in self._hidden_paths() | self._dead_companions():
            _remove(dead)

    def _name_files(self) -> None:
        """Give files their names: companions first, for good, so that whatever names them finds them."""
        named = [file for file in self._files if not file.plan.last]
        last = [file for file in self._files if file.plan.last]
        for file in named:
            os.replace(file.path, file.final)
        if named and last:
            _sync_folder(self._target.parent)
        for file in last:
            os.replace(file.path, file.final)

    def _companion_patterns(self) -> list[str]:
        return [plan.companions for plan in self._plans if plan.companions]

    def _old_companions(self) -> list[Path]:
        """What earlier outputs of this name had beside them, and this one does not name."""
        own = {file.final for file in self._files}
        folder = self._target.parent
        return sorted(
            path
            for pattern in self._companion_patterns()
            for path in map(folder.joinpath, fnmatch.filter(os.listdir(folder), pattern))
            if path not in own and stat.S_ISREG(path.lstat().st_mode)
        )

    def _dead_companions(self) -> set[Path]:
        """Companions that other, dead runs had not finished."""
        folder = self._target.parent
        patterns = [_hidden(folder / pattern, "partial").name for pattern in self._companion_patterns()]
        return {folder / name for pattern in patterns for name in fnmatch.filter(os.listdir(folder), pattern)}

    def _hidden_paths(self) -> set[Path]:
        """Everything this output may have under hidden names; nothing else is ever removed."""
        companions = [self._working(plan) for plan in self._plans if self._is_file and plan.path]
        return {self._partial, *companions}

    def _check_replaceable(self) -> None:
        if not self._is_file:
            self._check_folder()
            return
        for plan in self._plans:
            target = self._target.with_name(plan.path) if plan.path else self._target
            shown = self.path.with_name(plan.path) if plan.path else self.path
            mode = _mode(target)
            if mode is None:
                continue
            _refuse_sources(target, self._sources, shown)
            if stat.S_ISDIR(mode):
                raise OutputError(
                    f"{shown}: is a folder, and this format writes a file", hint="give the name of a file"
                )
            if not stat.S_ISREG(mode):
                raise OutputError(f"{shown}: is {_kind(mode)}, which is never replaced", hint="give another name")
            # The name of a companion tells its content: one of this size was left by a run that died between renames.
            left_over = plan.path and target.stat().st_size == plan.nbytes
            if not self._force and not left_over:
                raise OutputError(f"{shown}: already exists", hint="--force replaces it")

    def _check_folder(self) -> None:
        mode = _mode(self._target)
        if mode is None:
            return
        _refuse_sources(self._target, self._sources, self.path)
        if stat.S_ISREG(mode):
            raise OutputError(
                f"{self.path}: is a file, and this format writes a folder", hint="give the name of a folder"
            )
        if not stat.S_ISDIR(mode):
            raise OutputError(f"{self.path}: is {_kind(mode)}, which is never replaced", hint="give another name")
        if reason := _place(self._target):
            raise OutputError(f"{self.path}: {reason}, which is never replaced", hint="give another name")
        if not self._force:
            raise OutputError(f"{self.path}: already exists", hint="--force replaces it")
        if reason := _foreign(self._target):
            raise OutputError(
                f"{self.path}: {reason}, so it is not replaced", hint="give another name, or delete the folder yourself"
            )

    def _check_space(self) -> None:
        needed, free = sum(plan.nbytes for plan in self._plans), shutil.disk_usage(self._target.parent).free
        if needed > free:
            raise OutputError(
                f"{self.path}: needs {needed:,} bytes, and {free:,} are free in {self._target.parent}",
                hint="free some space, or write to another disk",
            )

    def _create(self, *, adopt: bool) -> None:
        """Create every file at its full size: what is not permitted, or does not fit, fails here."""
        if not self._is_file and not adopt:
            os.mkdir(self._partial)
        for plan in self._plans:
            working = self._working(plan)
            if not self._is_file:
                working.parent.mkdir(parents=True, exist_ok=True)
            self._files.append(_File(plan, working, self._final(plan)))
            self._files[-1].begin(adopt=adopt)

    def _final(self, plan: FilePlan) -> Path:
        if self._is_file:
            return self._target.with_name(plan.path) if plan.path else self._target
        return self._target.joinpath(*PurePosixPath(plan.path).parts)

    def _working(self, plan: FilePlan) -> Path:
        """Where a file is until the commit."""
        if self._is_file:
            return _hidden(self._final(plan), "partial")
        return self._partial.joinpath(*PurePosixPath(plan.path).parts)

    def _sync_folders(self) -> None:
        folders = {self._partial}
        for file in self._files:
            folders.update(p for p in file.path.parents if self._partial in p.parents)
        for folder in sorted(folders, reverse=True):
            _sync_folder(folder)

    def _swap(self) -> None:
        """Give the new folder its name. What had the name ends up under that of the partial or the old one."""
        if not os.path.lexists(self._target):
            os.rename(self._partial, self._target)
        elif not _exchange(self._partial, self._target):
            os.rename(self._target, self._old)
            try:
                os.rename(self._partial, self._target)
            except BaseException:
                os.rename(self._old, self._target)
                raise

    def _close(self, *, keep: bool = False) -> None:
        """Close files, remove what did not get its name, release the lock."""
        try:
            for file in self._files:
                file.close()
            if self._begun and not keep:
                with contextlib.suppress(OutputError):
                    self.drop_journal()
                for path in self._hidden_paths():
                    with contextlib.suppress(OSError):
                        _remove(path)
        finally:
            self._begun = False
            self._lock.close()


def check_apart(outputs: Sequence[Destination]) -> None:
    """Refuse outputs of one run that would be written onto, or into, one another.

    :raises OutputError: naming both.
    """
    for i, output in enumerate(outputs):
        for other in outputs[:i]:
            ours, theirs = output.names(), other.names()
            if ours & theirs:
                raise OutputError(
                    f"{output.path}: two outputs of this run have this name", hint="give each a name of its own"
                )
            if output.takes(theirs) or other.takes(ours):
                raise OutputError(
                    f"{output.path}: its name is like those of the files beside {other.path}",
                    hint="give it another name",
                )
            if any(a in b.parents or b in a.parents for a in ours for b in theirs):
                raise OutputError(
                    f"{output.path}: one of it and {other.path} is inside the other", hint="write them side by side"
                )


def commit_all(outputs: Sequence[Destination]) -> list[list[str]]:
    """Make the outputs of one run durable, then give all of them their names.

    A disk that is full or fails shows before the first name is given. What remains is a failure, or a kill, between
    two renames: then some outputs are new and the others as before, each of them complete.

    :return: for each what the user should know, such as an old folder that could not be deleted.
    :raises OutputError: when the disk refuses.
    """
    for output in outputs:
        output._sync()
    for output in outputs:
        output._check()
    # A folder that is exchanged leaves the old one under the name of the partial: no journal must call it this run's.
    for output in outputs:
        output.drop_journal()
    return [output._rename() for output in outputs]


class _File:
    """A file being written at known offsets."""

    def __init__(self, plan: FilePlan, path: Path, final: Path) -> None:
        self.plan, self.path, self.final = plan, path, final
        self._fd = -1
        self._seek = threading.Lock()

    def begin(self, *, adopt: bool) -> None:
        """Create it, all zeros, or take what a dead run left; and write what is known beforehand."""
        new = 0 if adopt else os.O_CREAT | os.O_EXCL
        self._fd = os.open(self.path, os.O_RDWR | new | _OPEN_FLAGS, 0o666)
        if not adopt:
            _allocate(self._fd, self.plan.nbytes)
        if self.plan.copy_of is not None:
            self._copy(self.plan.copy_of)
            return
        self.write_at(0, memoryview(self.plan.prefix))
        for known in self.plan.between:
            self.write_at(known.offset, memoryview(known.data))
        self.write_at(self.plan.nbytes - len(self.plan.suffix), memoryview(self.plan.suffix))

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of it; ``pwrite`` where there is one, so that threads do not wait for one another."""
        while len(data):
            if hasattr(os, "pwrite"):
                written = os.pwrite(self._fd, data, offset)
            else:
                with self._seek:
                    os.lseek(self._fd, offset, os.SEEK_SET)
                    written = os.write(self._fd, data)
            if written <= 0:
                raise OSError(errno.EIO, "nothing was written")
            offset, data = offset + written, data[written:]

    def read_at(self, offset: int, nbytes: int) -> bytearray:
        """Bytes that it holds by now."""
        with self._seek:
            os.lseek(self._fd, offset, os.SEEK_SET)
            found = bytearray()
            while len(found) < nbytes:
                data = os.read(self._fd, nbytes - len(found))
                if not data:
                    raise OSError(errno.EIO, "it is shorter than it was")
                found += data
        return found

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        _datasync(self._fd)

    def finish(self) -> None:
        """Wait until it is on the disk, and close it."""
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        """Close it, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _copy(self, source: Path) -> None:
        offset = 0
        with _source_errors(source), open(source, "rb") as file:
            while True:
                data = file.read(COPY_BYTES)
                if offset + len(data) > self.plan.copy_nbytes or (not data and offset < self.plan.copy_nbytes):
                    raise SourceError(f"{source}: its size changed while it was being read", hint="try again")
                if not data:
                    return
                with _os_errors(self.final):
                    self.write_at(offset, memoryview(data))
                offset += len(data)


def cache_folder() -> Path:
    """Where this user's caches belong: ``MONOQUANT_CACHE``, else the platform's own place."""
    if chosen := os.environ.get("MONOQUANT_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~\\AppData\\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "monoquant"


@contextlib.contextmanager
def _locked(target: Path, shown: Path) -> Iterator[None]:
    """The lock of one output, which dies with the process."""
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.fsencode(os.path.normcase(target))).hexdigest()[:32] + ".lock"
    user = getattr(os, "getuid", lambda: "")()
    failure: OSError | NotImplementedError | None = None
    for folder in (cache_folder() / "locks", Path(tempfile.gettempdir()) / f"monoquant-locks-{user}"):
        lock = FileLock(folder / name, timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
        except Timeout:
            raise OutputError(f"{shown}: in use by another run of monoquant", hint="wait for it to end") from None
        except (OSError, NotImplementedError) as exc:  # a home without write access, or without locks
            failure = exc
            continue
        try:
            yield
        finally:
            lock.release()
        return
    raise OutputError(
        f"{shown}: no place for its lock: {failure}", hint="set MONOQUANT_CACHE to a folder you may write"
    )


@contextlib.contextmanager
def _os_errors(shown: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise _output_error(shown, exc) from exc


def _output_error(shown: Path, exc: OSError) -> OutputError:
    return OutputError(f"{shown}: cannot be written: {_reason(exc)}", hint=_HINTS.get(exc.errno or 0, ""))


@contextlib.contextmanager
def _source_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise SourceError(f"{source}: cannot be read: {_reason(exc)}") from exc


_HINTS = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else 0), "free some space, or write to another disk"
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "write to a folder where you may create files"),
    errno.EBUSY: "write into a folder below it",
}


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc) or type(exc).__name__


def _hidden(path: Path, what: str) -> Path:
    return path.parent / f".{path.name}.{what}"


def _check_paths(plans: Sequence[FilePlan], is_file: bool, shown: Path) -> None:
    """A format names each file once, inside the output."""
    paths = [plan.path for plan in plans]
    if not plans:
        raise PlanError(f"{shown}: the format writes no file: a bug of the format")
    for path in paths:
        parts = path.split("/") if path else []
        inside = all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in parts)
        if not inside or (is_file and len(parts) > 1) or paths.count(path) > 1:
            raise PlanError(f"{shown}: the format names a file {path!r}: a bug of the format")


def _mode(path: Path) -> int | None:
    status = _status(path)
    return None if status is None else status.st_mode


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    tests: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in tests if test(mode)), "neither a file nor a folder")


def _refuse_sources(target: Path, sources: Sequence[Path], shown: Path) -> None:
    """Refuse to replace what is being read, or a folder that holds it, by link or by its own name."""
    for source in sources:
        names = {Path(os.path.realpath(source)), Path(os.path.realpath(source.parent)) / source.name}
        same = target.exists() and source.exists() and os.path.samefile(target, source)
        if same or target in names or any(target in name.parents for name in names):
            what = "is the input" if same or target in names else f"contains the input {source}"
            raise OutputError(f"{shown}: {what}, which is never replaced", hint="give another name")


def _place(folder: Path) -> str:
    """Why a folder must not be replaced whatever it contains; "" if nothing speaks against it."""
    here, home = Path(os.path.realpath(os.curdir)), Path(os.path.realpath(os.path.expanduser("~")))
    if folder == folder.parent or os.path.ismount(folder):
        return "is a mount point"
    if folder == here or folder in here.parents:
        return "is or contains the current folder"
    if folder == home or folder in home.parents:
        return "is or contains your home folder"
    return ""


def _foreign(folder: Path) -> str:
    """What in a folder no model's folder has; "" for a folder of a model, and for an empty one."""
    names = os.listdir(folder)
    if names and not any(n == "config.json" or n.endswith((".safetensors", ".safetensors.index.json")) for n in names):
        return "does not look like the folder of a model: it has neither a config.json nor safetensors files"
    seen = 0
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            seen += 1
            entry = Path(path, name)
            if seen > MODEL_ENTRIES:
                return f"has more than {MODEL_ENTRIES} entries"
            mode = entry.lstat().st_mode
            if name in files:
                known = entry.suffix.lower() in MODEL_SUFFIXES or entry.stem in MODEL_NAMES or name in MODEL_NAMES
                fits = known and (stat.S_ISREG(mode) or stat.S_ISLNK(mode))
            else:
                fits = stat.S_ISDIR(mode) and (not name.startswith(".") or name == ".cache")
            if not fits:
                return f"contains {entry.relative_to(folder)}, which the folder of a model does not"
        if ".cache" in folders:  # of a download: bookkeeping files of any name
            folders.remove(".cache")
    return ""


def _allocate(fd: int, nbytes: int) -> None:
    """Give a new file its size; where the file system can, with its blocks, so that a full disk shows now."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(fd, nbytes)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    mode = _mode(path)
    if mode is None:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _datasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, where folders can be opened at all."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows; a folder one may write but not read
        return
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call: Callable[..., int] = library.renameat2
    except (OSError, TypeError, AttributeError):  # not Linux, or an old C library
        return None
    return call

"""Reading a file that nobody vouches for: by pread, never by mmap, so that a change is an error and not a SIGBUS."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from types import TracebackType

from monoquant_core.errors import SourceError

_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a pipe must not make opening wait; regular files do not care
)
_AT_ONCE = 1 << 30  #: systems cut larger reads short
_WINDOW = 1 << 18  #: bytes that are read at once for small pieces


class FileReader:
    """One file, open for reading at any offset, from several threads.

    Size and modification time are noted on opening and compared after every read: weights of two versions of a file
    must never be mixed.

    :raises SourceError: when the file cannot be opened or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.bytes_read = 0  #: by all threads together
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(self.path, _FLAGS)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
            self.close()
            raise SourceError(f"{self.path}: cannot be opened: {_reason(exc)}") from exc
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise SourceError(f"{self.path}: not a regular file")
        self.size = status.st_size
        self._mtime_ns = status.st_mtime_ns

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Reading it afterwards is a SourceError."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, offset: int, nbytes: int, what: str = "header") -> bytes:
        """Bytes at an offset. ``nbytes`` is checked against the file before anything is allocated.

        :param what: for messages: "tensor 'a.weight'".
        :raises SourceError: when the file is shorter, has changed, or cannot be read.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise SourceError(
                f"{self.path}: {what}: bytes {offset} to {offset + nbytes} wanted, the file has {self.size}"
            )
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), offset, what)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill a writable buffer of bytes from an offset.

        :param what: for messages: "tensor 'a.weight'".
        :raises SourceError: when the file is shorter, has changed, or cannot be read.
        """
        if self._fd < 0:
            raise SourceError(f"{self.path}: {what}: read after close", hint="read while the model is open")
        done = 0
        try:
            while done < len(buffer):
                count = self._read_at(buffer[done : done + _AT_ONCE], offset + done)
                if count == 0:
                    raise SourceError(f"{self.path}: {what}: the file has become shorter while it was read")
                done += count
            status = os.fstat(self._fd)
        except OSError as exc:
            raise SourceError(f"{self.path}: {what}: cannot be read: {_reason(exc)}") from exc
        with self._lock:
            self.bytes_read += done
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
            raise SourceError(
                f"{self.path}: {what}: the file has changed while it was read",
                hint="run again when nothing writes to it",
            )

    @property
    def fingerprint(self) -> str:
        """Tells the file, as it was when it was opened, from another one and from what it is once it has changed."""
        return f"{self.size} {self._mtime_ns}"

    def check(self, what: str) -> None:
        """Compare size and modification time with those on opening.

        :raises SourceError: when the file has changed.
        """
        self.read_into(memoryview(bytearray()), 0, what)

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        if hasattr(os, "pread"):
            data = os.pread(self._fd, len(buffer), offset)
        else:  # Windows: a position that all threads share
            with self._lock:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


class Window:
    """Small pieces of a file, most of which follow one another: many of them with one read."""

    def __init__(self, reader: FileReader) -> None:
        self._reader, self._start, self._data = reader, 0, b""

    def read(self, position: int, nbytes: int) -> bytes:
        """``nbytes`` from ``position``; the caller has seen that the file has them.

        :raises SourceError: when the file has changed or cannot be read.
        """
        first = position - self._start
        if first < 0 or first + nbytes > len(self._data):
            self._start, first = position, 0
            self._data = self._reader.read(position, min(max(nbytes, _WINDOW), self._reader.size - position))
        return self._data[first : first + nbytes]


def looks_like(reader: FileReader) -> str:
    """What a file may be that is not what its name says, as a hint; "" when nothing tells."""
    head = reader.read(0, min(64, reader.size))
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS stands in its place: git lfs pull fetches the file"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "it is a web page: download the file again"
    if head.startswith(b"PK\x03\x04"):
        return "it begins as files of torch.save (.pt) and torch.export (.pt2) do: give it that suffix"
    if head.startswith(b"GGUF"):
        return "it begins as GGUF files do: give it the suffix .gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < reader.size:
        return "it begins as safetensors files do: give it the suffix .safetensors"
    return ""


def _reason(exc: OSError | ValueError) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)

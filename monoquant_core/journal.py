"""The journal of a run: what is done and on the disk, so that a run that was killed can be gone on with. No torch.

A file of lines: a checksum, a space, a JSON document. The first line says what run it is of, each of the others what
had been done since the one before. A checksum covers its line and the checksum before it, so that no line can be
missing, changed or taken from elsewhere without that being noticed. A line counts once it is complete: the end of the
last one is what a dead run did not get to write.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MAX_BYTES = 1 << 30  #: a longer journal is none of ours

_SEED = b"monoquant journal"
_FLAGS: int = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

#: what was measured of the tasks of one pass, by their numbers
Results = dict[int, tuple[float, ...]]


class Damaged(Exception):
    """A journal that does not say what was written into it."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal is of."""

    run: str  #: a name that no other run has; outputs of one run have journals of one name
    key: Mapping[str, str]  #: everything that decides the bytes, by what it is
    number: int = 0  #: of the output among those of the run; the first one's journal tells what is done
    outputs: int = 1  #: how many there are
    chunk_elements: int = 0  #: the size of tasks


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a journal says."""

    header: Header
    done: Mapping[str, Results]  #: by the name of the pass
    end: int = field(repr=False)  #: bytes of complete lines
    chain: bytes = field(repr=False)  #: checksum of the last of them


class Journal:
    """A journal that is written. Every line is on the disk when :meth:`append` returns."""

    def __init__(self, fd: int, end: int, chain: bytes) -> None:
        self._fd, self._end, self._chain = fd, end, chain

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """A new one, with its first line.

        :raises OSError: when it cannot be written, or there is one.
        """
        journal = cls(os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666), 0, _SEED)
        try:
            journal._write({"version": VERSION, **dataclasses.asdict(header)})
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopen(cls, path: Path, recorded: Recorded) -> Journal:
        """Go on with one that was read.

        :raises OSError: when it cannot be opened.
        """
        return cls(os.open(path, _FLAGS), recorded.end, recorded.chain)

    def append(self, done: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        """Add a line: tasks that are done, by their numbers, with what was measured, for each pass.

        :raises OSError: when the disk refuses; the lines before it stay.
        """
        self._write(
            {phase: [[task, *map(float, values)] for task, values in found.items()] for phase, found in done.items()}
        )

    def close(self) -> None:
        """Close the file, which stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, document: Mapping[str, Any]) -> None:
        text = json.dumps(document, separators=(",", ":")).encode()
        chain = _checksum(self._chain, text)
        data = memoryview(b"%s %s\n" % (chain, text))
        length = len(data)
        os.ftruncate(self._fd, self._end)  # a line that was begun
        os.lseek(self._fd, self._end, os.SEEK_SET)
        while data:
            written = os.write(self._fd, data)
            if written <= 0:
                raise OSError(errno.EIO, "nothing was written")
            data = data[written:]
        os.fsync(self._fd)
        self._end, self._chain = self._end + length, chain


def read_journal(path: Path) -> Recorded | None:
    """What a journal says; None where there is none, or one without a complete first line.

    :raises Damaged: when a complete line is not what was written.
    """
    data = _content(path)
    if data is None:
        return None
    end, chain, header, done = 0, _SEED, None, dict[str, Results]()
    while (stop := data.find(b"\n", end)) >= 0:
        line = data[end:stop]
        given, _, text = line.partition(b" ")
        if given != _checksum(chain, text):
            # What a file system has not written before the power went is zeros, and nothing can follow them.
            if b"\0" in line and data.find(b"\n", stop + 1) < 0:
                break
            raise Damaged(f"{path}: damaged at byte {end}: its checksum is another")
        try:
            document = json.loads(text)
            if header is None:
                header = _header(document)
            else:
                for phase, rows in document.items():
                    done.setdefault(phase, {}).update({int(row[0]): tuple(map(float, row[1:])) for row in rows})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as exc:
            raise Damaged(f"{path}: not a journal of this version: {exc}") from exc
        end, chain = stop + 1, given
    return None if header is None else Recorded(header, done, end, chain)


def _header(document: Mapping[str, Any]) -> Header:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']!r}, {VERSION} is known")
    key = {str(label): str(value) for label, value in document["key"].items()}
    numbers = (int(document[name]) for name in ("number", "outputs", "chunk_elements"))
    return Header(str(document["run"]), key, *numbers)


def _content(path: Path) -> bytes | None:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Damaged(f"{path}: not a regular file")
        with open(os.open(path, _FLAGS), "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise Damaged(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(data) > MAX_BYTES:
        raise Damaged(f"{path}: longer than any journal")
    return data


def _checksum(chain: bytes, text: bytes) -> bytes:
    """Of a line, in hexadecimal."""
    return hashlib.blake2b(chain + text, digest_size=16).hexdigest().encode()

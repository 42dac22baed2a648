"""Reading files that change, shrink, or are not files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import SourceError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def without_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)


def without_pread(monkeypatch: pytest.MonkeyPatch) -> None:
    without_preadv(monkeypatch)
    monkeypatch.delattr(os, "pread", raising=False)


@pytest.mark.parametrize("system", [lambda _: None, without_preadv, without_pread], ids=["preadv", "pread", "seek"])
def test_reads_what_is_there_at_any_offset_and_from_threads(
    file: Path, monkeypatch: pytest.MonkeyPatch, system: object
) -> None:
    system(monkeypatch)  # type: ignore[operator]
    data = file.read_bytes()
    with FileReader(file) as reader:
        assert reader.read(0, len(data)) == data
        assert reader.read(255, 3) == data[255:258]
        assert reader.read(len(data), 0) == b""
        wrong: list[int] = []

        def read_many(start: int) -> None:
            buffer = memoryview(bytearray(61))
            for offset in range(start, len(data) - 61, 97):
                reader.read_into(buffer, offset, "tensor 'a'")
                if bytes(buffer) != data[offset : offset + 61]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read_many, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        reads = sum(len(range(i, len(data) - 61, 97)) for i in range(4))
        assert reader.bytes_read == len(data) + 3 + 61 * reads


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    with FileReader(file) as reader:
        assert reader.read(3, 1000) == file.read_bytes()[3:1003]


def test_what_leaves_the_file_is_refused_before_anything_is_allocated(file: Path) -> None:
    with FileReader(file) as reader:
        for offset, nbytes in ((0, 1 << 60), (4096, 1), (-1, 1), (1 << 62, 1)):
            with pytest.raises(SourceError, match="wanted, the file has 4096"):
                reader.read(offset, nbytes)
        assert reader.bytes_read == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 100), "tensor 'a': the file has become shorter while it was read"),
        (lambda path: os.truncate(path, 5000), "tensor 'a': the file has changed while it was read"),
        (lambda path: os.utime(path, ns=(0, 1)), "tensor 'a': the file has changed while it was read"),
    ],
    ids=["shrunk", "grown", "touched"],
)
def test_a_file_that_changes_is_an_error_that_names_file_and_tensor(file: Path, change: object, message: str) -> None:
    with FileReader(file) as reader:
        reader.read_into(memoryview(bytearray(10)), 0, "tensor 'a'")
        change(file)  # type: ignore[operator]
        with pytest.raises(SourceError) as caught:
            reader.read_into(memoryview(bytearray(10)), 4000, "tensor 'a'")
    assert str(caught.value) == f"{file}: {message}"


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(file: Path) -> None:
    before = file.read_bytes()
    with FileReader(file) as reader:
        other = file.with_name("other")
        other.write_bytes(b"new")
        os.replace(other, file)
        assert reader.read(0, 4096) == before


def test_an_error_of_the_disk_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with FileReader(file) as reader:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(SourceError) as caught:
            reader.read_into(memoryview(bytearray(10)), 0, "tensor 'a'")
    assert str(caught.value) == f"{file}: tensor 'a': cannot be read: Input/output error"


def test_what_is_not_a_file_is_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened: No such file"):
        FileReader(tmp_path / "none")
    with pytest.raises(SourceError, match="not a regular file"):
        FileReader(tmp_path)
    with pytest.raises(SourceError, match="cannot be opened: embedded null"):
        FileReader(f"{file}\0")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening one for reading would wait for a writer
        with pytest.raises(SourceError, match="not a regular file"):
            FileReader(tmp_path / "pipe")


def test_no_permission_is_one_line(file: Path) -> None:
    file.chmod(0)
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # root may read everything
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(SourceError) as caught:
            FileReader(file)
    finally:
        if root:
            os.seteuid(0)
    assert str(caught.value) == f"{file}: cannot be opened: Permission denied"


def test_a_closed_file_is_not_read_again(file: Path) -> None:
    reader = FileReader(file)
    reader.close()
    reader.close()
    with pytest.raises(SourceError, match="read after close"):
        reader.read(0, 1)

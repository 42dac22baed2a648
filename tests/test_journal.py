"""The journal's file: what is written is read, and nothing else is ever believed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.journal import Damaged, Header, Journal, Recorded, read_journal

HEADER = Header("a run", {"source": "1", "plan": "2"}, 1, 3, 1 << 19)
NUMBERS = st.floats(allow_nan=False) | st.just(0.1 + 0.2)
RESULTS = st.dictionaries(st.integers(0, 10**6), st.lists(NUMBERS, max_size=6).map(tuple), max_size=5)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["scan", "ties", "write"]), RESULTS, max_size=3), max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal"


def written(path: Path, records: list[dict[str, dict[int, tuple[float, ...]]]]) -> bytes:
    path.unlink(missing_ok=True)
    journal = Journal.create(path, HEADER)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def merged(records: list[dict[str, dict[int, tuple[float, ...]]]]) -> dict[str, dict[int, tuple[float, ...]]]:
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    for record in records:
        for phase, results in record.items():
            found.setdefault(phase, {}).update(results)
    return found


def read(path: Path, data: bytes) -> Recorded | None:
    path.write_bytes(data)
    return read_journal(path)


def believed(path: Path, data: bytes) -> Recorded | None:
    try:
        return read(path, data)
    except Damaged:
        return None


@settings(max_examples=30, deadline=None)
@given(records=RECORDS)
def test_what_is_written_is_read(path: Path, records: list[dict[str, dict[int, tuple[float, ...]]]]) -> None:
    data = written(path, records)
    found = read_journal(path)
    assert found is not None
    assert (found.header, found.done, found.end) == (HEADER, merged(records), len(data))


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, cut=st.floats(0, 1), zeros=st.integers(0, 600), rest=st.booleans())
def test_what_is_torn_counts_up_to_the_last_whole_line(
    path: Path, records: list[dict[str, dict[int, tuple[float, ...]]]], cut: float, zeros: int, rest: bool
) -> None:
    """Cut anywhere; or the last line as a file system leaves it that wrote its size, and not all of its data."""
    data = written(path, records)
    lines = data.splitlines(keepends=True)
    end = round(cut * len(data))
    torn = data[:end] + bytes(zeros)
    if rest and zeros:
        start = len(data) - len(lines[-1])
        torn = data[:start] + bytes(min(zeros, len(lines[-1]) - 1)) + lines[-1][min(zeros, len(lines[-1]) - 1) :]
        end = start
    whole = sum(len(b"".join(lines[: i + 1])) <= end for i in range(len(lines)))
    found = read(path, torn)
    if not whole:
        assert found is None
        return
    assert found is not None
    assert found.done == merged(records[: whole - 1])
    more = Journal.reopen(path, found)
    more.append({"write": {7: (1.0,)}})
    more.close()
    again = read_journal(path)
    assert again is not None
    assert again.done == merged([*records[: whole - 1], {"write": {7: (1.0,)}}])
    assert path.stat().st_size == again.end  # what was torn is gone


@settings(max_examples=150, deadline=None)
@given(records=RECORDS, at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(
    path: Path, records: list[dict[str, dict[int, tuple[float, ...]]]], at: float, flip: int
) -> None:
    """Or it tears the last line: what is believed was written, in every case."""
    data = bytearray(written(path, records))
    data[int(at * len(data))] ^= flip
    found = believed(path, bytes(data))
    whole = bytes(data).count(b"\n")
    assert found is None or found.done in [merged(records[:i]) for i in range(whole)]
    assert found is None or found.header == HEADER


@settings(max_examples=40, deadline=None)
@given(records=st.lists(st.dictionaries(st.just("write"), RESULTS, min_size=1), min_size=3, max_size=5, unique_by=repr))
def test_lines_that_are_missing_or_exchanged_are_noticed(
    path: Path, records: list[dict[str, dict[int, tuple[float, ...]]]]
) -> None:
    lines = written(path, records).splitlines(keepends=True)
    for changed in (
        lines[:1] + lines[2:],
        lines[1:],
        [*lines[:1], lines[2], lines[1], *lines[3:]],
        [*lines, lines[-1]],
    ):
        with pytest.raises(Damaged, match="its checksum is another"):
            read(path, b"".join(changed))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: b + b"\n"))
def test_anything_else_is_refused_or_nothing(path: Path, data: bytes) -> None:
    assert believed(path, data) is None


def test_numbers_stay_what_they_are(path: Path) -> None:
    """Sums of squares that overflowed, too."""
    values = (5e-324, 1.7976931348623157e308, math.inf, -math.inf, 0.1, -0.0)
    written(path, [{"write": {0: values, 1: (math.nan,)}}])
    found = read_journal(path)
    assert found is not None
    assert found.done["write"][0] == values
    assert math.copysign(1, found.done["write"][0][-1]) == -1
    assert math.isnan(found.done["write"][1][0])


def test_a_journal_of_another_version_or_kind_is_none(path: Path) -> None:
    path.unlink(missing_ok=True)
    assert read_journal(path) is None
    journal = Journal.create(path, HEADER)
    journal._write({"write": "something"})
    journal.close()
    with pytest.raises(Damaged, match="not a journal of this version"):
        read_journal(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(Damaged, match="not a regular file"):
        read_journal(path)
    path.rmdir()
    os.symlink(path.parent / "elsewhere", path)
    with pytest.raises(Damaged, match="not a regular file"):
        read_journal(path)
    path.unlink()


def test_a_journal_is_never_written_over(path: Path) -> None:
    written(path, [])
    with pytest.raises(FileExistsError):
        Journal.create(path, HEADER)

"""Headers that are wrong in every way: each is refused in one line, in memory that goes with the file."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_gguf.container import LongArray, read_array, read_header

from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import SourceError

gguf = pytest.importorskip("gguf")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    infos: list[bytes],
    pairs: tuple[bytes, ...] = (),
    *,
    data: int = 64,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
) -> bytes:
    counts = (len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *infos])
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = [info()]
HUGE = 1 << 63
ARRAY, STRING, U32, U8, BOOL = 9, 8, 4, 0, 7

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "short": (b"GGUF" + bytes(19), "too few"),
    "magic": (file(GOOD, magic=b"GGML"), "not a GGUF file"),
    "version 1": (file(GOOD, version=1), "version 1"),
    "big-endian": (file(GOOD, version=3 << 24), "big-endian"),
    "tensor count": (file(GOOD, tensors=HUGE), "9223372036854775808 tensors"),
    "key count": (file(GOOD, keys=HUGE), "9223372036854775808 keys"),
    "key length": (file(GOOD, (struct.pack("<Q", HUGE) + b"key" + bytes(20),)), "a key of"),
    "empty key": (file(GOOD, (pair("", U32, bytes(4)),)), "a key of 0 bytes"),
    "key not UTF-8": (file(GOOD, (text(b"\xff\xfe") + struct.pack("<II", U32, 1),)), "not UTF-8"),
    "key twice": (file(GOOD, (pair("k", U32, bytes(4)), pair("k", U32, bytes(4)))), "key 'k' occurs twice"),
    "value type": (file(GOOD, (pair("k", 99, bytes(4)),)), "type 99"),
    "string length": (file(GOOD, (pair("k", STRING, struct.pack("<Q", HUGE)),)), "bytes of key 'k'"),
    "boolean": (file(GOOD, (pair("k", BOOL, b"\2"),)), "a boolean of 2"),
    "array of arrays": (file(GOOD, (pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "an array of type 9"),
    "array count": (file(GOOD, (pair("k", ARRAY, struct.pack("<IQ", U8, HUGE)),)), "items of key 'k'"),
    "array of strings": (file(GOOD, (pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 40)),)), "items of key 'k'"),
    "string in a long array": (
        file(GOOD, (pair("k", ARRAY, struct.pack("<IQ", STRING, 65) + text("x") * 64 + struct.pack("<Q", HUGE)),)),
        "bytes of key 'k'",
    ),
    "alignment 0": (file(GOOD, (pair("general.alignment", U32, bytes(4)),)), "general.alignment"),
    "alignment 24": (file(GOOD, (pair("general.alignment", U32, struct.pack("<I", 24)),)), "power of two"),
    "alignment text": (file(GOOD, (pair("general.alignment", STRING, text("x")),)), "general.alignment"),
    "empty name": (file([info("")]), "tensor name of 0 bytes"),
    "long name": (file([info("n" * 64)]), "tensor name of 64 bytes"),
    "name with an escape": (file([info("a\x1b[31m")]), "impossible tensor name"),
    "name twice": (file([info("a"), info("a", offset=32)]), "tensor 'a': occurs twice"),
    "5 dimensions": (file([info(shape=(1, 1, 1, 1, 1))]), "5 dimensions"),
    "2**32 dimensions": (file([text("a") + struct.pack("<I", 0xFFFFFFFF)]), "4294967295 dimensions"),
    "wrapped shape": (file([info(shape=(1 << 32, 1 << 32))]), "impossible shape"),
    "2**62 elements": (file([info(shape=(1 << 62,))]), "wanted, the file has"),
    "unknown type": (file([info(kind=250)]), "ggml type 250"),
    "half a block": (file([info(shape=(33,), kind=8)]), "not whole blocks of 32"),
    "unaligned": (file([info(offset=4)]), "offset 4 is not a multiple of 32"),
    "beyond the file": (file([info(offset=1 << 20)]), "wanted, the file has"),
    "wrapped offset": (file([info(offset=(1 << 64) - 32)]), "wanted, the file has"),
    "overlap": (file([info("a", (16,)), info("b", (4,), offset=32)]), "tensor 'b': overlaps tensor 'a'"),
    "truncated": (file([info(shape=(64,))])[:-1], "wanted, the file has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with FileReader(path) as reader, pytest.raises(SourceError, match=message) as caught:
            read_header(reader)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak < 200_000 + 64 * len(data)


@pytest.mark.parametrize(
    ("counts", "rest", "message"),
    [
        ((HUGE, 0), b"", "9223372036854775808 tensors in the 19 bytes that are left of the file"),
        ((0, HUGE), b"", "9223372036854775808 keys in the 19 bytes that are left of the file"),
        ((0, 1), struct.pack("<QsII", 1, b"k", ARRAY, STRING), "8 bytes of key 'k' in the 2 bytes"),
        ((1, 0), struct.pack("<QsI", 1, b"w", 1) + b"\xff" * 6, "1 tensors in the 19 bytes that are left of the file"),
        ((0, 1), struct.pack("<QsIQ", 1, b"k", STRING, HUGE)[:19], "bytes of key 'k' in the"),
    ],
)
def test_43_bytes_that_claim_2_to_the_63_elements(
    counts: tuple[int, int], rest: bytes, message: str, tmp_path: Path
) -> None:
    """The gguf package's reader is busy with such a file for ever."""
    path = tmp_path / "x.gguf"
    path.write_bytes((b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest).ljust(43, b"\0"))
    assert path.stat().st_size == 43
    tracemalloc.start()
    try:
        with FileReader(path) as reader, pytest.raises(SourceError, match=message) as caught:
            read_header(reader)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_what_the_package_of_ggml_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("f", 0.5)
    writer.add_bool("b", True)
    writer.add_array("short", [1, 2, 3])
    words = [f"word {i}" for i in range(100)]
    writer.add_array("long", words)
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("m", matrix)
    writer.add_tensor("q", gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.add_tensor("i", np.arange(3, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with FileReader(path) as reader:
        header = read_header(reader)
        assert header.metadata["general.architecture"] == "llama"
        assert (header.metadata["f"], header.metadata["b"], header.metadata["short"]) == (0.5, True, [1, 2, 3])
        assert isinstance(header.metadata["long"], LongArray)
        assert read_array(reader, header.metadata["long"]) == words
        assert {n: (t.shape, t.dtype, t.nbytes) for n, t in header.tensors.items()} == {
            "m": ((2, 32), "float32", 256),
            "q": ((2, 32), "float32", 68),
            "i": ((3,), "int32", 12),
        }
        assert reader.read(header.tensors["m"].offset, 256) == matrix.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(
        file([info("a", (2, 4)), info("b", (32,), 8, 32)], (pair("k", ARRAY, struct.pack("<IQ", U8, 3) + b"abc"),))
    )
    change: Callable[..., int] = data.draw
    for _ in range(change(st.integers(1, 4))):
        whole[change(st.integers(0, len(whole) - 65))] = change(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    path.write_bytes(whole[: change(st.integers(0, len(whole)))])
    with FileReader(path) as reader:
        try:
            header = read_header(reader)
        except SourceError:
            return
        assert all(0 <= t.offset <= t.offset + t.nbytes <= reader.size for t in header.tensors.values())

"""safetensors: what its own library writes is read back, and malformed files are refused, one line each."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monoquant_core.containers.entries import MAX_HEADER
from monoquant_core.containers.reader import FileReader
from monoquant_core.containers.safetensors import DTYPES, data_offsets, header_bytes, read_header
from monoquant_core.errors import OutputError, SourceError
from monoquant_core.rows import chunks
from monoquant_core.sources import SafetensorsSource
from monoquant_core.tensor import dtype_of, same_bits

TORCH_DTYPES = sorted(DTYPES.values())


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaN payloads included; only bools are 0 and 1."""
    width = dtype_of(dtype).itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (math.prod(shape) * width,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype_of(dtype)).view(shape)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, which is bytes, or what JSON can say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def info(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_specs_of_every_dtype_equal_those_of_the_library(tmp_path: Path) -> None:
    tensors = {f"t.{name}": random_tensor(name, (3, 4)) for name in TORCH_DTYPES}
    reference.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path / "a.safetensors")
    assert source.info.metadata == {"format": "pt"}
    assert {s.name: (s.dtype, s.shape) for s in source.specs()} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert same_bits(source.read(name, range(3)), tensor), name


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(TORCH_DTYPES), shapes),
        min_size=1,
        max_size=5,
    ),
    max_elements=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_what_the_library_wrote_reads_back_bit_for_bit_in_chunks(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    max_elements: int,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    made = {name: random_tensor(dtype, shape, seed) for name, (dtype, shape) in tensors.items()}
    made = {n: t.reshape(1) if t.dtype == torch.float4_e2m1fn_x2 and not t.shape else t for n, t in made.items()}
    reference.save_file(made, path)
    source = SafetensorsSource(path)
    assert [s.name for s in source.specs()] == list(source.headers[path].tensors)
    for spec in source.specs():
        parts = [source.read(spec.name, rows) for rows in chunks(spec.shape, 1, max_elements)]
        whole = torch.cat([p.reshape(-1).view(torch.uint8) for p in parts])
        assert same_bits(whole, made[spec.name].reshape(-1).view(torch.uint8))
        assert all(p.dtype == made[spec.name].dtype and p.dim() == len(spec.shape) for p in parts)
    source.close()


@settings(max_examples=40, deadline=None)
@given(
    entries=st.dictionaries(
        st.text(min_size=1, max_size=8, alphabet="abc.é日_"),
        st.tuples(st.sampled_from(TORCH_DTYPES), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)),
        min_size=1,
        max_size=6,
    ),
    metadata=st.one_of(st.none(), st.just({"format": "pt"})),
)
def test_our_headers_are_those_of_the_library(
    entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: random_tensor(dtype, shape) for name, (dtype, shape) in entries.items()}
    theirs = reference.save(tensors, metadata)
    ours = header_bytes(entries, metadata)
    assert len(ours) % 8 == 0
    assert theirs[: len(ours)] == ours
    for name, (begin, end) in data_offsets(entries).items():
        stored = theirs[len(ours) + begin : len(ours) + end]
        assert stored == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


def test_headers_do_not_depend_on_the_order_of_what_goes_into_them() -> None:
    entries = {"b": ("float32", (2,)), "a": ("int64", ()), "c": ("bool", (3,))}
    turned = dict(reversed(entries.items()))
    assert header_bytes(entries, {"x": "1", "a": "2"}) == header_bytes(turned, {"a": "2", "x": "1"})
    assert list(data_offsets(entries)) == ["a", "b", "c"]  # by width: every offset is aligned


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": ("complex128", (2,))}, "tensor 'a': safetensors cannot hold dtype complex128"),
        ({"__metadata__": ("float32", (2,))}, "tensor '__metadata__': safetensors reserves this name"),
    ],
)
def test_headers_that_cannot_be_written(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(OutputError, match=message):
        header_bytes(entries)


TWO = {"a": info(), "b": info(begin=8, end=16)}

MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "not an object": (b"[1]     ", b"", "not a safetensors file: its header does not start with '{'"),
    "leading space": (b" {}", b"", "not a safetensors file: its header does not start with '{'"),
    "not JSON": (b"{'a': 1}", b"", "header: not valid JSON: Expecting property name"),
    "cut JSON": (b'{"a": {"dtype"', b"", "header: not valid JSON: Expecting ':' delimiter"),
    "not UTF-8": (b'{"\xff": 1}', b"", "header: not valid JSON: 'utf-8' codec can't decode"),
    "deep nesting": (b'{"a": ' + b"[" * 100_000, b"", "header: not valid JSON: maximum recursion depth exceeded"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", "header: not valid JSON: Exceeds the limit"),
    "NaN": (b'{"a": NaN}', b"", "header: not valid JSON: NaN is not a JSON number"),
    "repeated tensor": (b'{"a": 1, "b": 2, "a": 3}', b"", "header: not valid JSON: key 'a' occurs twice"),
    "repeated field": (
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
        "key 'dtype' occurs twice",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is a map of strings, got {'a': 1}"),
    "metadata is a list": ({"__metadata__": ["a"]}, b"", "__metadata__ is a map of strings, got ['a']"),
    "no name": ({"": info()}, bytes(8), "impossible tensor name ''"),
    "name with an escape": ({"\x1b[31m": info()}, bytes(8), "impossible tensor name '\\x1b[31m'"),
    "name with a newline": ({"a\nb": info()}, bytes(8), "impossible tensor name 'a\\nb'"),
    "name that is no text": (
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
        "impossible tensor name '\\ud800'",
    ),
    "entry is a number": ({"a": 1}, bytes(8), "tensor 'a': dtype, shape and data_offsets expected, got 1"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "dtype, shape and data_offsets expected"),
    "unknown field": ({"a": {**info(), "codec": "zip"}}, bytes(8), "dtype, shape and data_offsets expected"),
    "unknown dtype": ({"a": info("F31")}, bytes(8), "tensor 'a': unknown dtype 'F31'"),
    "dtype without torch": ({"a": info("F6_E2M3")}, bytes(8), "tensor 'a': unknown dtype 'F6_E2M3'"),
    "dtype is a list": ({"a": info(["F32"])}, bytes(8), "tensor 'a': unknown dtype ['F32']"),
    "negative extent": ({"a": info(shape=[-2])}, bytes(8), "tensor 'a': a shape is a list of non-negative integers"),
    "float extent": ({"a": info(shape=[2.0])}, bytes(8), "tensor 'a': a shape is a list of non-negative integers"),
    "boolean extent": (
        {"a": info(shape=[True, 2])},
        bytes(8),
        "tensor 'a': a shape is a list of non-negative integers",
    ),
    "shape is a number": ({"a": info(shape=2)}, bytes(8), "tensor 'a': a shape is a list of non-negative integers"),
    "rank 65": ({"a": info(shape=[1] * 65, end=4)}, bytes(4), "tensor 'a': impossible shape [1, 1, 1"),
    "empty beyond 64 bits": (
        {"a": info(shape=[0, 2**40, 2**40], end=0)},
        b"",
        "tensor 'a': impossible shape [0, 1099511627776, 1099511627776]",
    ),
    "overflowing shape": ({"a": info(shape=[2**62, 2**62])}, bytes(8), "tensor 'a': impossible shape"),
    "large shape": ({"a": info(shape=[2**40])}, bytes(8), "F32 of shape [1099511627776] is 4398046511104 bytes"),
    "small shape": ({"a": info(shape=[1])}, bytes(8), "F32 of shape [1] is 4 bytes, data_offsets give 8"),
    "odd F4": ({"a": info("F4", [3], 0, 2)}, bytes(2), "tensor 'a': F4 packs pairs: the last extent of (3,) is odd"),
    "offsets are floats": ({"a": info(begin=0.0)}, bytes(8), "data_offsets are two integers, got [0.0, 8]"),
    "three offsets": (
        {"a": {**info(), "data_offsets": [0, 4, 8]}},
        bytes(8),
        "data_offsets are two integers, got [0, 4, 8]",
    ),
    "offsets turned": ({"a": info(begin=8, end=0)}, bytes(8), "data_offsets [8, 0] leave the file's 8 bytes of data"),
    "negative offset": ({"a": info(begin=-8, end=0)}, bytes(8), "data_offsets [-8, 0] leave the file's 8 bytes"),
    "beyond the file": ({"a": info(end=2**70)}, bytes(8), "leave the file's 8 bytes of data"),
    "truncated data": (TWO, bytes(12), "tensor 'b': data_offsets [8, 16] leave the file's 12 bytes of data"),
    "overlap": ({"a": info(), "b": info(begin=4, end=12)}, bytes(12), "tensor 'b': overlaps tensor 'a'"),
    "same data twice": ({"a": info(), "b": info()}, bytes(8), "tensor 'b': overlaps tensor 'a'"),
    "hole": (
        {"a": info(), "b": info(begin=12, end=20)},
        bytes(20),
        "tensor 'b': 4 bytes before it belong to no tensor",
    ),
    "data before": ({"a": info(begin=4, end=12)}, bytes(12), "tensor 'a': 4 bytes before it belong to no tensor"),
    "data after": ({"a": info()}, bytes(9), "1 bytes at its end belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    header, data, message = MALFORMED[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(SourceError) as caught:
        SafetensorsSource(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few for a safetensors file"),
        (b"1234567", "7 bytes are too few for a safetensors file"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: a header of 100 bytes in a file of 10"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "its header would be 100000001 bytes long"),
        (b"\xff" * 8, "its header would be 18446744073709551615 bytes long"),
        (b"version https://git-lfs.github.com/spec/v1\n", "its header would be"),
        (b"<!DOCTYPE html>", "its header would be"),
        ((0).to_bytes(8, "little"), "its header does not start with '{'"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        SafetensorsSource(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_the_library_refuses_what_we_refuse(tmp_path: Path) -> None:
    """Where we are stricter: unknown fields, dtypes that torch lacks, control characters in names."""
    stricter = {
        *("unknown field", "dtype without torch", "name with an escape", "name with a newline", "rank 65", "no name"),
        *("name that is no text", "empty beyond 64 bits", "leading space"),
    }
    for case, (header, data, _) in MALFORMED.items():
        if case in stricter:
            continue
        path = write(tmp_path / "bad.safetensors", header, data)
        with pytest.raises(Exception):  # noqa: B017
            reference.load_file(path)


numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 64), st.floats(), st.booleans(), st.none(), st.text())
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F6_E3M2"]), numbers),
        "shape": st.one_of(st.lists(numbers, max_size=4), st.lists(st.integers(0, 4), max_size=3), numbers),
        "data_offsets": st.one_of(
            st.lists(numbers, max_size=3), st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list), numbers
        ),
        "more": numbers,
    },
)
headers = st.dictionaries(st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=4)), fields)
contents = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.binary(max_size=100), st.binary(max_size=40)).map(
        lambda parts: len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1]
    ),
    st.tuples(headers, st.integers(0, 64)).map(
        lambda parts: len(json.dumps(parts[0])).to_bytes(8, "little") + json.dumps(parts[0]).encode() + bytes(parts[1])
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents)
def test_no_bytes_give_anything_but_a_header_or_a_refusal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    with FileReader(path) as reader:
        try:
            header, message = read_header(reader), ""
        except SourceError as exc:
            header, message = None, str(exc)
    assert "\n" not in message
    assert len(message) < 1000
    assert header is None or sum(entry.nbytes for entry in header.tensors.values()) <= len(content)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_still_within_the_file(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "flip.safetensors"
    data = bytearray(reference.save({"a": torch.ones(4, 4), "b.weight": torch.ones(3, dtype=torch.int8)}))
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        source = SafetensorsSource(path)
    except SourceError:
        return
    for spec in source.specs():
        source.read(spec.name, range(math.prod(spec.shape[:-1])))


@pytest.mark.parametrize(
    "content",
    [
        (MAX_HEADER).to_bytes(8, "little") + b"{}",
        (b'{"a": {"dtype": "U8", "shape": [9999999999], "data_offsets": [0, 9999999999]}}'),
        (b'{"a": {"dtype": "U8", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]}}'),
    ],
)
def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content if content.endswith(b"{}") else len(content).to_bytes(8, "little") + content)
    tracemalloc.start()
    try:
        source = SafetensorsSource(path)
    except SourceError:
        pass
    else:
        assert source.read("a", range(0)).numel() == 0
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


CHANGES: dict[str, Callable[[Path], None]] = {
    "shrinks": lambda path: path.open("r+b").truncate(100) and None,
    "is written to": lambda path: path.write_bytes(path.read_bytes()) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused_by_name(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    reference.save_file({"x.weight": torch.ones(100, 100)}, path)
    os.utime(path, ns=(0, 0))  # the clock of a file system may stand still for some milliseconds
    source = SafetensorsSource(path)
    assert torch.equal(source.read("x.weight", range(50)), torch.ones(50, 100))
    CHANGES[change](path)
    with pytest.raises(SourceError, match=rf"^{path}: tensor 'x\.weight': the file has"):
        source.read("x.weight", range(50, 100))

"""How tensors are cut into chunks: every row once, boxes only, whole quanta."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monoquant_core.encoding import FULL, INT8, Encoding, param_shape, per_channel, per_group, per_row, per_tensor
from monoquant_core.errors import EncodingError
from monoquant_core.rows import (
    RowMap,
    all_rows,
    block_rows,
    chunk_shape,
    chunks,
    quantum,
    row_count,
    row_length,
)

SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=5).map(tuple)
FULL_SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)


def box(shape: tuple[int, ...], rows: range) -> bool:
    """Whether rows are one index before some axis, a range on it, everything after it; told from their indices."""
    flat = np.array(np.unravel_index(np.array(rows), shape[:-1])) if len(shape) > 1 else np.zeros((0, len(rows)), int)
    extents = [len(set(axis)) for axis in flat]
    ranges = [sorted(set(axis)) == list(range(min(axis), max(axis) + 1)) for axis in flat]
    inside = [e not in (1, n) for e, n in zip(extents, shape, strict=False)]
    shaped = math.prod(extents) == len(rows) and all(ranges) and sum(inside) <= 1
    first = next((i for i, e in enumerate(extents) if e > 1), len(extents))
    return shaped and all(e == n for e, n in zip(extents[first + 1 :], shape[first + 1 : -1], strict=True))


@settings(max_examples=300, deadline=None)
@given(SHAPES, st.integers(1, 40), st.integers(1, 200))
@example((6, 3, 3, 2), 6, 4)  # six rows are two of three on the second axis, and three axes do not start anew at six
@example((2, 9, 1), 2, 3)
def test_chunks_cover_every_row_once_in_order_in_boxes_of_whole_quanta(
    shape: tuple[int, ...], step: int, elements: int
) -> None:
    found = list(chunks(shape, step, elements))
    assert [row for rows in found for row in rows] == list(all_rows(shape))
    if math.prod(shape) == 0:
        assert found == [all_rows(shape)]
        return
    for rows in found:
        assert rows.start % step == 0
        assert len(rows) % step == 0 or rows.stop == row_count(shape)
        assert box(shape, rows)
        extent = chunk_shape(shape, rows)
        assert len(extent) == len(shape)
        assert math.prod(extent) == len(rows) * row_length(shape)


@settings(max_examples=200, deadline=None)
@given(FULL_SHAPES, st.integers(1, 500))
def test_chunks_without_a_quantum_stay_below_the_limit_or_are_one_row(shape: tuple[int, ...], elements: int) -> None:
    for rows in chunks(shape, 1, elements):
        assert len(rows) * row_length(shape) <= max(elements, row_length(shape))


def test_chunks_are_not_needlessly_small() -> None:
    assert len(list(chunks((1024, 1024), 1, 1 << 18))) == 4
    assert len(list(chunks((4, 256, 1024), 1, 1 << 18))) == 4
    assert len(list(chunks((64, 3, 3, 3), 9, 64 * 27))) == 1


@settings(max_examples=200, deadline=None)
@given(FULL_SHAPES, st.integers(0, 60), st.integers(0, 60))
def test_chunk_shape_takes_boxes_and_nothing_else(shape: tuple[int, ...], start: int, length: int) -> None:
    rows = range(start, start + length)
    inside = rows.stop <= row_count(shape)
    if inside and length and box(shape, rows):
        assert math.prod(chunk_shape(shape, rows)) == length * row_length(shape)
    elif not inside or (length and not box(shape, rows)):
        with pytest.raises(EncodingError, match="rows"):
            chunk_shape(shape, rows)


def test_vectors_and_scalars_have_one_row() -> None:
    assert (row_count(()), row_count((5,)), row_count((2, 3, 4))) == (1, 1, 6)
    assert (row_length(()), row_length((5,)), row_length((2, 3, 4))) == (1, 5, 4)
    assert list(chunks((), 1, 1)) == list(chunks((9,), 1, 1)) == [range(1)]
    assert chunk_shape((), range(1)) == ()


@st.composite
def shaped_blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = draw(FULL_SHAPES)
    kind = draw(st.sampled_from(["same", "two", "one"]))
    rank = {"same": len(shape), "two": min(2, len(shape)), "one": 1}[kind]
    return shape, tuple(draw(st.sampled_from([1, 2, 3, FULL])) for _ in range(rank))


def owners(shape: tuple[int, ...], block: tuple[int, ...]) -> np.ndarray:
    """Which block every element belongs to, row by row."""
    flat = (
        shape
        if len(block) == len(shape)
        else (math.prod(shape),)
        if len(block) == 1
        else (shape[0], math.prod(shape[1:]))
    )
    grid = param_shape(shape, block)
    extents = [n if b == FULL else b for n, b in zip(flat, block, strict=True)]
    axes = [np.arange(n) // b for n, b in zip(flat, extents, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), grid).reshape(-1, row_length(shape))


@settings(max_examples=300, deadline=None)
@given(shaped_blocks())
def test_runs_of_block_rows_hold_whole_blocks(case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """At whatever multiple of it a chunk starts that is a box."""
    shape, block = case
    own, owner = block_rows(shape, block), owners(shape, block)
    for elements in (1, 7, 50):
        seen: set[int] = set()
        for rows in chunks(shape, own, elements):
            inside = set(owner[rows.start : rows.stop].ravel().tolist())
            assert not inside & seen
            seen |= inside


def test_quantum_of_the_usual_granularities() -> None:
    conv = (8, 4, 3, 3)
    assert quantum((64, 128), Encoding(INT8, per_row(2), "float32")) == 1
    assert quantum((64, 128), Encoding(INT8, per_group(2, 32), "float32")) == 1
    assert quantum((64, 128), Encoding(INT8, (16, 16), "float32")) == 16
    assert quantum((64, 128), Encoding(INT8, per_channel(2, 1), "float32")) == 64
    assert quantum(conv, Encoding(INT8, per_channel(4), "float32")) == 12
    assert quantum(conv, Encoding(INT8, (1, 9), "float32")) == 12
    whole = Encoding(INT8, per_tensor(2), "float32")
    assert (quantum((64, 128), whole), quantum((64, 128), whole, tensor_wide=True)) == (64, 1)
    nested = Encoding(INT8, per_group(2, 16), Encoding(INT8, per_tensor(2), "float32"))
    assert (quantum((64, 128), nested), quantum((64, 128), nested, tensor_wide=True)) == (64, 1)
    flat = Encoding(INT8, per_group(2, 16), Encoding(INT8, (256,), "float32"))
    assert quantum((64, 128), flat, tensor_wide=True) == 64
    assert quantum((64, 128), None) == 1


def test_a_row_map_is_a_permutation() -> None:
    assert RowMap((2, 0, 1)).quantum == 3
    with pytest.raises(EncodingError, match="permutation"):
        RowMap((0, 0, 1))

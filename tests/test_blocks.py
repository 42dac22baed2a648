"""Blocks as rows of a matrix, and scales that fit them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.blocks import (
    HALF_STEP,
    absmax,
    absmax_scale,
    check_finite,
    from_matrix,
    in_steps,
    power_of_two,
    tensor_magnitude,
    to_matrix,
)
from monoquant_core.encoding import FULL, Encoding, integer, param_shape
from monoquant_core.errors import EncodingError, QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor, dtype_of

BLOCKS = [
    ((4, 6), (1, FULL)),
    ((4, 6), (FULL, 1)),
    ((4, 6), (1, 3)),
    ((4, 6), (2, 1)),
    ((4, 6), (2, 3)),
    ((4, 6), (FULL, FULL)),
    ((4, 6), (8,)),
    ((3, 4, 6), (1, 1, 3)),
    ((3, 4, 6), (1, FULL, FULL)),
    ((4, 2, 3, 3), (1, 9)),
    ((4, 2, 3, 3), (FULL, 1, FULL, FULL)),
    ((7,), (FULL,)),
]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def context(*shape: int, rows: range = range(1), absmax: float | None = None) -> Context:
    return Context(TensorSpec("layer.weight", shape, "float32"), rows, Scratch(), absmax)


@pytest.mark.parametrize(("shape", "block"), BLOCKS)
def test_rows_of_the_matrix_are_the_blocks_in_the_order_of_their_parameters(
    shape: tuple[int, ...], block: tuple[int, ...]
) -> None:
    values = torch.arange(math.prod(shape)).view(shape)
    matrix = to_matrix(values, block)
    # The IR's own decoder spreads one number per block over the tensor: every row of the matrix holds one number.
    grid = param_shape(shape, block)
    number = torch.arange(math.prod(grid), dtype=torch.float32).view(grid)
    ones = torch.ones(shape, dtype=torch.int8)
    spread = QuantizedTensor(Encoding(integer(8), block, "float32"), ones, number).dequantize()
    assert torch.equal(to_matrix(spread, block), number.view(-1, 1).expand(matrix.shape))
    out = torch.empty_like(values)
    from_matrix(matrix, out, block)
    assert torch.equal(out, values)


@pytest.mark.parametrize("block", [(1, FULL), (1, 3), (1, 6)])
def test_parts_of_rows_are_not_copied(block: tuple[int, ...]) -> None:
    values = torch.zeros(4, 6)
    assert to_matrix(values, block).data_ptr() == values.data_ptr()
    images = torch.zeros(4, 2, 3, 1)
    assert to_matrix(images, block).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("block", [(1, 4), (3, 1), (1, 7)])
def test_blocks_that_do_not_divide_are_refused(block: tuple[int, ...]) -> None:
    with pytest.raises(EncodingError, match="do not divide"):
        to_matrix(torch.zeros(4, 6), block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_absmax_is_the_largest_magnitude(dtype: torch.dtype) -> None:
    matrix = torch.randn(9, 50).to(dtype)
    matrix[3] = 0
    matrix[4] = -0.0
    for scratch in (None, Scratch()):
        assert torch.equal(absmax(matrix, scratch), matrix.float().abs().amax(1))
        assert absmax(matrix, scratch).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_absmax_shows_what_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 40).to(dtype)
    matrix[1, 7] = bad
    assert absmax(matrix).isfinite().tolist() == [True, False, True]


@given(FLOATS)
@settings(deadline=None)
def test_power_of_two_brings_any_magnitude_to_the_order_of_one(value: float) -> None:
    power = float(power_of_two(torch.tensor([abs(value)])))
    assert math.frexp(power)[0] == 0.5
    assert 2.0**-126 <= power <= 2.0**126
    if abs(value) >= 2.0**-126:
        assert power <= abs(value) < power * 4


@given(
    st.lists(FLOATS.map(abs), min_size=1, max_size=8),
    st.sampled_from([1, 3, 7, 15, 31, 63, 127, 255]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
@settings(deadline=None, max_examples=300)
def test_the_largest_value_gets_the_largest_code(magnitudes: list[float], largest: int, dtype: str) -> None:
    magnitude = torch.tensor(magnitudes)
    limits = torch.finfo(dtype_of(dtype))
    try:
        scale = absmax_scale(magnitude, largest, dtype, magnitude, context(len(magnitudes)))
    except QuantizationError:
        exact = [m / largest for m in magnitudes if m > 0]
        assert dtype != "float32"
        assert max(exact) > limits.max or min(exact) <= limits.smallest_normal * limits.eps / 2
        return
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    steps = magnitude.double() / scale.double()
    assert bool((steps < largest + HALF_STEP + 1e-4).all())
    normal = magnitude.double() / largest >= limits.smallest_normal
    assert bool((steps[normal] >= largest * (1 - limits.eps * 1.01)).all()), "not coarser than rounding made it"
    assert bool((scale[magnitude == 0] == 1).all())


def test_a_scale_beyond_its_dtype_names_the_tensor_and_what_to_do() -> None:
    for value in (1e-9, 1e9):
        with pytest.raises(QuantizationError, match="^layer.weight: .* float16") as caught:
            absmax_scale(torch.tensor([1.0, value]), 127, "float16", torch.ones(2), context(1, 2))
        assert f"magnitude {value:.3g} " in str(caught.value)
        assert "bfloat16 or float32" in caught.value.hint
        assert "--keep 'layer.weight'" in caught.value.hint


@pytest.mark.parametrize(
    ("rows", "at", "index"),
    [(range(0, 6), 0, "[0, 0, 0]"), (range(3, 6), 5, "[1, 1, 1]"), (range(5, 6), 3, "[1, 2, 3]")],
)
def test_the_first_bad_element_is_named_by_its_place_in_the_tensor(rows: range, at: int, index: str) -> None:
    chunk = torch.ones(1, len(rows), 4)
    chunk.view(-1)[at:] = math.nan
    with pytest.raises(QuantizationError) as caught:
        check_finite(chunk, context(2, 3, 4, rows=rows))
    assert str(caught.value) == f"layer.weight{index}: nan is not a finite number"
    assert "--keep 'layer.weight'" in caught.value.hint
    check_finite(torch.ones(1, 1, 4), context(2, 3, 4))


def test_what_float32_does_not_hold_is_told_from_infinity() -> None:
    with pytest.raises(QuantizationError, match=r"layer.weight\[0, 1\]: 1e\+300 is beyond float32"):
        check_finite(torch.tensor([[1.0, 1e300]], dtype=torch.float64), context(1, 2))


@pytest.mark.parametrize("scale", [1.4e-45, 1e-41, 1e-38, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_of_any_scale(scale: float, sign: int) -> None:
    held = torch.tensor([sign * scale, 1.0])
    count = torch.tensor([[0.0, 1.0, -1.0], [3.0, -100.0, 127.0]])
    steps = in_steps(count * held.unsqueeze(1), held)
    assert torch.allclose(steps, count, rtol=1e-6, atol=0)
    alone = in_steps(count[1:] * held[1:], held[1:])
    assert torch.equal(steps[1:], alone), "a row does not depend on the scales of others"


def test_the_magnitude_of_the_tensor_must_hold_for_every_chunk() -> None:
    chunk = torch.tensor([[1.0, -2.0]])
    assert tensor_magnitude(absmax(chunk), chunk, context(2, 2, absmax=3.0)).tolist() == [3.0]
    with pytest.raises(QuantizationError, match="layer.weight: a value exceeds 1.5") as caught:
        tensor_magnitude(absmax(chunk), chunk, context(2, 2, absmax=1.5))
    assert "changed" in caught.value.hint
    chunk[0, 1] = math.nan
    with pytest.raises(QuantizationError, match=r"layer.weight\[0, 1\]: nan"):
        tensor_magnitude(absmax(chunk), chunk, context(2, 2, absmax=3.0))

"""The check lets every honest quantization pass, and notices a single element that is off by more than its bound."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import Tiny

from monoquant_core.check import (
    Mismatch,
    check_params,
    check_quantized,
    first_nonfinite,
    magnitude,
    measure,
    square_sum,
)
from monoquant_core.encoding import FLOAT8_E8M0FNU, FULL, INT4, INT8, UINT4, Encoding, codebook, per_group
from monoquant_core.metrics import Energies
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor

KINDS = ["symmetric", "zero_point", "offset", "float8", "nested"]


def check(x: torch.Tensor, q: QuantizedTensor, *, nearest: bool = True, keeps_zero: bool = False) -> Energies:
    return check_quantized(x, q, square_sum(x), Scratch(), nearest=nearest, keeps_zero=keeps_zero)


def quantized(x: torch.Tensor, scheme: Tiny) -> QuantizedTensor:
    spec = TensorSpec("x", tuple(x.shape), "float32")
    proposal = scheme.propose(spec)
    absmax = float(x.abs().max()) if "absmax" in proposal.needs else None
    return scheme.quantize(x, proposal.encoding, Context(spec, range(len(x)), Scratch(), absmax))


@st.composite
def schemes(draw: st.DrawFn) -> Tiny:
    kind = draw(st.sampled_from(KINDS))
    bits = draw(st.sampled_from([2, 4, 5, 8]))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"])) if kind != "nested" else "float32"
    return Tiny(8 if kind == "float8" else bits, draw(st.sampled_from([0, 4, 8])), kind, dtype)


def weights(seed: int, shape: tuple[int, ...], magnitude: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * magnitude
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    return x


@settings(max_examples=300, deadline=None)
@given(
    schemes(), st.integers(0, 1000), st.sampled_from([(1, 8), (6, 16), (3, 40)]), st.sampled_from([1e-3, 1.0, 300.0])
)
def test_honest_schemes_pass(scheme: Tiny, seed: int, shape: tuple[int, ...], scale: float) -> None:
    x = weights(seed, shape, scale)
    q = quantized(x, scheme)
    found = check(x, q, keeps_zero=scheme.kind != "offset")
    error = (x.double() - q.dequantize().double()).numpy()
    assert found.max_error == pytest.approx(np.abs(error).max(), rel=1e-4, abs=1e-6 * float(x.abs().max()))
    assert found.noise == pytest.approx((error**2).sum(), rel=1e-4)
    assert found.signal == pytest.approx(float((x.double() ** 2).sum()), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(schemes(), st.integers(0, 1000), st.sampled_from([1e-41, 1e-36, 1e-20, 1e18, 1e30]))
def test_honest_schemes_pass_at_every_magnitude(scheme: Tiny, seed: int, scale: float) -> None:
    """With float32 parameters; their squares overflow and underflow."""
    scheme.scale_dtype = "float32"
    if scheme.kind == "nested" and scale < 1e-30:
        return  # a product of two subnormal scales holds next to nothing
    x = weights(seed, (4, 16), scale)
    q = quantized(x, scheme)
    found = check(x, q)
    assert found.signal == pytest.approx(float((x.double() ** 2).sum()), rel=1e-4)
    assert found.noise == pytest.approx(float((x.double() - q.dequantize().double()).square().sum()), rel=1e-3)


@settings(max_examples=300, deadline=None)
@given(schemes(), st.integers(0, 1000), st.data())
def test_one_wrong_code_is_noticed(scheme: Tiny, seed: int, data: st.DataObject) -> None:
    """Two steps away from the nearest code, wherever it is. Eight-bit scales of eight-bit codes allow for more."""
    if scheme.bits == 8 and (scheme.kind == "nested" or scheme.scale_dtype == "bfloat16"):
        scheme.kind, scheme.scale_dtype = "symmetric", "float16"
    x = weights(seed, (4, 16), 1.0)
    q = quantized(x, scheme)
    low, high = q.encoding.codes_range
    at = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 15))
    code = int(q.codes[at])
    if scheme.kind == "float8":
        if (code & 127) >= 120 or (code & 127) < 8:
            return
        wrong = code + 3 if code & 127 < 100 else code - 3
    else:
        wrong = code + 2 if code + 2 < high else code - 2
    if not low < wrong < high:
        return
    q.codes[at] = wrong
    with pytest.raises(Mismatch, match="where a step is") as found:
        check(x, q)
    assert found.value.index == at[0] * 16 + at[1]


def test_a_code_at_the_limit_may_be_far_away_but_only_outwards() -> None:
    x = torch.tensor([[10.0, -10.0, 0.5, 0.0]])
    encoding = Encoding(INT4, (1, FULL), "float32")
    clipped = QuantizedTensor(encoding, torch.tensor([[7, -8, 0, 0]], dtype=torch.int8), torch.tensor([[1.0]]))
    assert check(x, clipped).max_error == 3.0
    inward = QuantizedTensor(encoding, torch.tensor([[7, -8, 7, 0]], dtype=torch.int8), torch.tensor([[1.0]]))
    with pytest.raises(Mismatch) as found:
        check(x, inward)
    assert found.value.index == 2
    negative = QuantizedTensor(encoding, torch.tensor([[-8, 7, 0, 0]], dtype=torch.int8), torch.tensor([[-1.0]]))
    assert check(x, negative).max_error == 3.0
    narrow = Encoding(INT8, (1, FULL), "float32", clip=(-7, 7))
    assert check(x, QuantizedTensor(narrow, torch.tensor([[7, -7, 0, 0]], dtype=torch.int8), torch.tensor([[1.0]])))


def test_half_a_step_is_the_bound() -> None:
    encoding, scale = Encoding(INT8, (1, FULL), "float32"), torch.tensor([[1.0]])
    codes = torch.tensor([[100, 3]], dtype=torch.int8)
    check(torch.tensor([[100.0, 3.5]]), QuantizedTensor(encoding, codes, scale))
    with pytest.raises(Mismatch):
        check(torch.tensor([[100.0, 3.501]]), QuantizedTensor(encoding, codes, scale))
    with pytest.raises(Mismatch):
        check(torch.tensor([[100.0, 2.499]]), QuantizedTensor(encoding, codes, scale))


def test_a_scale_that_was_rounded_allows_its_last_place_per_level() -> None:
    """A scheme may find codes with the exact scale and store it in bfloat16: the further from zero, the further off."""
    exact = 1 + 2**-8 + 2**-12
    encoding = Encoding(INT8, (1, FULL), "bfloat16")
    stored = torch.tensor([[exact]]).bfloat16()
    codes = torch.arange(-127, 128, dtype=torch.int8)[None]
    x = codes * exact
    check(x, QuantizedTensor(encoding, codes, stored))
    with pytest.raises(Mismatch):  # near zero, there is no such allowance
        check(x + 0.7 * (codes.abs() < 3), QuantizedTensor(encoding, codes, stored))
    wide = QuantizedTensor(Encoding(INT8, (1, FULL), "float32"), codes, stored.float())
    with pytest.raises(Mismatch):
        check(x - 0.4 * codes.sign(), wide)


def test_an_offset_that_was_rounded_allows_its_last_place() -> None:
    encoding = Encoding(UINT4, (1, FULL), "float16", offset="float16")
    exact = 1000.3
    codes = torch.arange(16, dtype=torch.uint8)[None]
    scale, offset = torch.tensor([[0.1]]).half(), torch.tensor([[exact]]).half()
    x = codes * 0.1 + exact
    check(x, QuantizedTensor(encoding, codes, scale, offset=offset))
    with pytest.raises(Mismatch):
        check(x, QuantizedTensor(encoding, codes, scale, offset=offset + 1.5))


def test_a_nested_scale_allows_a_step_of_its_own() -> None:
    """As double quantization has it: codes of the exact scale, which is then stored as an 8-bit code."""
    nested = Encoding(UINT4, (1, 4), "float32")
    encoding = Encoding(INT8, (1, 4), nested)
    scale = QuantizedTensor(nested, torch.tensor([[10, 3, 15, 1]], dtype=torch.uint8), torch.tensor([[0.01]]))
    codes = torch.tensor([[100, 50, 1, 0, 100, 1, 0, 3, 5, 5, 5, 5, 1, 1, 1, 1]], dtype=torch.int8)
    x = codes.view(4, 4) * torch.tensor([[0.104], [0.034], [0.146], [0.014]])
    check(x.view(1, 16), QuantizedTensor(encoding, codes, scale))
    flat = QuantizedTensor(Encoding(INT8, (1, 4), "float32"), codes, scale.dequantize())
    with pytest.raises(Mismatch):
        check(x.view(1, 16), flat)


def test_steps_of_a_table_are_those_on_either_side() -> None:
    uneven = codebook("test_uneven", (-1.0, -0.25, 0.0, 0.125, 1.0))
    encoding, scale = Encoding(uneven, (1, FULL), "float32"), torch.tensor([[2.0]])
    codes = torch.tensor([[3, 3, 4, 0]], dtype=torch.uint8)
    check(torch.tensor([[0.126, 1.124, 9.0, -9.0]]), QuantizedTensor(encoding, codes, scale))
    for wrong, index in ((0.124, 0), (1.126, 1)):
        x = torch.tensor([[0.25, 0.25, 9.0, -9.0]])
        x[0, index] = wrong
        with pytest.raises(Mismatch) as found:
            check(x, QuantizedTensor(encoding, codes, scale))
        assert found.value.index == index
    check(torch.tensor([[-0.126, -1.124, -9.0, 9.0]]), QuantizedTensor(encoding, codes, -scale))
    with pytest.raises(Mismatch):
        check(torch.tensor([[-0.124, -1.124, -9.0, 9.0]]), QuantizedTensor(encoding, codes, -scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite(kind: str, value: float) -> None:
    x = weights(0, (4, 16), 1.0)
    for label in quantized(x, Tiny(8, 8, kind)).params():
        q = quantized(x, Tiny(8, 8, kind))
        param = q.params()[label]
        target = param.scale if isinstance(param, QuantizedTensor) else param
        if not target.is_floating_point():
            continue
        target.view(-1)[-1] = value
        for nearest in (True, False):
            with pytest.raises(Mismatch, match="finite"):
                check(x, q, nearest=nearest)
        with pytest.raises(Mismatch, match="not finite"):
            check_params(q)


def test_a_code_that_means_nan() -> None:
    x = weights(0, (4, 16), 1.0)
    q = quantized(x, Tiny(8, 0, "float8"))
    q.codes[2, 3] = 127
    with pytest.raises(Mismatch, match="does not decode to a finite value") as found:
        check(x, q)
    assert found.value.index == 35


@pytest.mark.parametrize("nearest", [True, False])
def test_a_block_that_was_lost(nearest: bool) -> None:
    """As when a float16 scale underflows."""
    x = torch.full((2, 16), 1e-7)
    q = quantized(x, Tiny(4, 8, "symmetric", "float16"))
    assert bool((q.scale == 0).all())
    with pytest.raises(Mismatch, match="zero scale") as found:
        check(x, q, nearest=nearest)
    assert found.value.index == 0
    zeros = torch.zeros(2, 16)
    assert check(zeros, quantized(zeros, Tiny(4, 8))) == Energies(0, 0, 0)


def test_a_constant_block_may_have_a_zero_scale_beside_its_offset() -> None:
    x = torch.full((2, 16), 5.0)
    q = quantized(x, Tiny(4, 8, "offset"))
    assert bool((q.scale == 0).all())
    check(x, q)
    with pytest.raises(Mismatch):
        check(x + 0.1, q)


@pytest.mark.parametrize("nearest", [True, False])
def test_zeros_stay_zero_where_the_scheme_says_so(nearest: bool) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 3.1]])
    encoding = Encoding(UINT4, (1, FULL), "float32", offset="float32")
    codes = torch.tensor([[0, 3, 6, 10]], dtype=torch.uint8)
    q = QuantizedTensor(encoding, codes, torch.tensor([[0.3]]), offset=torch.tensor([[0.1]]))
    check(x, q, nearest=nearest)
    with pytest.raises(Mismatch, match="is zero and does not stay zero"):
        check(x, q, nearest=nearest, keeps_zero=True)


def test_codes_out_of_range() -> None:
    encoding = Encoding(INT4, (1, FULL), "float32")
    q = QuantizedTensor(encoding, torch.tensor([[9, 0]], dtype=torch.int8), torch.tensor([[1.0]]))
    with pytest.raises(Mismatch, match=r"codes 0\.\.9 are outside -8\.\.7 of int4"):
        check(torch.tensor([[9.0, 0.0]]), q)


def test_schemes_that_are_not_nearest_are_not_held_to_steps() -> None:
    x = weights(0, (4, 16), 1.0)
    q = quantized(x, Tiny(4, 8))
    q.codes.zero_()
    assert check(x, q, nearest=False).max_error == pytest.approx(float(x.abs().max()))


@pytest.mark.parametrize("block", [(FULL, 1), (1, 5), (3, 4), (FULL, FULL), (1, 8), (5,), (2, 16)])
def test_every_shape_of_block(block: tuple[int, ...]) -> None:
    """Runs, tiles, columns, and shorter last blocks."""
    encoding = Encoding(INT8, block, "float32")
    x = weights(3, (6, 16), 1.0)
    q = QuantizedTensor(encoding, torch.zeros(6, 16, dtype=torch.int8), torch.ones(encoding_grid(block)))
    q = QuantizedTensor(encoding, (x / 0.03).round().clamp(-127, 127).to(torch.int8), q.scale * 0.03)
    check(x, q)
    q.codes[4, 13] += 1
    with pytest.raises(Mismatch) as found:
        check(x, q)
    assert found.value.index == 4 * 16 + 13


def encoding_grid(block: tuple[int, ...]) -> tuple[int, ...]:
    from monoquant_core.encoding import param_shape

    return param_shape((6, 16), block)


def test_powers_of_two_as_scales() -> None:
    encoding = Encoding(INT8, per_group(2, 8), FLOAT8_E8M0FNU)
    x = weights(5, (2, 16), 0.5)
    exponents = torch.full((2, 2), 127 - 6, dtype=torch.uint8)
    q = QuantizedTensor(encoding, (x * 64).round().clamp(-127, 127).to(torch.int8), exponents)
    assert check(x, q).max_error <= 2**-7


def test_empty_tensors_have_nothing_to_check() -> None:
    q = quantized(torch.zeros(0, 8), Tiny(4, 8))
    assert check(torch.zeros(0, 8), q) == Energies()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]), st.integers(0, 99)
)
@example(torch.float8_e4m3fn, 0)
def test_magnitudes_from_bit_patterns(dtype: torch.dtype, seed: int) -> None:
    x = weights(seed, (3, 7), 10.0).to(dtype)
    plain = torch.view_as_real(x) if x.is_complex() else x.float() if x.itemsize == 1 else x
    assert magnitude(x, Scratch()) == float(plain.abs().max())
    if dtype == torch.float8_e4m3fn:
        x.view(torch.uint8)[1, 2] = 127
        assert math.isnan(magnitude(x, Scratch()))
        assert first_nonfinite(x) == 9
        return
    x[2, 1] = -math.inf
    assert magnitude(x, Scratch()) == math.inf
    x[1, 2] = -math.nan
    assert math.isnan(magnitude(x, Scratch()))
    assert first_nonfinite(x) == 9


def test_magnitudes_of_what_has_none() -> None:
    assert magnitude(torch.zeros(0), Scratch()) == 0
    assert magnitude(torch.tensor([5]), Scratch()) == 0
    assert magnitude(torch.tensor([True]), Scratch()) == 0


def test_sums_of_squares_over_many_segments() -> None:
    x = torch.randn(3, 1 << 20)
    assert square_sum(x) == pytest.approx(float(x.double().square().sum()), rel=1e-5)
    assert square_sum(torch.full((4,), 1e30)) == pytest.approx(4e60)
    assert square_sum(torch.full((4,), 1e-30)) == pytest.approx(4e-60)
    assert square_sum(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(square_sum(torch.tensor([1.0, math.nan])))
    assert square_sum(torch.zeros(0)) == 0


def test_measure_of_two_tensors() -> None:
    a, b = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -2.5, 3.25])
    assert measure(a, b) == Energies(14.0, 0.3125, 0.5)
    assert measure(torch.zeros(0), torch.zeros(0)) == Energies()

"""QuantizedTensor: what cannot be built, and decoding against a plain loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E8M0FNU,
    FULL,
    INT8,
    UINT4,
    UINT8,
    ElementType,
    Encoding,
    codebook,
    param_shape,
)
from monoquant_core.errors import EncodingError
from monoquant_core.tensor import QuantizedTensor, decode, dtype_name, dtype_of, expand, same_bits

PLAIN = Encoding(INT8, (1, 4), "float32")
ASYMMETRIC = Encoding(UINT8, (1, 4), "float32", zero_point=UINT8, offset="float16")
INNER = Encoding(UINT4, (1, 2), "float16")
NESTED = Encoding(FLOAT4_E2M1FN, (1, 4), INNER)

CODES = torch.zeros(3, 8, dtype=torch.int8)
UCODES = torch.zeros(3, 8, dtype=torch.uint8)
SCALE = torch.ones(3, 2)
INNER_VALUE = QuantizedTensor(INNER, torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.float16))

REFUSALS = {
    "float codes": (
        lambda: QuantizedTensor(PLAIN, CODES.float(), SCALE),
        "codes must be an integer tensor, got torch.f",
    ),
    "int64 codes": (lambda: QuantizedTensor(PLAIN, CODES.long(), SCALE), "codes must be an integer tensor"),
    "bool codes": (lambda: QuantizedTensor(PLAIN, CODES.bool(), SCALE), "codes must be an integer tensor"),
    "scale shape": (
        lambda: QuantizedTensor(PLAIN, CODES, torch.ones(3, 1)),
        "scale: expected shape (3, 2), got (3, 1)",
    ),
    "scale of the whole": (
        lambda: QuantizedTensor(PLAIN, CODES, torch.ones(())),
        "scale: expected shape (3, 2), got ()",
    ),
    "scale dtype": (lambda: QuantizedTensor(PLAIN, CODES, SCALE.half()), "scale: declared float32, got float16"),
    "no scale": (
        lambda: QuantizedTensor(PLAIN, CODES, None),
        "scale: data and encoding disagree on whether there is one",
    ),
    "zero point too many": (
        lambda: QuantizedTensor(PLAIN, CODES, SCALE, torch.zeros(3, 2, dtype=torch.uint8)),
        "zero_point: data and encoding disagree on whether there is one",
    ),
    "zero point missing": (
        lambda: QuantizedTensor(ASYMMETRIC, UCODES, SCALE, None, SCALE.half()),
        "zero_point: data and encoding disagree on whether there is one",
    ),
    "zero point of floats": (
        lambda: QuantizedTensor(ASYMMETRIC, UCODES, SCALE, SCALE, SCALE.half()),
        "zero_point: codes of uint8 must be integers, got torch.float32",
    ),
    "offset missing": (
        lambda: QuantizedTensor(ASYMMETRIC, UCODES, SCALE, torch.zeros(3, 2, dtype=torch.uint8)),
        "offset: data and encoding disagree on whether there is one",
    ),
    "nested where plain": (
        lambda: QuantizedTensor(PLAIN, CODES, INNER_VALUE),
        "scale: data and encoding disagree on nest",
    ),
    "plain where nested": (
        lambda: QuantizedTensor(NESTED, UCODES, SCALE),
        "scale: data and encoding disagree on nesting",
    ),
    "another nested encoding": (
        lambda: QuantizedTensor(
            NESTED, UCODES, QuantizedTensor(PLAIN, torch.zeros(3, 2, dtype=torch.int8), torch.ones(3, 1))
        ),
        "scale: encoded as int8[1x4]*float32, declared uint4[1x2]*float16",
    ),
    "nested of another size": (
        lambda: QuantizedTensor(NESTED, torch.zeros(3, 12, dtype=torch.uint8), INNER_VALUE),
        "scale: expected shape (3, 3), got (3, 2)",
    ),
    "nested and transposed": (
        lambda: QuantizedTensor(
            Encoding(FLOAT4_E2M1FN, (1, 4), Encoding(UINT4, (3,), "float32")),
            UCODES,
            QuantizedTensor(Encoding(UINT4, (3,), "float32"), torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2)),
        ),
        "scale: expected shape (3, 2), got (2, 3)",
    ),
    "rank": (
        lambda: QuantizedTensor(PLAIN, torch.zeros(8, dtype=torch.int8), SCALE),
        "block (1, 4) has another rank than shape (8,)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    build, message = REFUSALS[case]
    with pytest.raises(EncodingError) as caught:
        build()
    assert message in str(caught.value)


def by_hand(tensor: QuantizedTensor) -> torch.Tensor:
    """Element by element in float64: scale * (decode(code) - zero_point) + offset."""

    def scalar(param: object, spec: object, index: tuple[int, ...], grid: tuple[int, ...]) -> float:
        if isinstance(param, QuantizedTensor):
            return float(by_hand(param).reshape(grid)[index])
        assert isinstance(param, torch.Tensor)
        value = param.reshape(grid)[index]
        return float(decode(value, spec)) if isinstance(spec, ElementType) else float(value)

    encoding, shape = tensor.encoding, tensor.shape
    logical = shape
    if len(encoding.block) == 1 != len(shape):
        logical = (math.prod(shape),)
    elif len(encoding.block) == 2 < len(shape):
        logical = (shape[0], math.prod(shape[1:]))
    grid = param_shape(shape, encoding.block)
    codes = tensor.codes.reshape(logical)
    out = torch.zeros(logical, dtype=torch.float64)
    for index in itertools.product(*map(range, logical)):
        block = tuple(0 if b == FULL else i // b for i, b in zip(index, encoding.block, strict=True))
        value = float(decode(codes[index], encoding.element))
        if encoding.zero_point is not None:
            value -= scalar(tensor.zero_point, encoding.zero_point, block, grid)
        value *= scalar(tensor.scale, encoding.scale, block, grid)
        if encoding.offset is not None:
            value += scalar(tensor.offset, encoding.offset, block, grid)
        out[index] = value
    return out.reshape(shape)


ELEMENTS = [INT8, UINT8, UINT4, FLOAT4_E2M1FN, FLOAT8_E8M0FNU, codebook("t_tensor", (-3.0, -1.0, 0.5, 2.0, 7.0))]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, depth: int = 0) -> QuantizedTensor:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=4)))
    ranks = {1, min(2, len(shape)), len(shape)} - {0}
    rank = draw(st.sampled_from(sorted(ranks)))
    block = tuple(draw(st.lists(st.integers(1, 5) | st.just(FULL), min_size=rank, max_size=rank)))
    grid = param_shape(shape, block)
    seed = draw(st.integers(0, 999))

    def codes_of(element: ElementType, extents: tuple[int, ...]) -> torch.Tensor:
        low, high = (100, 140) if element is FLOAT8_E8M0FNU else element.code_range
        dtype = torch.int8 if low < 0 else torch.uint8
        return torch.randint(low, high + 1, extents, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def param() -> tuple[str | ElementType | Encoding, torch.Tensor | QuantizedTensor]:
        kind = draw(st.sampled_from(["dtype", "codes", "nested"] if depth < 2 else ["dtype", "codes"]))
        if kind == "dtype":
            name = draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
            return name, torch.randn(grid, generator=torch.Generator().manual_seed(seed + 1)).to(dtype_of(name))
        if kind == "codes":
            element = draw(st.sampled_from(ELEMENTS))
            return element, codes_of(element, grid)
        # A nested block has the parent's rank, or rank 1.
        value = draw(tensors(grid, depth + 1).filter(lambda t: len(t.encoding.block) in (1, len(block))))
        return value.encoding, value

    element = draw(st.sampled_from(ELEMENTS))
    scale, scale_value = param()
    zero, zero_value = param() if element.kind == "int" and draw(st.booleans()) else (None, None)
    offset, offset_value = param() if draw(st.booleans()) else (None, None)
    encoding = Encoding(element, block, scale, zero, offset)
    return QuantizedTensor(encoding, codes_of(element, shape), scale_value, zero_value, offset_value)


@settings(deadline=None, max_examples=60)
@given(tensors())
def test_dequantize_is_the_formula(tensor: QuantizedTensor) -> None:
    ours, expected = tensor.dequantize(), by_hand(tensor)
    assert ours.dtype == torch.float32
    assert ours.shape == tensor.shape
    magnitude = expected.abs().max() if expected.numel() else 0
    # float32 against float64: a few roundings of the largest intermediate value
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, float(magnitude)))


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_dequantize_does_not_depend_on_strides(tensor: QuantizedTensor, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(tensor.shape))))
    inverse = [order.index(i) for i in range(len(order))]
    strided = tensor.codes.permute(order).contiguous().permute(inverse)
    before = tensor.clone()
    again = QuantizedTensor(tensor.encoding, strided, tensor.scale, tensor.zero_point, tensor.offset)
    assert same_bits(again.dequantize(), tensor.dequantize())
    assert tensor.equal(before)  # decoding wrote to nothing of it


def test_expanded_codes_decode() -> None:
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8).expand(3, 4)
    ours = QuantizedTensor(PLAIN, codes, torch.tensor([[1.0], [2.0], [3.0]])).dequantize()
    assert torch.equal(ours, torch.tensor([[1.0, 2, 3, 4], [2, 4, 6, 8], [3, 6, 9, 12]]))


def test_equal_sees_every_bit() -> None:
    base = QuantizedTensor(PLAIN, CODES, SCALE)
    assert base.equal(base.clone())
    other = CODES.clone()
    other[2, 7] = 1
    assert not base.equal(QuantizedTensor(PLAIN, other, SCALE))
    scale = SCALE.clone()
    scale[0, 0] = math.nextafter(1.0, 2.0)
    scale[0, 0] += 1e-7
    assert not base.equal(QuantizedTensor(PLAIN, CODES, scale))
    assert not base.equal(QuantizedTensor(Encoding(INT8, (1, FULL), "float32"), CODES, torch.ones(3, 1)))
    zero = QuantizedTensor(Encoding(UINT4, (1, 4), "float32", offset="float32"), UCODES, SCALE, None, SCALE * 0)
    negative = QuantizedTensor(zero.encoding, UCODES, SCALE, None, SCALE * -0.0)
    assert not zero.equal(negative)
    nested = QuantizedTensor(NESTED, UCODES, INNER_VALUE)
    assert nested.equal(nested.clone())
    changed = QuantizedTensor(INNER, INNER_VALUE.codes + 1, INNER_VALUE.scale)
    assert not nested.equal(QuantizedTensor(NESTED, UCODES, changed))


def test_clone_and_to_share_nothing() -> None:
    nested = QuantizedTensor(NESTED, UCODES.clone(), INNER_VALUE.clone())
    copy = nested.clone()
    nested.codes.fill_(3)
    assert isinstance(nested.scale, QuantizedTensor)
    nested.scale.codes.fill_(3)
    assert copy.equal(QuantizedTensor(NESTED, UCODES, INNER_VALUE))
    assert nested.to("cpu").equal(nested)


def test_same_bits() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert same_bits(torch.zeros(4, 4).t(), torch.zeros(4, 4))
    for start, stop in ((0, 8), (1, 9), (1, 8), (3, 4)):  # at odd places in memory, of odd lengths
        values = torch.arange(10.0)[start:stop]
        assert same_bits(values, values.clone())
        changed = values.clone()
        changed[-1] += 1
        assert not same_bits(values, changed)
    assert same_bits(torch.tensor(1.5), torch.tensor(1.5))
    assert same_bits(torch.empty(0), torch.empty(0))
    assert same_bits(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert not same_bits(torch.tensor([1 + 0j]), torch.tensor([1 - 0j]).conj())
    assert same_bits(torch.tensor([True]), torch.tensor([True]))
    assert not same_bits(torch.tensor([1], dtype=torch.uint16), torch.tensor([2], dtype=torch.uint16))


def test_dtype_names() -> None:
    for name in ("float16", "bfloat16", "float8_e4m3fn", "uint16", "bool"):
        assert dtype_name(dtype_of(name)) == name
    for name in ("float7", "nn", "__name__"):
        with pytest.raises(EncodingError, match="has no dtype"):
            dtype_of(name)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 10), (1, 4)), ((4, 10), (3, 4)), ((5, 3, 2), (2, FULL, 1)), ((4, 4), (FULL, FULL)), ((0, 4), (1, 4))],
)
def test_expand_repeats_over_blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    grid = param_shape(shape, block)
    param = torch.arange(math.prod(grid), dtype=torch.float32).reshape(grid)
    full = expand(param, shape, block)
    assert full.shape == shape
    for index in itertools.product(*map(range, shape)):
        assert full[index] == param[tuple(0 if b == FULL else i // b for i, b in zip(index, block, strict=True))]

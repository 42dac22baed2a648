"""Other parameters for the same codes: what is exact is exact, and no code ever changes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import slice_quantized

from monoquant_core.check import Mismatch, check_params
from monoquant_core.encoding import (
    FLOAT8_E4M3FN,
    FLOAT8_E8M0FNU,
    FULL,
    INT4,
    INT8,
    UINT4,
    UINT8,
    Encoding,
    Param,
    codebook,
    integer,
    param_shape,
    per_channel,
    per_group,
    per_row,
    per_tensor,
)
from monoquant_core.errors import EncodingError
from monoquant_core.reencode import can_reencode, lift, reencode, run_length
from monoquant_core.tensor import QuantizedTensor, dtype_of, param_values, same_bits

NF4 = codebook("test_nf4", (-1.0, -0.5, 0.0, 0.25, 1.0))
K_SCALE = Encoding(integer(6, signed=False), (1, 8), "float16")  # of ggml's Q4_K
Q4_K = Encoding(UINT4, (1, 32), K_SCALE, offset=K_SCALE)


def sample(encoding: Encoding, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Random codes and parameters of an encoding."""
    generator = torch.Generator().manual_seed(seed)

    def codes(element: object, size: tuple[int, ...]) -> torch.Tensor:
        low, high = element.code_range  # type: ignore[attr-defined]
        if element.name == "float8_e8m0fnu":  # type: ignore[attr-defined]
            low, high = 110, 140
        elif element.name == "float8_e4m3fn":  # type: ignore[attr-defined]
            high = 126
        return torch.randint(low, high + 1, size, generator=generator).to(torch.int8 if low < 0 else torch.uint8)

    def param(spec: Param, size: tuple[int, ...]) -> torch.Tensor | QuantizedTensor:
        if isinstance(spec, Encoding):
            return sample(spec, size, seed + 1)
        if isinstance(spec, str):
            return (torch.rand(size, generator=generator) + 0.01).to(dtype_of(spec))
        return codes(spec, size)

    grid = param_shape(shape, encoding.block)
    return QuantizedTensor(
        encoding, codes(encoding.element, shape), **{k: param(p, grid) for k, p in encoding.params()}
    )


BLOCKS = [
    per_tensor(2),
    per_channel(2),
    per_channel(2, 1),
    per_group(2, 16),
    per_group(2, 8),
    per_group(2, 4),
    (2, 8),
    (4, FULL),
    (1,),
    (8,),
]
DTYPES = ["float32", "float16", "bfloat16", "float64"]
SCALES = st.sampled_from([*DTYPES, FLOAT8_E8M0FNU, Encoding(INT8, per_tensor(2), "float32")])


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    block = draw(st.sampled_from(BLOCKS))
    kind = draw(st.sampled_from(["plain", "zero_point", "offset"]))
    scale = draw(st.sampled_from([*DTYPES, FLOAT8_E8M0FNU]) if len(block) == 1 else SCALES)
    if kind == "zero_point":
        return Encoding(UINT4, block, scale, zero_point=draw(st.sampled_from([UINT4, UINT8, "float16", "float32"])))
    if kind == "offset":
        return Encoding(UINT4, block, scale, offset=draw(st.sampled_from(DTYPES)))
    return Encoding(INT4, block, scale)


@settings(max_examples=400, deadline=None)
@given(encodings(), encodings(), st.integers(0, 5))
def test_what_is_announced_is_what_happens(source: Encoding, target: Encoding, seed: int) -> None:
    tensor = sample(source, (8, 32), seed)
    answer = can_reencode(source, target, tensor.shape)
    if answer not in ("exact", "rounds"):
        with pytest.raises(EncodingError) as refused:
            reencode(tensor, target)
        assert str(refused.value) == answer
        return
    made = reencode(tensor, target)
    assert made.encoding == target
    assert same_bits(made.codes, tensor.codes)
    before, after = tensor.dequantize(), made.dequantize()
    if answer == "exact":
        assert same_bits(before, after)
    else:
        # bfloat16 keeps eight bits of a scale that is taken up to 255 times, and of a shift.
        sizes = {k: float(param_values(v, getattr(source, k)).abs().max()) for k, v in tensor.params().items()}
        largest = sizes["scale"] * (15 + sizes.get("zero_point", 0)) + sizes.get("offset", 0)
        if not all(bool(param_values(v, getattr(target, k)).isfinite().all()) for k, v in made.params().items()):
            assert largest > torch.finfo(torch.float16).max
            with pytest.raises(Mismatch, match="not finite"):  # which the engine says of the tensor
                check_params(made)
            return
        assert float((before - after).abs().max()) <= 3 * 2.0**-8 * largest


@settings(max_examples=100, deadline=None)
@given(encodings(), encodings())
def test_chunks_give_what_the_whole_tensor_gives(source: Encoding, target: Encoding) -> None:
    tensor = sample(source, (8, 32))
    if len(source.block) == 1 or len(target.block) == 1:
        return
    if can_reencode(source, target, tensor.shape) not in ("exact", "rounds"):
        return
    whole = reencode(tensor, target)
    for rows in (range(4), range(4, 8)):
        if per_channel(2, 1) in (source.block, target.block):
            return
        assert reencode(slice_quantized(tensor, rows), target).equal(slice_quantized(whole, rows))


def test_a_group_becomes_four() -> None:
    tensor = sample(Encoding(INT4, per_group(2, 128), "float32"), (3, 256))
    made = reencode(tensor, Encoding(INT4, per_group(2, 32), "float32"))
    assert torch.equal(made.scale, tensor.scale.repeat_interleave(4, dim=1))
    assert same_bits(made.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (per_channel(2), per_group(2, 8)),
        (per_tensor(2), per_channel(2)),
        (per_tensor(2), per_group(2, 8)),
        ((4, 16), per_group(2, 16)),
    ],
)
def test_coarse_blocks_become_finer_ones(coarse: tuple[int, ...], fine: tuple[int, ...]) -> None:
    source, target = Encoding(INT8, coarse, "float32"), Encoding(INT8, fine, "float32")
    tensor = sample(source, (8, 32))
    assert can_reencode(source, target, (8, 32)) == "exact"
    assert same_bits(reencode(tensor, target).dequantize(), tensor.dequantize())
    assert "not parts of blocks" in can_reencode(target, source, (8, 32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_rounded_to_nearest(dtype: str) -> None:
    source, target = (Encoding(INT4, per_group(2, 8), d) for d in ("float32", dtype))
    tensor = sample(source, (4, 16))
    assert can_reencode(source, target, (4, 16)) == "rounds"
    assert same_bits(reencode(tensor, target).scale, tensor.scale.to(dtype_of(dtype)))
    assert can_reencode(target, source, (4, 16)) == "exact"


def test_a_zero_point_becomes_an_offset() -> None:
    source = Encoding(UINT4, per_group(2, 8), "float32", zero_point=UINT4)
    target = Encoding(UINT4, per_group(2, 8), "float16", offset="float16")
    tensor = sample(source, (4, 16))
    assert can_reencode(source, target, (4, 16)) == "rounds"
    made = reencode(tensor, target)
    assert same_bits(made.codes, tensor.codes)
    exact = -tensor.scale.half().double() * tensor.zero_point.double()
    assert torch.equal(made.offset, exact.half())
    error = (made.dequantize() - tensor.dequantize()).abs()
    step = tensor.scale.repeat_interleave(8, dim=1)
    assert bool((error <= step * 15 * 2.0**-10 + 2.0**-12).all())


def test_nested_scales_become_plain_ones() -> None:
    flat = Encoding(UINT4, (1, 32), "float32", offset="float32")
    tensor = sample(Q4_K, (2, 512))
    assert can_reencode(Q4_K, flat, (2, 512)) == "exact"
    assert same_bits(reencode(tensor, flat).dequantize(), tensor.dequantize())
    assert can_reencode(Q4_K, Encoding(UINT4, (1, 32), "float16", offset="float16"), (2, 512)) == "rounds"
    assert "nested" in can_reencode(flat, Q4_K, (2, 512))
    assert "nested" in can_reencode(Q4_K, Encoding(UINT4, (1, 16), K_SCALE, offset=K_SCALE), (2, 512))


@pytest.mark.parametrize(("dtype", "answer"), [("float32", "exact"), ("bfloat16", "exact"), ("float16", "rounds")])
def test_powers_of_two(dtype: str, answer: str) -> None:
    source = Encoding(INT4, per_group(2, 8), FLOAT8_E8M0FNU)
    assert can_reencode(source, Encoding(INT4, per_group(2, 8), dtype), (4, 16)) == answer


CONV = (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (per_channel(4), (1, FULL)),
        ((1, FULL), per_channel(4)),
        ((1, 36), (1, 9)),
        (per_tensor(4), (1, 12)),
        ((36,), (1, 18)),
        (per_channel(4), (4,)),
    ],
)
def test_blocks_of_another_rank(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Groups of a convolution count elements of the flattened row."""
    tensor = sample(Encoding(INT8, source, "float32"), CONV)
    wanted = Encoding(INT8, target, "float32")
    assert can_reencode(tensor.encoding, wanted, CONV) == "exact"
    assert same_bits(reencode(tensor, wanted).dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (Encoding(INT8, (1, 8), "float32"), Encoding(INT4, (1, 8), "float32"), "codes of int8 are not codes of int4"),
        (Encoding(INT4, (1, 8), "float32"), Encoding(UINT4, (1, 8), "float32", zero_point=UINT4), "codes of int4"),
        (Encoding(NF4, (1, 8), "float32"), Encoding(INT4, (1, 8), "float32"), "codes of test_nf4"),
        (Encoding(INT4, (1, 6), "float32"), Encoding(INT4, (1, 4), "float32"), "not parts of blocks"),
        (Encoding(INT8, (1, 8), "float32"), Encoding(INT8, (1, 8), "float32", clip=(-127, 127)), "not confined"),
        (Encoding(INT4, (1, 8), "float32"), Encoding(INT4, (1, 8), FLOAT8_E4M3FN), "scale: float32 cannot be stored"),
        (
            Encoding(UINT4, (1, 8), "float32", offset="float32"),
            Encoding(UINT4, (1, 8), "float32", zero_point=UINT4),
            "needs a zero_point",
        ),
        (
            Encoding(UINT4, (1, 8), "float32", zero_point=UINT8),
            Encoding(UINT4, (1, 8), "float32", zero_point=UINT4),
            "zero_point: uint8 cannot be stored as uint4",
        ),
    ],
)
def test_what_cannot_be_says_why(source: Encoding, target: Encoding, reason: str) -> None:
    answer = can_reencode(source, target, (4, 24))
    assert reason in answer
    with pytest.raises(EncodingError, match="."):
        reencode(sample(source, (4, 24)), target)


def test_a_wider_clip_is_no_obstacle() -> None:
    narrow, wide = (
        Encoding(INT8, (1, 8), "float32", clip=(-63, 63)),
        Encoding(INT8, (1, 8), "float32", clip=(-127, 127)),
    )
    assert can_reencode(narrow, wide, (4, 24)) == "exact"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), st.data())
def test_run_length_is_that_of_every_block(shape: tuple[int, ...], data: st.DataObject) -> None:
    block = tuple(data.draw(st.sampled_from([1, 2, 3, FULL])) for _ in shape)
    grid = param_shape(shape, block)
    ids = torch.arange(math.prod(grid)).view(grid)
    for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
        ids = ids.repeat_interleave(n if b == FULL else b, dim=axis).narrow(axis, 0, n)
    flat = ids.reshape(-1)
    run = run_length(shape, block)
    even = flat.numel() // math.prod(grid)
    regular = flat.numel() % math.prod(grid) == 0 and torch.equal(
        flat, torch.arange(math.prod(grid)).repeat_interleave(even)
    )
    assert run == (even if regular else None)


def test_the_encoding_of_stacked_experts() -> None:
    group = Encoding(INT4, per_group(2, 32), Encoding(INT8, per_tensor(2), "float32"))
    lifted = lift(group, 2, 3)
    assert lifted == Encoding(INT4, (1, 1, 32), Encoding(INT8, (1, FULL, FULL), "float32"))
    assert lift(lifted, 3, 2) == group
    assert lift(Encoding(INT4, per_tensor(3), "float32"), 3, 2).block == per_tensor(3)
    assert lift(Encoding(INT4, (32,), "float32"), 2, 3).block == (32,)
    assert lift(Encoding(INT4, per_row(2), "float32"), 2, 2).block == per_row(2)


def test_parameters_are_never_shared_by_accident() -> None:
    source = Encoding(INT4, per_channel(2), "float32")
    tensor = sample(source, (2, 8))
    made = reencode(tensor, Encoding(INT4, per_group(2, 4), "float32"))
    made.scale.zero_()
    assert bool((param_values(tensor.scale, "float32") > 0).all())

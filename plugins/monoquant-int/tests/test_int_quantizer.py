"""Integer schemes: what they propose, refuse and accept, and the codes they give."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monoquant_int.plugin import W8A8Options
from monoquant_int.quantizer import w8a8

from monoquant_core.encoding import FULL, INT4, INT8, UINT4, UINT8, ActivationQuant, Encoding, integer
from monoquant_core.errors import OptionError, QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.rows import all_rows
from monoquant_core.schemes import Context, Proposal, Quantizer, Refusal
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor

REGISTRY = load_registry()
LINEAR = TensorSpec("w", (32, 256), "float32", kind="linear")


def scheme(name: str, **options: Any) -> Quantizer:
    declaration = REGISTRY.scheme(name)
    made: Quantizer = declaration.load()(build(declaration.options, options, owner=declaration.name))
    return made


def spec_of(x: torch.Tensor, kind: str = "linear") -> TensorSpec:
    return TensorSpec("layer.weight", tuple(x.shape), str(x.dtype).removeprefix("torch."), kind=kind)


def quantized(
    quantizer: Quantizer,
    x: torch.Tensor,
    kind: str = "linear",
    *,
    encoding: Encoding | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    spec = spec_of(x, kind)
    proposal = quantizer.propose(spec)
    assert isinstance(proposal, Proposal), proposal
    assert isinstance(proposal.encoding, Encoding)
    absmax = float(x.abs().max()) if "absmax" in proposal.needs else None
    context = Context(spec, all_rows(spec.shape), Scratch(), absmax, importance)
    return quantizer.quantize(x, encoding or proposal.encoding, context)


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        *((name, "int8") for name in ("INT8", "i8", "I8", "W8A16", "w8a16")),
        *((name, "int4") for name in ("Int4", "i4", "W4A16")),
        *((name, "int3") for name in ("i3", "w3a16")),
        *((name, "w8a8") for name in ("W8A8", "W8A8-INT8")),
    ],
)
def test_names_in_any_case_and_one_spelling_printed(typed: str, printed: str) -> None:
    assert REGISTRY.scheme(typed).name == printed


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from monoquant_core.plugins import load_registry; from monoquant_core.model import TensorSpec\n"
        "d = load_registry().scheme('int4'); q = d.load()(d.options())\n"
        "p = q.propose(TensorSpec('w', (8, 128), 'float32')); assert q.accepts(TensorSpec('w', (8, 128), 'float32'),"
        " p.encoding)\nassert not {'torch', 'numpy'} & set(sys.modules), 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Proposals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "channel", "group"),
    [
        ("linear", (32, 256), (1, FULL), (1, 64)),
        ("", (32, 256), (1, FULL), (1, 64)),
        ("embedding", (32, 256), (1, FULL), (1, 64)),
        ("recurrent", (32, 256), (1, FULL), (1, 64)),
        ("experts", (4, 32, 256), (1, 1, FULL), (1, 1, 64)),
        ("conv", (32, 64, 3), (1, FULL, FULL), (1, 64)),
        ("conv", (32, 64, 3, 3), (1, FULL, FULL, FULL), (1, 64)),
        ("conv", (32, 64, 3, 3, 3), (1, FULL, FULL, FULL, FULL), (1, 64)),
        ("linear_transposed", (256, 32), (FULL, 1), (64, 1)),
        ("conv_transpose", (64, 32, 3, 3), (FULL, 1, FULL, FULL), None),
        ("conv_transpose", (64, 32, 3), (FULL, 1, FULL), None),
    ],
)
def test_blocks_follow_the_output_channel(
    kind: str, shape: tuple[int, ...], channel: tuple[int, ...], group: tuple[int, ...] | None
) -> None:
    spec = TensorSpec("w", shape, "bfloat16", kind=kind)
    assert scheme("int8").propose(spec) == Proposal(Encoding(INT8, channel, "float32"))
    assert scheme("int8", granularity="tensor").propose(spec) == Proposal(
        Encoding(INT8, (FULL,) * len(shape), "float32"), needs=frozenset({"absmax"})
    )
    answer = scheme("int4", group_size=64).propose(spec)
    if group is None:
        assert isinstance(answer, Refusal)
        assert "transposed convolution" in answer.reason
        assert "--granularity channel" in answer.hint
    else:
        assert answer == Proposal(Encoding(INT4, group, "float32"))


@pytest.mark.parametrize("bits", range(2, 9))
def test_defaults_of_every_width(bits: int) -> None:
    expected = Encoding(integer(bits), (1, FULL) if bits == 8 else (1, 128), "float32")
    assert scheme(f"int{bits}").propose(LINEAR) == Proposal(expected)
    unsigned = integer(bits, signed=False)
    assert scheme(f"int{bits}", symmetric=False).propose(LINEAR) == Proposal(
        Encoding(unsigned, expected.block, "float32", zero_point=unsigned)
    )


def test_a_group_size_asks_for_groups() -> None:
    assert scheme("int8", group_size=32).propose(LINEAR) == Proposal(Encoding(INT8, (1, 32), "float32"))


def test_asymmetric_per_tensor_needs_the_tensor_whole() -> None:
    proposal = scheme("int8", granularity="tensor", symmetric=False).propose(LINEAR)
    assert isinstance(proposal, Proposal)
    assert proposal.needs == {"whole"}


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("linear", ActivationQuant(INT8, "token", dynamic=True)),
        ("experts", ActivationQuant(INT8, "token", dynamic=True)),
        ("conv", ActivationQuant(INT8, "tensor", dynamic=True)),
        ("embedding", None),
    ],
)
def test_w8a8_quantizes_the_inputs_of_layers(kind: str, activation: ActivationQuant | None) -> None:
    proposal = scheme("w8a8").propose(dataclasses.replace(LINEAR, kind=kind))
    assert isinstance(proposal, Proposal)
    assert proposal.activation == activation
    assert proposal.encoding == Encoding(INT8, (1, FULL), "float32")


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "options", "reason", "hint"),
    [
        ((64,), "float32", "vector", {}, "a vector has no channels that could share a scale", ""),
        ((), "float32", "", {}, "a scalar has no channels that could share a scale", ""),
        ((0, 64), "float32", "", {}, "it has no elements", ""),
        ((4, 0), "float32", "", {}, "it has no elements", ""),
        ((4, 64), "int64", "", {}, "int64 values are not floats to be quantized", ""),
        ((4, 64), "bool", "", {}, "bool values are not floats to be quantized", ""),
        ((4, 64), "complex64", "", {}, "complex64 values are not floats to be quantized", ""),
        ((4, 64), "float8_e4m3fn", "", {}, "float8_e4m3fn values are not floats to be quantized", ""),
        (
            (4, 192),
            "float32",
            "linear",
            {},
            "groups of 128 do not divide its rows of 192; groups of 48 or 64 or 96 or 192 do",
            "--granularity channel needs no groups",
        ),
        (
            (8, 3, 3, 3),
            "float32",
            "conv",
            {"group_size": 32},
            "groups of 32 do not divide its rows of 27; groups of 27 do",
            "--granularity channel needs no groups",
        ),
        (
            (100, 8),
            "float32",
            "linear_transposed",
            {"group_size": 64},
            "groups of 64 do not divide its rows of 100; groups of 20 or 25 or 50 or 100 do",
            "--granularity channel needs no groups",
        ),
        (
            (8, 13),
            "float32",
            "linear",
            {},
            "groups of 128 do not divide its rows of 13",
            "--granularity channel needs no groups",
        ),
    ],
)
def test_refusals(
    shape: tuple[int, ...], dtype: str, kind: str, options: dict[str, Any], reason: str, hint: str
) -> None:
    spec = TensorSpec("w", shape, dtype, kind=kind)
    assert scheme("int4", **options).propose(spec) == Refusal(reason, hint)
    assert not scheme("int4", **options).accepts(spec, Encoding(INT4, (1, 128), "float32"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int8", {"group_size": 64, "granularity": "channel"}, "group_size 64 and granularity channel exclude"),
        ("int4", {"group_size": 64, "granularity": "tensor"}, "group_size 64 and granularity tensor exclude"),
        ("int4", {"rounding": "search", "granularity": "tensor"}, "rounding search needs a scale per channel or group"),
        ("w8a8", {"rounding": "search", "granularity": "tensor"}, "rounding search needs a scale per channel or group"),
        ("int4", {"narrow_range": True, "symmetric": False}, "narrow_range is for symmetric codes"),
        ("w8a8", {"granularity": "group"}, "granularity is one of auto, tensor, channel"),
        ("int4", {"rounding": "up"}, "rounding is one of auto, search, nearest"),
        ("int4", {"group_size": -1}, "group_size is at least 0"),
    ],
)
def test_options_that_exclude_each_other(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scheme(name, **options)


@pytest.mark.parametrize(
    ("encoding", "accepted"),
    [
        *((Encoding(INT4, (1, 128), dtype), True) for dtype in ("float32", "float16", "bfloat16")),
        (Encoding(INT4, (1, 32), "float16"), True),
        (Encoding(INT4, (1, FULL), "bfloat16"), True),
        (Encoding(INT4, (FULL, FULL), "float32"), True),
        (Encoding(INT4, (1, 128), "float64"), False),
        (Encoding(INT4, (1, 100), "float32"), False),
        (Encoding(INT4, (FULL, 1), "float32"), False),
        (Encoding(INT4, (32,), "float32"), False),
        (Encoding(INT8, (1, 128), "float32"), False),
        (Encoding(INT4, (1, 128), Encoding(INT8, (1, FULL), "float32")), False),
        (Encoding(UINT4, (1, 128), "float32", zero_point=UINT4), False),
        (Encoding(UINT4, (1, 128), "float32", offset="float32"), False),
    ],
    ids=str,
)
def test_accepts_other_scales_and_granularities_of_its_codes(encoding: Encoding, accepted: bool) -> None:
    assert scheme("int4").accepts(LINEAR, encoding) is accepted
    if accepted:
        x = torch.randn(LINEAR.shape)
        made = quantized(scheme("int4"), x, encoding=encoding)
        assert made.encoding == encoding
        assert (made.dequantize() - x).norm() < 0.25 * x.norm()


def test_what_asymmetric_and_searching_schemes_accept() -> None:
    asymmetric = scheme("int4", symmetric=False)
    assert asymmetric.accepts(LINEAR, Encoding(UINT4, (1, 32), "float16", zero_point=UINT4))
    assert not asymmetric.accepts(LINEAR, Encoding(INT4, (1, 32), "float16"))
    assert not asymmetric.accepts(LINEAR, Encoding(UINT4, (1, 32), "float16", zero_point="float16"))
    searching = scheme("int4", rounding="search")
    assert not searching.accepts(LINEAR, Encoding(INT4, (FULL, FULL), "float32"))
    transposed = TensorSpec("w", (64, 32, 3, 3), "float32", kind="conv_transpose")
    assert scheme("int4").accepts(transposed, Encoding(INT4, (FULL, 1, FULL, FULL), "float32"))
    assert not scheme("int4").accepts(transposed, Encoding(INT4, (1, 32), "float32"))


# Codes ------------------------------------------------------------------------------------------------------------


def test_golden_int8() -> None:
    made = quantized(scheme("int8"), torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 63.4]]))
    assert made.scale.tolist() == [[1.0]]
    assert made.codes.tolist() == [[127, -127, 0, 2, 2, 0, -2, 0, 63]]  # half to even


def test_golden_int4() -> None:
    rows = torch.tensor([[7.0, -7.0, 3.5, 4.5, -0.5, 1.2], [-14.0, 14.0, 7.0, -5.0, 1.0, 0.0]])
    made = quantized(scheme("int4", granularity="channel", rounding="nearest"), rows)
    assert made.scale.tolist() == [[1.0], [2.0]]  # the largest code is 7
    assert made.codes.tolist() == [[7, -7, 4, 4, 0, 1], [-7, 7, 4, -2, 0, 0]]


def test_golden_asymmetric() -> None:
    rows = torch.tensor([[-51.0, 204.0, 0.0, 0.5, 100.4], [1.0, 255.0, 2.0, 3.0, 0.0], [-255.0, -1.0, 0.0, -2.5, -3.5]])
    made = quantized(scheme("int8", symmetric=False), rows)
    assert made.scale.tolist() == [[1.0]] * 3
    assert isinstance(made.zero_point, torch.Tensor)
    assert made.zero_point.tolist() == [[51], [0], [255]]
    assert made.codes.tolist() == [[0, 255, 51, 51, 151], [1, 255, 2, 3, 0], [0, 254, 255, 253, 251]]
    four = quantized(scheme("int4", symmetric=False, granularity="channel", rounding="nearest"), rows[:1] / 17)
    assert four.scale.tolist() == [[1.0]]
    assert four.codes.tolist() == [[0, 15, 3, 3, 9]]


def test_golden_narrow_range() -> None:
    nearest = quantized(scheme("int2", granularity="channel", rounding="nearest"), torch.tensor([[1.0, -1.0, 0.4]]))
    assert nearest.codes.tolist() == [[1, -1, 0]]
    x = torch.randn(64, 128)
    assert int(quantized(scheme("int4"), x).codes.min()) == -8
    narrow = quantized(scheme("int4", narrow_range=True), x)
    assert (int(narrow.codes.min()), int(narrow.codes.max())) == (-7, 7)
    assert narrow.encoding.clip == (-7, 7)
    assert isinstance(narrow.scale, torch.Tensor)
    assert bool((narrow.scale > 0).all()), "without the code that has no twin, a negative scale gains nothing"
    asked = dataclasses.replace(narrow.encoding, clip=None)  # by a format, which knows of no clip
    assert int(quantized(scheme("int4", narrow_range=True), x, encoding=asked).codes.min()) == -7


def test_codes_are_multiples_of_the_reciprocal() -> None:
    """For this value, ``x / scale`` rounds to -16."""
    largest, x = float.fromhex("0x1.269d5cp+2"), float.fromhex("-0x1.1fa7cp-1")
    scale = np.float32(largest) / np.float32(127)
    assert np.rint(np.float32(x) / scale) == -16
    assert quantized(scheme("int8"), torch.tensor([[largest, x]])).codes.tolist() == [[127, -15]]


def test_the_scale_is_rounded_before_the_codes() -> None:
    x = torch.randn(16, 256)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        made = quantized(scheme("int8"), x, encoding=Encoding(INT8, (1, FULL), name))
        assert isinstance(made.scale, torch.Tensor)
        assert torch.equal(made.scale, (x.abs().amax(1, keepdim=True) / 127).to(dtype))
        assert torch.equal(made.codes, (x * (1 / made.scale.float())).round().to(torch.int8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_torch_fake_quantize(bits: int) -> None:
    x = torch.distributions.StudentT(4.0).sample((32, 256)) * 0.02
    quantizer = scheme(f"int{bits}", granularity="channel", rounding="nearest")
    made = quantized(quantizer, x)
    largest = (1 << bits - 1) - 1
    assert isinstance(made.scale, torch.Tensor)
    reference = torch.fake_quantize_per_channel_affine(
        x, made.scale.view(-1), torch.zeros(32, dtype=torch.int32), 0, -largest, largest
    )
    assert torch.equal(made.dequantize(), reference)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_torch_fake_quantize_asymmetric(bits: int) -> None:
    x = torch.distributions.StudentT(4.0).sample((32, 256)) * 0.02 + 0.01
    made = quantized(scheme(f"int{bits}", granularity="channel", rounding="nearest", symmetric=False), x)
    assert isinstance(made.scale, torch.Tensor)
    assert isinstance(made.zero_point, torch.Tensor)
    reference = torch.fake_quantize_per_channel_affine(
        x, made.scale.view(-1), made.zero_point.view(-1).to(torch.int32), 0, 0, (1 << bits) - 1
    )
    assert torch.equal(made.dequantize(), reference)


ARRAYS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 16, 32])),
    elements=st.floats(-1e6, 1e6, width=32) | st.floats(-1.0, 1.0, width=32),
)


@given(ARRAYS, st.integers(2, 8), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
@settings(deadline=None, max_examples=150)
def test_nearest_is_the_formula_of_the_onnx_specification(
    array: np.ndarray[Any, Any], bits: int, symmetric: bool, dtype: str
) -> None:
    """``saturate(round_half_to_even(x / scale) + zero_point)`` in float64: equal, or a tie but for rounding errors."""
    if dtype == "bfloat16":
        array = np.where(np.abs(array) < 1e-35, np.float32(0), array)  # whose scales it does not hold
    quantizer = scheme(f"int{bits}", granularity="channel", rounding="nearest", symmetric=symmetric)
    element = integer(bits, signed=symmetric)
    encoding = Encoding(element, (1, FULL), dtype, zero_point=None if symmetric else element)
    made = quantized(quantizer, torch.from_numpy(array), encoding=encoding)
    assert isinstance(made.scale, torch.Tensor)
    low, high = element.code_range
    x, scale = array.astype(np.float64), made.scale.double().numpy()
    zero_point = made.zero_point.numpy().astype(np.int64) if isinstance(made.zero_point, torch.Tensor) else 0
    steps, codes = x / scale, made.codes.numpy().astype(np.int64)
    formula = np.clip(np.rint(steps) + zero_point, low, high)
    distance_from_tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
    assert ((codes == formula) | (distance_from_tie < 1e-4)).all()
    assert (np.abs((codes - zero_point) * scale - x) <= scale * (0.5 + 1e-4)).all(), "nothing is clipped"
    assert (codes[x == 0] == np.broadcast_to(zero_point, codes.shape)[x == 0]).all(), "zero stays zero"
    for row, row_codes in zip(x, codes, strict=True):
        assert (np.diff(row_codes[np.argsort(row, kind="stable")]) >= 0).all(), "monotone"
    if symmetric:
        again = quantized(quantizer, made.dequantize(), encoding=encoding)
        assert np.array_equal(again.codes.numpy(), codes)


# Values that break things -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_magnitude_keeps_its_relative_error(magnitude: float, bits: int, rounding: str, symmetric: bool) -> None:
    x = torch.randn(8, 64).clamp(-1, 1) * torch.tensor(magnitude)
    made = quantized(scheme(f"int{bits}", granularity="channel", rounding=rounding, symmetric=symmetric), x)
    assert isinstance(made.scale, torch.Tensor)
    assert bool(made.scale.isfinite().all())
    assert bool((made.scale != 0).all())
    error = (made.dequantize().double() - x.double()).norm() / x.double().norm()
    assert error < {2: 0.75, 4: 0.15, 8: 0.01}[bits]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_zeros_has_scale_one(name: str, symmetric: bool) -> None:
    x = torch.randn(4, 128)
    x[1] = 0
    x[2] = -0.0
    made = quantized(scheme(name, symmetric=symmetric), x)
    assert isinstance(made.scale, torch.Tensor)
    assert made.scale[1:3].tolist() == [[1.0], [1.0]]
    assert not made.dequantize()[1:3].any()


def test_a_half_scale_that_cannot_be_is_refused() -> None:
    for value, name in ((1e-9, "int8"), (1e9, "int8"), (1e-9, "int4"), (1e9, "int4")):
        x = torch.ones(2, 128) * torch.tensor([[1.0], [value]])
        encoding = Encoding(integer(int(name[3:])), (1, 128), "float16")
        with pytest.raises(QuantizationError, match="^layer.weight: .* float16 cannot hold") as caught:
            quantized(scheme(name), x, encoding=encoding)
        assert "--keep 'layer.weight'" in caught.value.hint


def test_float64_beyond_float32_is_refused() -> None:
    x = torch.ones(2, 128, dtype=torch.float64)
    x[1, 3] = 1e300
    for options in ({}, {"symmetric": False}):
        with pytest.raises(QuantizationError, match=r"^layer.weight\[1, 3\]: 1e\+300 is beyond float32"):
            quantized(scheme("int4", **options), x)


def test_a_range_beyond_float32_is_refused() -> None:
    x = torch.tensor([[3e38, -3e38] * 64])
    with pytest.raises(QuantizationError, match="^layer.weight: its values span more than float32 holds"):
        quantized(scheme("int4", symmetric=False), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["linear_transposed", "experts"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"rounding": "nearest"}, {"granularity": "tensor"}])
def test_what_is_not_finite_is_named_by_its_index(bad: float, kind: str, options: dict[str, Any]) -> None:
    x = torch.randn(2, 128, 128) if kind == "experts" else torch.randn(128, 64)
    at = (1, 5, 7)[-x.ndim :]
    x[at] = bad
    quantizer = scheme("int4", **options)
    spec = spec_of(x, kind)
    proposal = quantizer.propose(spec)
    assert isinstance(proposal, Proposal)
    assert isinstance(proposal.encoding, Encoding)
    absmax = 100.0 if "absmax" in proposal.needs else None
    with pytest.raises(QuantizationError) as caught:
        quantizer.quantize(x, proposal.encoding, Context(spec, all_rows(spec.shape), Scratch(), absmax))
    assert str(caught.value) == f"layer.weight{list(at)}: {bad} is not a finite number"


def test_rows_of_a_tensor_with_one_scale_need_only_its_magnitude() -> None:
    x = torch.randn(64, 96)
    quantizer = scheme("int8", granularity="tensor")
    whole = quantized(quantizer, x).clone()
    absmax = float(x.abs().max())
    for rows in (range(0, 1), range(7, 40), range(40, 64)):
        context = Context(spec_of(x), rows, Scratch(), absmax)
        part = quantizer.quantize(x[rows.start : rows.stop], whole.encoding, context)
        assert torch.equal(part.codes, whole.codes[rows.start : rows.stop])
        assert isinstance(part.scale, torch.Tensor)
        assert isinstance(whole.scale, torch.Tensor)
        assert torch.equal(part.scale, whole.scale)
    with pytest.raises(QuantizationError, match="layer.weight: a value exceeds"):
        quantizer.quantize(2 * x, whole.encoding, Context(spec_of(x), all_rows(whole.shape), Scratch(), absmax))


def test_asymmetric_codes_of_all_widths_are_unsigned() -> None:
    x = torch.randn(8, 128) + 0.5
    for bits in range(2, 9):
        made = quantized(scheme(f"int{bits}", symmetric=False), x)
        assert made.codes.dtype == torch.uint8
        assert int(made.codes.max()) == (1 << bits) - 1
        assert int(made.codes.min()) == 0
    assert made.encoding == Encoding(UINT8, (1, FULL), "float32", zero_point=UINT8)


def test_codes_that_a_format_confines_to_fewer_bits_are_searched() -> None:
    """As ONNX does with the weights of static layers: 7 bits of an int8."""
    quantizer = w8a8(W8A8Options())
    spec = TensorSpec("w", (32, 64), "float32", kind="linear")
    encoding = quantizer.propose(spec).encoding
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def error(chosen, clip):
        q = chosen.quantize(x, dataclasses.replace(encoding, clip=clip), Context(spec, range(32), Scratch()))
        assert int(q.codes.max()) <= clip[1]
        return float((q.dequantize() - x).square().sum())

    nearest = w8a8(W8A8Options(rounding="nearest"))
    assert error(quantizer, (-63, 63)) < error(nearest, (-63, 63))
    assert error(quantizer, (-127, 127)) == error(nearest, (-127, 127))

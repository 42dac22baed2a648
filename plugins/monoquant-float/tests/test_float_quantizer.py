"""fp8 and the casts: what they propose, refuse and accept, and the codes of fp8."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monoquant_core.encoding import FLOAT8_E4M3FN, FLOAT8_E5M2, FULL, INT8, ActivationQuant, Encoding
from monoquant_core.errors import OptionError, QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.rows import all_rows
from monoquant_core.schemes import Context, Proposal, Quantizer, Refusal
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor, decode

REGISTRY = load_registry()
PER_ROW = Encoding(FLOAT8_E4M3FN, (1, FULL), "float32")
LINEAR = TensorSpec("w", (32, 64), "float32", kind="linear")


def scheme(name: str, **options: Any) -> Quantizer:
    declaration = REGISTRY.scheme(name)
    made: Quantizer = declaration.load()(build(declaration.options, options, owner=declaration.name))
    return made


def quantized(x: torch.Tensor, encoding: Encoding = PER_ROW, absmax: float | None = None) -> QuantizedTensor:
    spec = TensorSpec("layer.weight", tuple(x.shape), str(x.dtype).removeprefix("torch."))
    return scheme("fp8").quantize(x, encoding, Context(spec, all_rows(spec.shape), Scratch(), absmax))


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        *((name, "fp8") for name in ("FP8", "f8", "float8_e4m3fn", "W8A8-FP8", "fp8-dynamic")),
        *((name, "float16") for name in ("f16", "FP16", "half", "Float16")),
        *((name, "bfloat16") for name in ("bf16", "BF16")),
    ],
)
def test_names_in_any_case_and_one_spelling_printed(typed: str, printed: str) -> None:
    assert REGISTRY.scheme(typed).name == printed


# Proposals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "block", "inputs"),
    [
        ("linear", (32, 64), (1, FULL), "token"),
        ("experts", (4, 32, 64), (1, 1, FULL), "token"),
        ("embedding", (32, 64), (1, FULL), None),
        ("conv", (32, 8, 3, 3), (1, FULL, FULL, FULL), "tensor"),
        ("conv_transpose", (8, 32, 3), (FULL, 1, FULL), "tensor"),
        ("linear_transposed", (64, 32), (FULL, 1), "token"),
    ],
)
def test_blocks_follow_the_output_channel(
    kind: str, shape: tuple[int, ...], block: tuple[int, ...], inputs: Any
) -> None:
    spec = TensorSpec("w", shape, "bfloat16", kind=kind)
    encoding = Encoding(FLOAT8_E4M3FN, block, "float32")
    activation = ActivationQuant(FLOAT8_E4M3FN, inputs, dynamic=True) if inputs else None
    assert scheme("fp8").propose(spec) == Proposal(encoding, activation)
    assert scheme("fp8", activations="none").propose(spec) == Proposal(encoding)
    assert scheme("fp8", granularity="tensor", activations="none").propose(spec) == Proposal(
        dataclasses.replace(encoding, block=(FULL,) * len(shape)), needs=frozenset({"absmax"})
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((64,), "float32", "a vector has no channels that could share a scale"),
        ((), "float32", "a scalar has no channels that could share a scale"),
        ((0, 64), "float32", "it has no elements"),
        ((4, 64), "int8", "int8 values are not floats to be quantized"),
        ((4, 64), "float8_e4m3fn", "float8_e4m3fn values are not floats to be quantized"),
        ((4, 64), "complex64", "complex64 values are not floats to be quantized"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: str, reason: str) -> None:
    assert scheme("fp8").propose(TensorSpec("w", shape, dtype)) == Refusal(reason)
    assert not scheme("fp8").accepts(TensorSpec("w", shape, dtype), PER_ROW)


@pytest.mark.parametrize(
    ("encoding", "accepted"),
    [
        *((dataclasses.replace(PER_ROW, scale=dtype), True) for dtype in ("float32", "float16", "bfloat16")),
        (Encoding(FLOAT8_E4M3FN, (FULL, FULL), "bfloat16"), True),
        (Encoding(FLOAT8_E4M3FN, (1, FULL), "float64"), False),
        (Encoding(FLOAT8_E4M3FN, (1, 32), "float32"), False),
        (Encoding(FLOAT8_E4M3FN, (1, FULL), "float32", offset="float32"), False),
        (Encoding(FLOAT8_E5M2, (1, FULL), "float32"), False),
        (Encoding(INT8, (1, FULL), "float32"), False),
    ],
    ids=str,
)
def test_accepts_other_scales_and_granularities(encoding: Encoding, accepted: bool) -> None:
    assert scheme("fp8").accepts(LINEAR, encoding) is accepted
    if accepted:
        x = torch.randn(LINEAR.shape)
        made = quantized(x, encoding)
        assert made.encoding == encoding
        assert (made.dequantize() - x).norm() < 0.04 * x.norm()


def test_options() -> None:
    with pytest.raises(OptionError, match="activations is one of auto, dynamic, static, none"):
        scheme("fp8", activations="sometimes")
    with pytest.raises(OptionError, match="has no option 'group_size'"):
        scheme("fp8", group_size=32)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_casts_take_every_float_and_quantize_nothing(name: str) -> None:
    cast = scheme(name)
    for shape in ((), (8,), (4, 8), (2, 3, 4, 5)):
        assert cast.propose(TensorSpec("w", shape, "float32")) == Proposal(name)
    for dtype in ("int64", "bool", "complex64", "float8_e5m2"):
        answer = cast.propose(TensorSpec("w", (4, 8), dtype))
        assert answer == Refusal(f"{dtype} values are not floats to be cast")
    assert not cast.accepts(LINEAR, PER_ROW)
    with pytest.raises(QuantizationError, match=f"^w: {name} is a cast"):
        cast.quantize(torch.ones(32, 64), PER_ROW, Context(LINEAR, range(32), Scratch()))


# Codes ------------------------------------------------------------------------------------------------------------


def test_golden_codes() -> None:
    """OCP 8-bit floating point specification, table 2: 448 is 0x7e, 1 is 0x38, the smallest number 0x01."""
    row = [448.0, -448.0, 1.0, -1.0, 0.0, 2.0**-9, 2.0**-10, 17.0, 19.0, 432.0, 0.3]
    made = quantized(torch.tensor([row]))
    assert made.scale.tolist() == [[1.0]]
    codes = bytes(made.codes[0].tolist()).hex(" ")
    assert codes == "7e fe 38 b8 00 01 00 58 5a 7e 2a"  # half to even


def test_every_finite_value_keeps_its_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[decode(codes, FLOAT8_E4M3FN).isfinite()]
    assert len(codes) == 254
    for scale in (1.0, 0.37, 1e-30, 1e30):
        values = decode(codes, FLOAT8_E4M3FN) * scale
        assert torch.equal(quantized(values.unsqueeze(0)).codes[0], codes)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.floats(-448, 448, width=32) | st.floats(-(2.0**-5), 2.0**-5, width=32),
    ),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
@settings(deadline=None, max_examples=100)
def test_codes_are_those_of_torch(array: np.ndarray[Any, Any], dtype: str) -> None:
    if dtype != "float32":
        array = np.where(np.abs(array) < 0.1, np.float32(0), array)  # whose scales a half does not hold
    made = quantized(torch.from_numpy(array), dataclasses.replace(PER_ROW, scale=dtype))
    assert isinstance(made.scale, torch.Tensor)
    steps = torch.from_numpy(array) * (1 / made.scale.float())
    if not bool(steps.isfinite().all()):
        return  # the reciprocal of a subnormal scale is none: tested below
    clipped = steps.clamp(-448, 448)
    assert torch.equal(made.codes, clipped.to(torch.float8_e4m3fn).view(torch.uint8))
    assert bool(made.dequantize().isfinite().all())
    again = quantized(made.dequantize(), made.encoding)
    assert torch.equal(again.codes, made.codes)


def test_codes_are_those_of_ml_dtypes() -> None:
    float8 = pytest.importorskip("ml_dtypes").float8_e4m3fn
    x = torch.distributions.StudentT(2.0).sample((16, 500))
    made = quantized(x)
    assert isinstance(made.scale, torch.Tensor)
    steps = (x * (1 / made.scale)).numpy()
    assert np.array_equal(made.codes.numpy(), steps.astype(float8).view(np.uint8))


def test_the_largest_magnitude_becomes_448() -> None:
    x = torch.randn(16, 100)
    made = quantized(x)
    assert isinstance(made.scale, torch.Tensor)
    assert torch.equal(made.scale, x.abs().amax(1, keepdim=True) / 448)
    assert (made.codes & 0x7F).amax(1).tolist() == [0x7E] * 16
    for dtype in ("bfloat16", "float16"):
        rounded = quantized(x, dataclasses.replace(PER_ROW, scale=dtype))
        assert isinstance(rounded.scale, torch.Tensor)
        assert torch.equal(rounded.scale, made.scale.to(getattr(torch, dtype)))
        assert (rounded.codes & 0x7F).amax(1).tolist() == [0x7E] * 16, "never NaN, which is 0x7f"


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-30, 1e30, 3e38])
def test_any_magnitude_keeps_its_relative_error(magnitude: float) -> None:
    x = torch.randn(8, 64).clamp(-1, 1) * torch.tensor(magnitude)
    x[3] = 0
    made = quantized(x)
    assert isinstance(made.scale, torch.Tensor)
    assert made.scale[3].tolist() == [1.0]
    assert bool(made.scale.isfinite().all())
    assert bool((made.scale > 0).all())
    assert (made.dequantize().double() - x.double()).norm() < 0.04 * x.double().norm()


def test_rows_of_a_tensor_with_one_scale_need_only_its_magnitude() -> None:
    x = torch.randn(40, 24)
    encoding = Encoding(FLOAT8_E4M3FN, (FULL, FULL), "float32")
    whole = quantized(x, encoding).clone()
    absmax = float(x.abs().max())
    assert quantized(x, encoding, absmax).equal(whole)
    spec = TensorSpec("layer.weight", (40, 24), "float32")
    part = scheme("fp8").quantize(x[7:30], encoding, Context(spec, range(7, 30), Scratch(), absmax))
    assert torch.equal(part.codes, whole.codes[7:30])
    with pytest.raises(QuantizationError, match="^layer.weight: a value exceeds"):
        quantized(x * 2, encoding, absmax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_named_by_its_index(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, 8).to(dtype)
    x[4, 2:] = bad
    with pytest.raises(QuantizationError) as caught:
        quantized(x)
    assert str(caught.value) == f"layer.weight[4, 2]: {bad} is not a finite number"


def test_a_half_scale_that_cannot_be_is_refused() -> None:
    for value in (1e-8, 1e9):
        with pytest.raises(QuantizationError, match="^layer.weight: .* float16 cannot hold") as caught:
            quantized(torch.full((2, 8), value), dataclasses.replace(PER_ROW, scale="float16"))
        assert "--keep 'layer.weight'" in caught.value.hint

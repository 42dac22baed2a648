"""One structure holds every family of formats: equal, bit for bit, to decoders that nobody here wrote.

ggml's blocks are taken apart as ggml-common.h documents them and decoded by ``gguf.quants``; float types are those of
torch, ml_dtypes and torchao; integer, fp8-block, nvfp4 and mxfp4 layouts are decoded by compressed-tensors; nf4 with
quantized scales by torchao.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as ggml

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT6_E2M3FN,
    FLOAT6_E3M2FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FULL,
    INT4,
    INT8,
    UINT2,
    UINT4,
    UINT8,
    ElementType,
    Encoding,
    codebook,
    integer,
    minifloat,
    per_channel,
    per_group,
    per_tensor,
)
from monoquant_core.tensor import QuantizedTensor, decode

# The 16 quantiles of QLoRA, appendix E (arXiv:2305.14314), as in bitsandbytes' csrc/kernels.cu
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4 = codebook("nf4", NF4_VALUES)
# ggml-common.h, kvalues_iq4nl
IQ4_NL = codebook(
    "iq4_nl", tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
)
UINT6 = integer(6, signed=False)
K_SCALE = Encoding(UINT6, (1, 8), "float16")


def as_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def f16(raw: np.ndarray[Any, Any], count: int) -> torch.Tensor:
    """The first two bytes of every block, as the float16 scales of a row of blocks."""
    return as_torch(raw[..., :2].copy().view(np.float16)[..., 0].reshape(-1, count))


def nibbles(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Low nibbles of the block, then its high nibbles."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def bits(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.unpackbits(raw, axis=-1, bitorder="little")


def crumbs(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """2-bit fields: all the lowest ones first."""
    return np.concatenate([raw >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)


def six_bit_scales(raw: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """get_scale_min_k4 of ggml-quants.c: eight 6-bit scales and eight 6-bit minima in 12 bytes."""
    scale, minimum = [], []
    for j in range(8):
        if j < 4:
            scale.append(raw[..., j] & 63)
            minimum.append(raw[..., j + 4] & 63)
        else:
            scale.append(raw[..., j + 4] & 15 | raw[..., j - 4] >> 6 << 4)
            minimum.append(raw[..., j + 4] >> 4 | raw[..., j] >> 6 << 4)
    return np.stack(scale, axis=-1), np.stack(minimum, axis=-1)


def rows_of(codes: np.ndarray[Any, Any], dtype: type, blocks: int) -> torch.Tensor:
    return as_torch(codes.astype(dtype).reshape(-1, blocks * codes.shape[-1]))


def unpack_q8_0(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    return rows_of(raw[..., 2:].view(np.int8), np.int8, n), {"scale": f16(raw, n)}


def unpack_q4_0(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    return rows_of(nibbles(raw[..., 2:]).astype(np.int8) - 8, np.int8, n), {"scale": f16(raw, n)}


def unpack_q4_1(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    return rows_of(nibbles(raw[..., 4:]), np.uint8, n), {"scale": f16(raw, n), "offset": f16(raw[..., 2:], n)}


def unpack_q5_0(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    codes = nibbles(raw[..., 6:]) | bits(raw[..., 2:6]) << 4
    return rows_of(codes.astype(np.int8) - 16, np.int8, n), {"scale": f16(raw, n)}


def unpack_q5_1(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    codes = nibbles(raw[..., 8:]) | bits(raw[..., 4:8]) << 4
    return rows_of(codes, np.uint8, n), {"scale": f16(raw, n), "offset": f16(raw[..., 2:], n)}


def k_params(raw: np.ndarray[Any, Any], n: int) -> dict[str, Any]:
    """``d`` and ``dmin`` of Q4_K and Q5_K; ggml subtracts the minimum, so the IR's offset has ``-dmin``."""
    scale, minimum = six_bit_scales(raw[..., 4:16])
    return {
        "scale": QuantizedTensor(K_SCALE, rows_of(scale, np.uint8, n), f16(raw, n)),
        "offset": QuantizedTensor(K_SCALE, rows_of(minimum, np.uint8, n), -f16(raw[..., 2:], n)),
    }


def unpack_q4_k(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    codes = nibbles(raw[..., 16:].reshape(*raw.shape[:-1], 4, 32)).reshape(*raw.shape[:-1], 256)
    return rows_of(codes, np.uint8, n), k_params(raw, n)


def unpack_q5_k(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    low = nibbles(raw[..., 48:].reshape(*raw.shape[:-1], 4, 32)).reshape(*raw.shape[:-1], 8, 32)
    high = np.stack([raw[..., 16:48] >> j & 1 for j in range(8)], axis=-2)
    return rows_of((low | high << 4).reshape(*raw.shape[:-1], 256), np.uint8, n), k_params(raw, n)


def unpack_q6_k(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    low = nibbles(raw[..., :128].reshape(*raw.shape[:-1], 2, 64))
    high = crumbs(raw[..., 128:192].reshape(*raw.shape[:-1], 2, 32))
    codes = (low | high << 4).reshape(*raw.shape[:-1], 256).astype(np.int8) - 32
    inner = Encoding(INT8, (1, 16), "float16")
    scale = rows_of(raw[..., 192:208].view(np.int8), np.int8, n)
    return rows_of(codes, np.int8, n), {"scale": QuantizedTensor(inner, scale, f16(raw[..., 208:], n))}


def unpack_q2_k(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    codes = crumbs(raw[..., 16:80].reshape(*raw.shape[:-1], 2, 32)).reshape(*raw.shape[:-1], 256)
    inner = Encoding(UINT4, (1, 16), "float16")
    return rows_of(codes, np.uint8, n), {
        "scale": QuantizedTensor(inner, rows_of(raw[..., :16] & 15, np.uint8, n), f16(raw[..., 80:], n)),
        "offset": QuantizedTensor(inner, rows_of(raw[..., :16] >> 4, np.uint8, n), -f16(raw[..., 82:], n)),
    }


def unpack_q3_k(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    low = crumbs(raw[..., 32:96].reshape(*raw.shape[:-1], 2, 32)).reshape(*raw.shape[:-1], 8, 32)
    high = np.stack([raw[..., :32] >> j & 1 for j in range(8)], axis=-2)
    codes = (low | high << 2).reshape(*raw.shape[:-1], 256).astype(np.int8) - 4
    packed = raw[..., 96:108]
    scale = (nibbles(packed[..., :8]) | crumbs(packed[..., 8:]) << 4).astype(np.int8) - 32
    inner = Encoding(integer(6), (1, 16), "float16")
    return rows_of(codes, np.int8, n), {
        "scale": QuantizedTensor(inner, rows_of(scale, np.int8, n), f16(raw[..., 108:], n))
    }


def unpack_iq4_nl(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    return rows_of(nibbles(raw[..., 2:]), np.uint8, n), {"scale": f16(raw, n)}


def unpack_iq4_xs(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    high = raw[..., 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], axis=-1).reshape(*raw.shape[:-1], 8)
    scale = (low | high.astype(np.uint8) << 4).astype(np.int8) - 32
    codes = nibbles(raw[..., 8:].reshape(*raw.shape[:-1], 8, 16)).reshape(*raw.shape[:-1], 256)
    inner = Encoding(integer(6), (1, 8), "float16")
    return rows_of(codes, np.uint8, n), {"scale": QuantizedTensor(inner, rows_of(scale, np.int8, n), f16(raw, n))}


def unpack_tq2_0(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    codes = crumbs(raw[..., :64].reshape(*raw.shape[:-1], 2, 32)).reshape(*raw.shape[:-1], 256)
    return rows_of(codes.astype(np.int8) - 1, np.int8, n), {"scale": f16(raw[..., 64:], n)}


def unpack_mxfp4(raw: np.ndarray[Any, Any], n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    return rows_of(nibbles(raw[..., 1:]), np.uint8, n), {"scale": as_torch(raw[..., 0].reshape(-1, n))}


#: encoding, how to take a block apart, where its float16 numbers are
GGML: dict[str, tuple[Encoding, Callable[[np.ndarray[Any, Any], int], Any], tuple[int, ...]]] = {
    "Q8_0": (Encoding(INT8, (1, 32), "float16"), unpack_q8_0, (0,)),
    "Q4_0": (Encoding(INT4, (1, 32), "float16"), unpack_q4_0, (0,)),
    "Q4_1": (Encoding(UINT4, (1, 32), "float16", offset="float16"), unpack_q4_1, (0, 2)),
    "Q5_0": (Encoding(integer(5), (1, 32), "float16"), unpack_q5_0, (0,)),
    "Q5_1": (Encoding(integer(5, signed=False), (1, 32), "float16", offset="float16"), unpack_q5_1, (0, 2)),
    "Q4_K": (Encoding(UINT4, (1, 32), K_SCALE, offset=K_SCALE), unpack_q4_k, (0, 2)),
    "Q5_K": (Encoding(integer(5, signed=False), (1, 32), K_SCALE, offset=K_SCALE), unpack_q5_k, (0, 2)),
    "Q6_K": (Encoding(integer(6), (1, 16), Encoding(INT8, (1, 16), "float16")), unpack_q6_k, (208,)),
    "Q2_K": (
        Encoding(UINT2, (1, 16), Encoding(UINT4, (1, 16), "float16"), offset=Encoding(UINT4, (1, 16), "float16")),
        unpack_q2_k,
        (80, 82),
    ),
    "Q3_K": (Encoding(integer(3), (1, 16), Encoding(integer(6), (1, 16), "float16")), unpack_q3_k, (108,)),
    "IQ4_NL": (Encoding(IQ4_NL, (1, 32), "float16"), unpack_iq4_nl, (0,)),
    "IQ4_XS": (Encoding(IQ4_NL, (1, 32), Encoding(integer(6), (1, 8), "float16")), unpack_iq4_xs, (0,)),
    "TQ2_0": (Encoding(integer(2), (1, 256), "float16"), unpack_tq2_0, (64,)),
    "MXFP4": (Encoding(FLOAT4_E2M1FN, (1, 32), FLOAT8_E8M0FNU), unpack_mxfp4, ()),
}


def ggml_tensor(name: str, raw: np.ndarray[Any, Any]) -> QuantizedTensor:
    encoding, unpack, _ = GGML[name]
    codes, params = unpack(raw, raw.shape[1])
    return QuantizedTensor(encoding, codes, **params)


@pytest.mark.parametrize("name", GGML)
def test_ggml_blocks_of_random_bytes(name: str) -> None:
    """Every code and every packed scale occurs; only the float16 numbers are kept finite."""
    encoding, _, floats = GGML[name]
    kind = GGMLQuantizationType[name]
    elements, nbytes = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(7)
    raw = random.integers(0, 256, (12, 3, nbytes), dtype=np.uint8)
    for at in floats:
        raw[..., at : at + 2] = random.normal(0, 0.5, (12, 3, 1)).astype(np.float16).view(np.uint8)
    if name == "TQ2_0":  # the fourth value of two bits is no code of it, and nothing writes it
        crumb = random.integers(0, 3, (12, 3, 64, 4), dtype=np.uint8)
        raw[..., :64] = (crumb << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(axis=-1).astype(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = np.concatenate([np.arange(36)]).reshape(12, 3) * 7  # 0..245: 255 is NaN, in ggml a number
    tensor = ggml_tensor(name, raw)
    low, high = encoding.element.code_range
    assert int(tensor.codes.min()) >= low
    assert int(tensor.codes.max()) <= high
    expected = torch.from_numpy(ggml.dequantize(raw.reshape(12, -1), kind))
    assert torch.equal(tensor.dequantize(), expected)
    assert expected.unique().numel() > 50
    assert encoding.nbits((1, elements)) == nbytes * 8
    assert encoding.nbits((12, 3 * elements)) == raw.size * 8


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ2_0", "MXFP4"])
def test_ggml_blocks_of_weights(name: str) -> None:
    """What gguf's own quantizer writes for weights decodes to weights near them, and equal to what gguf decodes."""
    kind = GGMLQuantizationType[name]
    elements, nbytes = GGML_QUANT_SIZES[kind]
    weight = np.random.default_rng(3).normal(0, 0.02, (8, 4 * elements)).astype(np.float32)
    raw = ggml.quantize(weight, kind)
    ours = ggml_tensor(name, raw.reshape(8, 4, nbytes)).dequantize()
    assert torch.equal(ours, torch.from_numpy(ggml.dequantize(raw, kind)))
    assert (ours - torch.from_numpy(weight)).norm() < 0.9 * np.linalg.norm(weight)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q2_K"])
def test_ggml_stack_of_experts(name: str) -> None:
    """A 3-D tensor in the same encoding, its block written with one more axis."""
    encoding, unpack, floats = GGML[name]
    kind = GGMLQuantizationType[name]
    elements, nbytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (6, 2, nbytes), dtype=np.uint8)
    for at in floats:
        raw[..., at : at + 2] = np.array([[[0.25]]], np.float16).view(np.uint8)

    def lift(enc: Encoding) -> Encoding:
        scale = lift(enc.scale) if isinstance(enc.scale, Encoding) else enc.scale
        offset = lift(enc.offset) if isinstance(enc.offset, Encoding) else enc.offset
        return Encoding(enc.element, (1, *enc.block), scale, offset=offset)

    def stack(value: torch.Tensor | QuantizedTensor) -> torch.Tensor | QuantizedTensor:
        if isinstance(value, torch.Tensor):
            return value.reshape(3, 2, -1)
        params = {label: stack(p) for label, p in value.params().items()}
        return QuantizedTensor(lift(value.encoding), value.codes.reshape(3, 2, -1), **params)  # type: ignore[arg-type]

    codes, params = unpack(raw, 2)
    tensor = stack(QuantizedTensor(encoding, codes, **params))
    assert isinstance(tensor, QuantizedTensor)
    expected = torch.from_numpy(ggml.dequantize(raw.reshape(6, -1), kind)).reshape(3, 2, 2 * elements)
    assert torch.equal(tensor.dequantize(), expected)


FLOAT8 = {
    "float8_e4m3fn": (FLOAT8_E4M3FN, torch.float8_e4m3fn),
    "float8_e5m2": (FLOAT8_E5M2, torch.float8_e5m2),
    "float8_e8m0fnu": (FLOAT8_E8M0FNU, torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_tables_are_torchs(name: str) -> None:
    element, dtype = FLOAT8[name]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = codes.view(dtype).to(torch.float32)
    ours = decode(codes, element)
    assert torch.equal(ours.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(ours[known].view(torch.int32), expected[known].view(torch.int32))  # -0.0 included
    assert 0 < int(expected.isnan().sum()) < 8


@pytest.mark.parametrize(
    ("element", "exponent", "mantissa"), [(FLOAT4_E2M1FN, 2, 1), (FLOAT6_E2M3FN, 2, 3), (FLOAT6_E3M2FN, 3, 2)], ids=str
)
def test_small_float_tables_are_torchaos(element: ElementType, exponent: int, mantissa: int) -> None:
    unpack = pytest.importorskip("torchao.prototype.custom_fp_utils")._floatx_unpacked_to_f32
    codes = torch.arange(1 << element.bits, dtype=torch.int32).to(torch.uint8)
    expected = unpack(codes, exponent, mantissa)
    assert torch.equal(decode(codes, element).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    "name",
    ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"],
)
def test_float_tables_are_ml_dtypes(name: str) -> None:
    dtype = getattr(pytest.importorskip("ml_dtypes"), name)
    element = next(
        e
        for e in (FLOAT4_E2M1FN, FLOAT6_E2M3FN, FLOAT6_E3M2FN, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT8_E8M0FNU)
        if e.name == name
    )
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    np.testing.assert_array_equal(decode(as_torch(codes), element).numpy(), codes.view(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_minifloat_builds_what_a_plugin_needs(name: str) -> None:
    """A 3-bit float that nobody has, from the same function."""
    tiny = minifloat("float3_e1m1", 1, 1, nan="none")
    assert tiny.table == (0.0, 1.0, 2.0, 3.0, -0.0, -1.0, -2.0, -3.0)
    assert tiny.bits == 3
    assert FLOAT8[name][0].bits == 8


def compressed(scheme: dict[str, Any]) -> Any:
    """A compressed-tensors scheme of weights alone."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))


def random_codes(element: ElementType, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    low, high = element.code_range
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if element.kind == "int" and element.signed else torch.uint8
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def random_scale(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 1e-3).to(dtype)


INTEGERS = {
    "int8 per tensor": (Encoding(INT8, per_tensor(2), "float32"), {"strategy": "tensor"}),
    "int8 per channel": (Encoding(INT8, per_channel(2), "float32"), {"strategy": "channel"}),
    "int8 per channel, asymmetric": (
        Encoding(UINT8, per_channel(2), "float32", zero_point=UINT8),
        {"strategy": "channel"},
    ),
    "int8 128x128": (
        Encoding(INT8, (128, 128), "float32"),
        {"strategy": "block", "block_structure": [128, 128]},
    ),
    "int4 g128": (Encoding(INT4, per_group(2, 128), "float32"), {"strategy": "group", "group_size": 128}),
    "GPTQ, AWQ": (
        Encoding(UINT4, per_group(2, 128), "float32", zero_point=UINT4),
        {"strategy": "group", "group_size": 128},
    ),
    "GPTQ, AWQ in float16": (
        Encoding(UINT4, per_group(2, 64), "float16", zero_point=UINT4),
        {"strategy": "group", "group_size": 64},
    ),
    "HQQ": (
        Encoding(UINT4, per_group(2, 64), "float32", zero_point="float32"),
        {"strategy": "group", "group_size": 64},
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_decode_as_in_compressed_tensors(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    encoding, strategy = INTEGERS[name]
    shape = (256, 384)
    codes = random_codes(encoding.element, shape)
    grid = tuple(n // (n if b == FULL else b) for n, b in zip(shape, encoding.block, strict=True))
    scale = random_scale(grid)
    zero = None
    if isinstance(encoding.zero_point, ElementType):
        zero = random_codes(encoding.zero_point, grid, seed=2)
    elif encoding.zero_point is not None:
        zero = torch.rand(grid, generator=torch.Generator().manual_seed(3)) * 15
    if encoding.scale == "float16":
        scale = scale.half()
    ours = QuantizedTensor(encoding, codes, scale, zero).dequantize()
    args = QuantizationArgs(num_bits=encoding.element.bits, symmetric=zero is None, **strategy)
    theirs = dequantize(codes.to(torch.int32), scale.float(), zero, args)
    assert torch.equal(ours, theirs)
    assert theirs.unique().numel() > 200


@pytest.mark.parametrize("block", [(1, 96), (64, 1), (32, 48), (64, 96), (1, 1)], ids=str)
@pytest.mark.parametrize("zero_point", [None, UINT8, "float32"], ids=str)
def test_any_block_decodes_as_in_torchao(block: tuple[int, int], zero_point: ElementType | str | None) -> None:
    dequantize_affine = pytest.importorskip("torchao.quantization.quant_primitives").dequantize_affine
    element, grid = (INT8 if zero_point is None else UINT8), (64 // block[0], 96 // block[1])
    codes, scale = random_codes(element, (64, 96)), random_scale(grid)
    zero = None
    if zero_point is not None:
        zero = random_codes(UINT8, grid, seed=5)
        zero = zero if isinstance(zero_point, ElementType) else zero.float() + 0.25
    ours = QuantizedTensor(Encoding(element, block, "float32", zero_point), codes, scale, zero).dequantize()
    assert torch.equal(ours, dequantize_affine(codes, block, scale, zero, codes.dtype, output_dtype=torch.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_convolution_per_channel_decodes_as_in_torchao(axis: int) -> None:
    """Axis 1 is the output channel of a transposed convolution."""
    dequantize_affine = pytest.importorskip("torchao.quantization.quant_primitives").dequantize_affine
    shape = (12, 8, 3, 3)
    block = per_channel(4, axis)
    grid = tuple(n if i == axis else 1 for i, n in enumerate(shape))
    codes, scale = random_codes(INT8, shape), random_scale(grid)
    extents = tuple(1 if i == axis else n for i, n in enumerate(shape))
    ours = QuantizedTensor(Encoding(INT8, block, "float32"), codes, scale).dequantize()
    assert torch.equal(ours, dequantize_affine(codes, extents, scale, None, torch.int8, output_dtype=torch.float32))


def test_convolution_groups_run_over_the_flattened_row() -> None:
    """``(1, 36)`` of a 4-D weight is the block of ``[out, in * kh * kw]``."""
    dequantize_affine = pytest.importorskip("torchao.quantization.quant_primitives").dequantize_affine
    codes, scale = random_codes(INT4, (6, 8, 3, 3)), random_scale((6, 2))
    ours = QuantizedTensor(Encoding(INT4, (1, 36), "float32"), codes, scale).dequantize()
    flat = dequantize_affine(codes.reshape(6, 72), (1, 36), scale, None, torch.int8, output_dtype=torch.float32)
    assert torch.equal(ours, flat.reshape(6, 8, 3, 3))


def test_hqq_with_quantized_zeros() -> None:
    """HQQ's meta-quantization: ``W = (q - ((z_q - z_zero) * z_scale)) * scale``, here without the inner zero."""
    dequantize_affine = pytest.importorskip("torchao.quantization.quant_primitives").dequantize_affine
    inner = Encoding(UINT8, (1, FULL), "float16")
    zero_codes = random_codes(UINT8, (32, 4), seed=8)
    zero_scale = (random_scale((32, 1), seed=9) * 3).half()
    zeros = dequantize_affine(zero_codes, (1, 4), zero_scale.float(), None, torch.uint8, output_dtype=torch.float32)
    codes, scale = random_codes(UINT4, (32, 256)), random_scale((32, 4), torch.float16)
    encoding = Encoding(UINT4, (1, 64), "float16", zero_point=inner)
    ours = QuantizedTensor(encoding, codes, scale, QuantizedTensor(inner, zero_codes, zero_scale)).dequantize()
    theirs = dequantize_affine(codes, (1, 64), scale.float(), zeros, torch.uint8, output_dtype=torch.float32)
    assert torch.equal(ours, theirs)
    assert encoding.nbits((32, 256)) == 32 * 256 * 4 + 32 * 4 * 16 + 32 * 4 * 8 + 32 * 16


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers_decode_as_in_compressed_tensors(bits: int) -> None:
    """Through compressed-tensors' own packing: codes it has unpacked from int32 words are the IR's codes."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, scale = random_codes(integer(bits), (64, 256)), random_scale((64, 4))
    state = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([64, 256]),
    }
    scheme = compressed({"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": 64})
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(QuantizedTensor(Encoding(integer(bits), (1, 64), "float32"), codes, scale).dequantize(), theirs)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8_decodes_as_in_compressed_tensors(strategy: str) -> None:
    """Per tensor, per channel, and DeepSeek's 128x128 blocks with a ragged edge."""
    from compressed_tensors.compressors import NaiveQuantizationCompressor

    shape = (320, 192) if strategy == "block" else (64, 192)
    block = {"tensor": per_tensor(2), "channel": per_channel(2), "block": (128, 128)}[strategy]
    grid = {"tensor": (1, 1), "channel": (64, 1), "block": (3, 2)}[strategy]
    codes = torch.arange(shape[0] * shape[1], dtype=torch.int64).remainder(256).to(torch.uint8).reshape(shape)
    codes[codes & 127 == 127] = 0  # NaN
    scale = random_scale(grid)
    extra = {"block_structure": [128, 128]} if strategy == "block" else {}
    scheme = compressed({"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **extra})
    state = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    theirs = NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
    ours = QuantizedTensor(Encoding(FLOAT8_E4M3FN, block, "float32"), codes, scale).dequantize()
    assert torch.equal(ours, theirs)


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """Even columns in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def test_nvfp4_decodes_as_in_compressed_tensors() -> None:
    """Its global scale is a divisor; one that is a power of two has an exact inverse."""
    from compressed_tensors.compressors import NVFP4PackedCompressor

    codes = random_codes(FLOAT4_E2M1FN, (48, 256))
    scale = random_codes(FLOAT8_E4M3FN, (48, 16), seed=4) & 127
    scale[scale == 127] = 126
    divisor = torch.tensor([4096.0])
    # The compressor decodes in bfloat16, in which the product of a 4-bit and an fp8 number is exact.
    scheme = compressed(
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    )
    state = {
        "weight_packed": pack_fp4(codes),
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_global_scale": divisor,
    }
    theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"].float()
    inner = Encoding(FLOAT8_E4M3FN, per_tensor(2), "float32")
    encoding = Encoding(FLOAT4_E2M1FN, (1, 16), inner)
    ours = QuantizedTensor(encoding, codes, QuantizedTensor(inner, scale, (1 / divisor).reshape(1, 1)))
    assert torch.equal(ours.dequantize(), theirs)
    assert theirs.unique().numel() > 200
    assert encoding.nbits((48, 256)) == 48 * 256 * 4 + 48 * 16 * 8 + 32


def test_mxfp4_decodes_as_in_compressed_tensors() -> None:
    from compressed_tensors.compressors import MXFP4PackedCompressor

    codes = random_codes(FLOAT4_E2M1FN, (48, 256))
    scale = torch.arange(48 * 8).remainder(200).add(20).to(torch.uint8).reshape(48, 8)
    scheme = compressed({"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32})
    state = {"weight_packed": pack_fp4(codes), "weight_scale": scale}
    theirs = MXFP4PackedCompressor.decompress(state, scheme)["weight"].float()
    encoding = Encoding(FLOAT4_E2M1FN, per_group(2, 32), FLOAT8_E8M0FNU)
    assert torch.equal(QuantizedTensor(encoding, codes, scale).dequantize(), theirs)
    assert encoding.nbits((48, 256)) == 48 * 256 * 4.25


@pytest.mark.parametrize(("element", "dtype"), [(FLOAT8_E4M3FN, torch.float8_e4m3fn), (FLOAT8_E5M2, torch.float8_e5m2)])
def test_mxfp8_decodes_as_in_torch(element: ElementType, dtype: torch.dtype) -> None:
    codes = torch.arange(64 * 128).remainder(251).to(torch.uint8).reshape(64, 128)
    scale = torch.arange(64 * 4).remainder(140).add(60).to(torch.uint8).reshape(64, 4)
    values = codes.view(dtype).float().unflatten(1, (4, 32)) * scale.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    ours = QuantizedTensor(Encoding(element, (1, 32), FLOAT8_E8M0FNU), codes, scale).dequantize()
    finite = values.flatten(1).isfinite()
    assert torch.equal(ours[finite], values.flatten(1)[finite])
    assert torch.equal(ours.isnan(), values.flatten(1).isnan())
    assert bool(finite.any())


def test_nf4_values_are_the_published_ones() -> None:
    """torchao has the same table, printed with four digits."""
    nf4 = pytest.importorskip("torchao.quantization").to_nf4
    theirs = nf4(torch.linspace(-1, 1, 64 * 256), block_size=64, scaler_block_size=256).nf4
    assert torch.allclose(theirs, torch.tensor(NF4_VALUES), atol=1e-4, rtol=0)
    assert NF4.bits == 4


def test_nf4_block_64() -> None:
    """``W = code[q] * absmax``: the decode of bitsandbytes without nesting, and of torchao with unit inner scales."""
    codes, absmax = random_codes(NF4, (16, 256)), random_scale((16, 4))
    ours = QuantizedTensor(Encoding(NF4, (1, 64), "float32"), codes, absmax).dequantize()
    expected = np.array(NF4_VALUES, np.float32)[codes.numpy()] * np.repeat(absmax.numpy(), 64, axis=1)
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_nf4_double_quantization_decodes_as_in_torchao() -> None:
    """Scales in blocks of 256, flattened over the whole tensor, with a mean added: a nested block of rank 1."""
    nf4 = pytest.importorskip("torchao.quantization").to_nf4
    theirs = nf4(torch.randn(64, 512, generator=torch.Generator().manual_seed(2)), block_size=64, scaler_block_size=256)
    # torchao divides by a factor where the IR multiplies by a scale: powers of two make the two exact.
    theirs.quantization_factor = torch.exp2(theirs.quantization_factor.log2().round())
    table = codebook("nf4_four_digits", tuple(theirs.nf4.double().tolist()))
    inner = Encoding(INT8, (256,), "float32", offset="float32")
    encoding = Encoding(table, (1, 64), inner)
    codes = torch.stack([theirs.quantized_data >> 4, theirs.quantized_data & 15], dim=-1).reshape(64, 512)
    factor = theirs.quantization_factor.reshape(2)
    scale = QuantizedTensor(
        inner, theirs.quantized_scalers.reshape(64, 8), 1 / factor, None, theirs.scaler_mean.expand(2).contiguous()
    )
    assert torch.equal(QuantizedTensor(encoding, codes, scale).dequantize(), theirs.get_original_weight())
    assert encoding.nbits((64, 512)) == 64 * 512 * 4 + 512 * 8 + 2 * 64

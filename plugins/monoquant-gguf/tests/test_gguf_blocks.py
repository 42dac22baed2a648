"""Blocks of bytes and tensors: what llama.cpp's C code and the gguf package read and write."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from monoquant_gguf import blocks
from monoquant_gguf.layouts import LAYOUTS, QUANTIZED, Layout, by_name, by_type, float_layout, layouts_for

from monoquant_core.encoding import Encoding
from monoquant_core.errors import EncodingError
from monoquant_core.tensor import QuantizedTensor

ROWS, WIDTH = 6, 768

#: types whose bytes ggml's C code reads and writes here
NAMES = [layout.name for layout in QUANTIZED]


def weights(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(seed).standard_t(4, (ROWS, WIDTH)) * 0.03).astype(np.float32)


def finite(name: str, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Random bytes, with the float16 numbers finite and codes that exist."""
    layout = by_name(name)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,), "MXFP4": (), "Q8_0": (0,), "Q4_0": (0,)}
    twos = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    for at in halves.get(name, (0, 2) if name in twos else (0,)):
        raw[:, at : at + 2] = np.linspace(-1, 1, len(raw)).astype(np.float16)[:, None].view(np.uint8)
    if name == "MXFP4":
        raw[:, 0] %= 250
    if name == "TQ2_0":
        raw[:, :64] &= 0b10_10_10_10
    assert raw.shape[1] == layout.type_size
    return raw


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_sizes_are_ggmls(layout: Layout) -> None:
    kind = gguf.GGMLQuantizationType[layout.name]
    assert layout.ggml_type == kind.value
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.block_size, layout.type_size)
    assert by_name(layout.name.lower()) is by_type(layout.ggml_type) is layout


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
def test_an_encoding_takes_as_many_bits_as_its_blocks(layout: Layout) -> None:
    encoding = layout.encoding_for(3)
    encoding.check_weight()
    assert layout.holds(encoding)
    assert layout in layouts_for(encoding)
    assert not layout.holds(Encoding(encoding.element, (1, 1, 7), "float32"))
    if layout.name != "TQ1_0":  # its digits take 1.6 bits, and no code is smaller than a bit
        assert encoding.nbits((2, 3, 512)) == 2 * 3 * layout.row_bytes(512) * 8
    with pytest.raises(ValueError, match="do not divide rows of 500"):
        layout.row_bytes(500)


def test_floats_have_no_encoding() -> None:
    assert [float_layout(name) for name in ("float32", "float16", "bfloat16", "float64")] == [*LAYOUTS[:3], None]
    with pytest.raises(ValueError, match="F16 is a float type"):
        by_name("F16").encoding_for(2)
    assert layouts_for(by_name("TQ2_0").encoding_for(2)) == [by_name("TQ1_0"), by_name("TQ2_0")]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "TQ1_0"])
def test_random_bytes_decode_as_in_gguf(name: str) -> None:
    """Every code and every packed scale occurs."""
    layout = by_name(name)
    raw = np.random.default_rng(5).integers(0, 256, (24, layout.type_size), dtype=np.uint8)
    raw = finite(name, raw).reshape(12, -1)
    tensor = blocks.unpack(torch.from_numpy(raw), layout, (12, 2 * layout.block_size))
    assert isinstance(tensor, QuantizedTensor)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(tensor.dequantize().numpy(), expected)
    np.testing.assert_array_equal(blocks.pack(tensor, layout).numpy(), raw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_llama_cpp_writes_is_read_as_llama_cpp_reads_it(name: str, weighted: bool, llamacpp: ModuleType) -> None:
    layout, x = by_name(name), weights()
    importance = np.random.default_rng(2).random(WIDTH).astype(np.float32) if weighted else None
    raw = np.frombuffer(llamacpp.quantize(x, name, importance), np.uint8).reshape(ROWS, -1).copy()
    tensor = blocks.unpack(torch.from_numpy(raw), layout, (ROWS, WIDTH))
    assert isinstance(tensor, QuantizedTensor)
    ours = tensor.dequantize().numpy()
    np.testing.assert_array_equal(ours.reshape(-1), llamacpp.dequantize(raw.tobytes(), name, x.size))
    np.testing.assert_array_equal(ours, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))
    np.testing.assert_array_equal(blocks.pack(tensor, layout).numpy(), raw)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_gguf_writes_stays_the_same(name: str) -> None:
    raw = gguf.quants.quantize(weights(), gguf.GGMLQuantizationType[name])
    tensor = blocks.unpack(torch.from_numpy(raw), by_name(name), (ROWS, WIDTH))
    np.testing.assert_array_equal(blocks.pack(tensor, by_name(name)).numpy(), raw)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_experts(name: str) -> None:
    """A third axis changes the encoding's rank and no byte."""
    layout = by_name(name)
    raw = finite(name, np.random.default_rng(1).integers(0, 256, (12, layout.type_size), dtype=np.uint8))
    flat = blocks.unpack(torch.from_numpy(raw), layout, (6, 2 * layout.block_size))
    stacked = blocks.unpack(torch.from_numpy(raw.reshape(3, 2, -1)), layout, (3, 2, 2 * layout.block_size))
    assert isinstance(flat, QuantizedTensor)
    assert isinstance(stacked, QuantizedTensor)
    assert layout.holds(stacked.encoding)
    assert torch.equal(flat.dequantize(), stacked.dequantize().flatten(0, 1))
    assert blocks.pack(stacked, layout).shape == (3, 2, 2 * layout.type_size)


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(weights()).to(dtype)
    raw = blocks.pack(x, by_name(name))
    assert raw.dtype == torch.uint8
    back = blocks.unpack(raw, by_name(name), (ROWS, WIDTH))
    assert isinstance(back, torch.Tensor)
    assert torch.equal(back, x)
    expected = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(x.float().numpy().reshape(-1), expected.reshape(-1))


def test_what_does_not_belong_together() -> None:
    q4, q8 = by_name("Q4_0"), by_name("Q8_0")
    tensor = blocks.unpack(torch.zeros(2, 18, dtype=torch.uint8), q4, (2, 32))
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: blocks.pack(tensor, q8), "Q8_0 does not hold"),
        (lambda: blocks.pack(torch.zeros(2, 32), q8), "Q8_0 is not a type of floats"),
        (lambda: blocks.unpack(torch.zeros(2, 18, dtype=torch.uint8), q4, (2, 64)), "36 bytes are not rows"),
        (lambda: blocks.unpack(torch.zeros(2, 18, dtype=torch.uint8), q4, (4, 16)), "36 bytes are not rows"),
        (lambda: blocks.unpack(torch.full((1, 66), 255, dtype=torch.uint8), by_name("TQ2_0"), (1, 256)), "a code is 3"),
    ]
    for call, message in refusals:
        with pytest.raises(EncodingError, match=message):
            call()

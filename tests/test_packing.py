"""Bit packing: equal to compressed-tensors where it has an equal, and reversible everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.errors import EncodingError
from monoquant_core.packing import pack_bits, pack_words, unpack_bits, unpack_words


def codes_of(bits: int, signed: bool, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    made = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    return made.to(torch.int8 if signed else torch.uint8)


SEEDS = st.integers(0, 2**16)
EXTENT = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 64, 100]))


@settings(max_examples=120, deadline=None)
@given(bits=st.integers(1, 8), rows=EXTENT, columns=EXTENT, dim=st.sampled_from([0, 1]), seed=SEEDS)
def test_words_equal_compressed_tensors(bits, rows, columns, dim, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(bits, True, (rows, columns), seed)
    packed = pack_words(codes, bits, dim=dim)
    assert packed.is_contiguous()
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits, packed_dim=dim))
    back = unpack_words(packed, bits, codes.shape[dim], dim=dim, signed=True)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@settings(max_examples=120, deadline=None)
@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    outer=st.lists(st.integers(1, 4), max_size=2),
    n=EXTENT,
    seed=SEEDS,
)
def test_bits_are_dense_lsb_first_and_padded_with_zeros(bits, signed, outer, n, seed):
    codes = codes_of(bits, signed, (*outer, n), seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*outer, -(-n * bits // 8))
    offset = 1 << bits - 1 if signed else 0
    for row, data in zip(codes.reshape(-1, n).tolist(), packed.reshape(-1, packed.shape[-1]).tolist(), strict=True):
        stream = sum(code + offset << i * bits for i, code in enumerate(row))
        assert bytes(data) == stream.to_bytes(len(data), "little")
    back = unpack_bits(packed, bits, n, signed=signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), n=EXTENT, step=st.integers(1, 3), seed=SEEDS)
def test_views_are_packed_like_copies(bits, n, step, seed):
    codes = codes_of(bits, True, (5, n * step + 3), seed)[1:, 3::step]  # not contiguous, at an odd address
    assert torch.equal(pack_bits(codes, bits), pack_bits(codes.clone(), bits))
    assert torch.equal(pack_words(codes.T, bits, dim=0), pack_words(codes.T.contiguous(), bits, dim=0))
    packed = pack_bits(codes, bits)
    shifted = torch.cat([packed.new_zeros(packed.shape[0], 1), packed], 1)[:, 1:]
    assert torch.equal(unpack_bits(shifted, bits, codes.shape[1], signed=True), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 3)])
def test_nothing_packs_to_nothing(bits, shape):
    codes = torch.zeros(shape, dtype=torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert unpack_bits(packed, bits, shape[-1], signed=True).shape == shape
    words = pack_words(codes, bits)
    assert unpack_words(words, bits, shape[-1], signed=True).shape == shape


def test_what_does_not_fit_is_refused():
    codes = torch.zeros(4, dtype=torch.int8)
    with pytest.raises(EncodingError, match="1 to 8 bits are packed, got 9"):
        pack_bits(codes, 9)
    with pytest.raises(EncodingError, match="int8 or uint8"):
        pack_words(codes.float(), 4)
    with pytest.raises(EncodingError, match="int8 or uint8"):
        pack_words(codes[0], 4)
    with pytest.raises(EncodingError, match="9 codes of 4 bits take 5 bytes"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 4, 9)
    with pytest.raises(EncodingError, match="9 codes of 4 bits take 2 words"):
        unpack_words(torch.zeros(1, dtype=torch.int32), 4, 9)

"""Dense bit packing of codes, for formats that store them so.

Code ``i`` of a row takes the bits ``i * bits .. (i + 1) * bits - 1`` of a stream whose bit 0 is the lowest of byte 0,
without gaps: a code may straddle bytes. What is stored is unsigned; signed (int8) codes get ``2 ** (bits - 1)`` added.
Every row starts at a byte (:func:`pack_bits`) or at a 32-bit word (:func:`pack_words`); the bits left over are zero.
Words are little-endian, so that the words of a row hold the same bytes as its bit stream: ``pack_words`` equals
compressed-tensors' ``pack_to_int32``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from monoquant_core.errors import EncodingError

_BYTES = 0x0101010101010101  # one bit per byte of an int64

PACKED_BITS = range(1, 9)  #: the widths that can be packed


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last axis: int8 (signed) or uint8 codes ``[..., n]`` to uint8 ``[..., ceil(n * bits / 8)]``.

    :raises EncodingError: for other dtypes or widths.
    """
    _check(codes, bits)
    n = codes.shape[-1]
    return _stream(codes, bits, -(-n * bits // 8)).contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, n: int, *, signed: bool = False) -> torch.Tensor:
    """Inverse of :func:`pack_bits`: uint8 ``[..., ceil(n * bits / 8)]`` to uint8, or int8 if ``signed``, ``[..., n]``.

    :raises EncodingError: when the bytes are not those of ``n`` codes.
    """
    if packed.dtype != torch.uint8 or bits not in PACKED_BITS or packed.shape[-1] != -(-n * bits // 8):
        raise EncodingError(
            f"{n} codes of {bits} bits take {-(-n * bits // 8)} bytes of uint8, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if bits == 8 and signed:
        return (packed.contiguous() ^ 0x80).view(torch.int8)
    codes = _codes(packed, bits, n)
    return codes.view(torch.int8).sub_(1 << bits - 1) if signed else codes


def pack_words(codes: torch.Tensor, bits: int, *, dim: int = -1) -> torch.Tensor:
    """Pack one axis into int32 words: ``n`` codes along ``dim`` become ``ceil(n * bits / 32)`` words.

    :param codes: int8 (signed) or uint8, of rank 1 or more.
    :raises EncodingError: for other dtypes or widths.
    """
    _check(codes, bits)
    last = dim in (-1, codes.ndim - 1)
    along = codes if last else codes.movedim(dim, -1)
    words = -(-along.shape[-1] * bits // 32)
    stream = _stream(along, bits, 4 * words).reshape(-1)
    packed = _aligned(stream).view(torch.int32).view(*along.shape[:-1], words)
    return packed if last else packed.movedim(-1, dim).contiguous()


def unpack_words(packed: torch.Tensor, bits: int, n: int, *, dim: int = -1, signed: bool = False) -> torch.Tensor:
    """Inverse of :func:`pack_words`: uint8, or int8 if ``signed``, with ``n`` codes along ``dim``.

    :raises EncodingError: when the words are not those of ``n`` codes.
    """
    last = dim in (-1, packed.ndim - 1)
    along = packed.contiguous() if last else packed.movedim(dim, -1).contiguous()
    if along.dtype != torch.int32 or along.shape[-1] != -(-n * bits // 32):
        raise EncodingError(
            f"{n} codes of {bits} bits take {-(-n * bits // 32)} words of int32, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    # A last axis of one word counts as contiguous with any stride.
    along = along if along.stride(-1) == 1 else along.clone(memory_format=torch.contiguous_format)
    stream, used = along.view(torch.uint8), -(-n * bits // 8)
    codes = unpack_bits(stream if stream.shape[-1] == used else stream[..., :used], bits, n, signed=signed)
    return codes if last else codes.movedim(-1, dim).contiguous()


def _check(codes: torch.Tensor, bits: int) -> None:
    if codes.dtype not in (torch.int8, torch.uint8) or codes.ndim == 0:
        raise EncodingError(f"int8 or uint8 codes with at least one axis are packed, got {codes.dtype} {codes.ndim}-D")
    if bits not in PACKED_BITS:
        raise EncodingError(f"codes of 1 to 8 bits are packed, got {bits}")


def _stream(codes: torch.Tensor, bits: int, nbytes: int) -> torch.Tensor:
    """The bit stream of every row, uint8 ``[..., nbytes]``, longer than its codes by zeros or not at all."""
    *outer, n = codes.shape
    offset = 1 << bits - 1 if codes.dtype == torch.int8 else 0
    if bits == 8:
        stream = codes.contiguous().view(torch.uint8)
        stream = stream ^ 0x80 if offset else stream
        return pad(stream, (0, nbytes - n)) if n < nbytes else stream
    # Eight codes are ``bits`` bytes; a last, shorter run is filled with what is stored as zero.
    codes = pad(codes, (0, -n % 8), value=-offset) if n % 8 else codes
    flat = _aligned(codes.reshape(-1))
    if flat.numel() == 0:
        return codes.new_zeros((*outer, nbytes), dtype=torch.uint8)
    if bits == 4:  # pairs of codes in an int16: few operations, each over the whole width of a register
        pairs = flat.view(torch.int16) & 0x0F0F
        if offset:
            pairs ^= 0x0808
        pairs |= pairs >> 4
        stream = pairs.to(torch.uint8)
    else:  # eight codes in an int64, joined in three steps: two, four, eight
        x = flat.view(torch.int64) & _BYTES * ((1 << bits) - 1)
        if offset:  # adding 2^(bits-1) modulo 2^bits flips the top bit
            x ^= _BYTES * offset
        for width in (8, 16, 32):
            used = bits * width // 8
            low = _lanes(2 * width, used)
            high = (x >> width - used).bitwise_and_(low << used)
            x = x.bitwise_and_(low).bitwise_or_(high)
        stream = x.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1).contiguous()
    stream = stream.view(*outer, -1)
    if stream.shape[-1] < nbytes:
        return pad(stream, (0, nbytes - stream.shape[-1]))
    return stream if stream.shape[-1] == nbytes else stream[..., :nbytes]


def _codes(stream: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Unsigned codes of every row's bit stream, in memory of their own."""
    outer = stream.shape[:-1]
    if n == 0 or stream.numel() == 0:
        return stream.new_zeros((*outer, n))
    if bits == 8:
        return stream.clone(memory_format=torch.contiguous_format)
    if bits == 4:
        pairs = stream.reshape(-1).to(torch.int16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(torch.uint8).view(*outer, -1)[..., :n].contiguous()
    runs = -(-n // 8)
    spread = stream.new_zeros((*outer, runs, 8))
    spread[..., :bits] = pad(stream, (0, runs * bits - stream.shape[-1])).view(*outer, runs, bits)
    x = spread.view(-1).view(torch.int64)
    for width in (32, 16, 8):
        used = bits * width // 8
        low = _lanes(2 * width, used)
        high = (x << width - used).bitwise_and_(low << width)
        x = x.bitwise_and_(low).bitwise_or_(high)
    return x.view(torch.uint8).view(*outer, -1)[..., :n].contiguous()


def _lanes(width: int, used: int) -> int:
    """Mask of the low ``used`` bits of every ``width`` bits of an int64."""
    return sum(((1 << used) - 1) << at for at in range(0, 64, width))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` at an address where it can be viewed as wider integers."""
    return x.clone() if x.storage_offset() % 8 else x

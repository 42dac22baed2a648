"""The bytes of every type, as ggml-common.h lays them out: fields in order, and how small codes share bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from monoquant_core.errors import EncodingError
from monoquant_gguf.blocks.parts import Parts

TRITS = (81, 27, 9, 3, 1)  #: weights of the five ternary digits of a byte of TQ1_0, the first one highest


@dataclass(frozen=True, slots=True)
class Codec:
    """``split`` takes uint8 ``[n, type_size]`` apart, ``join`` is its inverse."""

    split: Callable[[torch.Tensor], Parts]
    join: Callable[[Parts], torch.Tensor]


def _groups(raw: torch.Tensor, count: int) -> torch.Tensor:
    """The last axis as ``count`` parts of a length."""
    return raw.reshape(len(raw), count, -1)


def _half(raw: torch.Tensor, at: int) -> torch.Tensor:
    return raw[:, at : at + 2].contiguous().view(torch.float16).view(-1)


def _half_bytes(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values.reshape(-1, 1).contiguous().view(torch.uint8)


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """The low nibbles of the last axis, then the high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    low, high = _words(codes).chunk(2, dim=-1)
    return (low | high << 4).view(torch.uint8)  # in words, too, no nibble reaches the next byte


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers of as many as there may be: operations on short rows take their time by the element."""
    codes = codes.contiguous()
    half = codes.shape[-1] // 2
    return codes.view(torch.int64) if half % 8 == 0 and codes.storage_offset() % 8 == 0 else codes


def _fields(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit fields of the last axis: the lowest of all bytes, then the next ones."""
    mask = (1 << bits) - 1
    return torch.cat([raw >> shift & mask for shift in range(0, 8, bits)], dim=-1)


def _join_fields(codes: torch.Tensor, bits: int) -> torch.Tensor:
    first, *others = codes.chunk(8 // bits, dim=-1)
    joined = first.clone()
    for place, field in enumerate(others, 1):
        joined |= field << bits * place
    return joined


def _signed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    return codes.view(torch.int8) - zero


def _unsigned(codes: torch.Tensor | None, zero: int) -> torch.Tensor:
    assert codes is not None
    return (codes.to(torch.int8) + zero).view(torch.uint8)


def _bits(raw: torch.Tensor) -> torch.Tensor:
    """Every bit of a little-endian number."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return (raw.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _join_bits(bits: torch.Tensor) -> torch.Tensor:
    bytes_ = bits.reshape(*bits.shape[:-1], -1, 8)
    joined = bytes_[..., 0].clone()
    for place in range(1, 8):
        joined |= bytes_[..., place] << place
    return joined


def _split_q8_0(raw: torch.Tensor) -> Parts:
    return Parts(raw[:, 2:].view(torch.int8), _half(raw, 0))


def _join_q8_0(parts: Parts) -> torch.Tensor:
    return torch.cat([_half_bytes(parts.d), parts.codes.view(torch.uint8)], 1)


def _split_q4_0(raw: torch.Tensor) -> Parts:
    return Parts(_signed(_nibbles(raw[:, 2:]), 8), _half(raw, 0))


def _join_q4_0(parts: Parts) -> torch.Tensor:
    # In halves, because rows of a few bytes take their time by the element.
    fields = _half_bytes(parts.d), _join_nibbles(_unsigned(parts.codes, 8))
    return torch.cat([field.view(torch.int16) for field in fields], 1).view(torch.uint8)


def _split_q4_1(raw: torch.Tensor) -> Parts:
    return Parts(_nibbles(raw[:, 4:]), _half(raw, 0), dmin=_half(raw, 2))


def _join_q4_1(parts: Parts) -> torch.Tensor:
    return torch.cat([_half_bytes(parts.d), _half_bytes(parts.dmin), _join_nibbles(parts.codes)], 1)


def _split_q5_0(raw: torch.Tensor) -> Parts:
    return Parts(_signed(_nibbles(raw[:, 6:]) | _bits(raw[:, 2:6]) << 4, 16), _half(raw, 0))


def _join_q5_0(parts: Parts) -> torch.Tensor:
    codes = _unsigned(parts.codes, 16)
    return torch.cat([_half_bytes(parts.d), _join_bits(codes >> 4), _join_nibbles(codes & 15)], 1)


def _split_q5_1(raw: torch.Tensor) -> Parts:
    return Parts(_nibbles(raw[:, 8:]) | _bits(raw[:, 4:8]) << 4, _half(raw, 0), dmin=_half(raw, 2))


def _join_q5_1(parts: Parts) -> torch.Tensor:
    head = [_half_bytes(parts.d), _half_bytes(parts.dmin)]
    return torch.cat([*head, _join_bits(parts.codes >> 4), _join_nibbles(parts.codes & 15)], 1)


def _split_q2_k(raw: torch.Tensor) -> Parts:
    codes = _fields(_groups(raw[:, 16:80], 2), 2).flatten(1)
    return Parts(codes, _half(raw, 80), raw[:, :16] & 15, _half(raw, 82), raw[:, :16] >> 4)


def _join_q2_k(parts: Parts) -> torch.Tensor:
    assert parts.scales is not None
    assert parts.mins is not None
    codes = _join_fields(_groups(parts.codes, 2), 2).flatten(1)
    return torch.cat([parts.scales | parts.mins << 4, codes, _half_bytes(parts.d), _half_bytes(parts.dmin)], 1)


def _split_q3_k(raw: torch.Tensor) -> Parts:
    low = _fields(_groups(raw[:, 32:96], 2), 2).flatten(1)
    codes = _signed(low | _fields(raw[:, :32], 1) << 2, 4)
    scales = _signed(_nibbles(raw[:, 96:104]) | _fields(raw[:, 104:108], 2) << 4, 32)
    return Parts(codes, _half(raw, 108), scales)


def _join_q3_k(parts: Parts) -> torch.Tensor:
    codes, scales = _unsigned(parts.codes, 4), _unsigned(parts.scales, 32)
    low = _join_fields(_groups((codes & 3), 2), 2).flatten(1)
    high = _join_fields(codes >> 2, 1)
    packed = [_join_nibbles(scales & 15), _join_fields(scales >> 4, 2)]
    return torch.cat([high, low, *packed, _half_bytes(parts.d)], 1)


def _six_bits(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 12 bytes: the first four of each whole, the others in nibbles and spare bits."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    return torch.cat([a & 63, c & 15 | a >> 6 << 4], 1), torch.cat([b & 63, c >> 4 | b >> 6 << 4], 1)


def _join_six_bits(scales: torch.Tensor | None, mins: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    assert mins is not None
    (s0, s1), (m0, m1) = scales.chunk(2, 1), mins.chunk(2, 1)
    return torch.cat([s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | (m1 & 15) << 4], 1)


def _split_q4_k(raw: torch.Tensor) -> Parts:
    scales, mins = _six_bits(raw[:, 4:16])
    codes = _nibbles(_groups(raw[:, 16:], 4)).flatten(1)
    return Parts(codes, _half(raw, 0), scales, _half(raw, 2), mins)


def _join_q4_k(parts: Parts) -> torch.Tensor:
    head = [_half_bytes(parts.d), _half_bytes(parts.dmin), _join_six_bits(parts.scales, parts.mins)]
    return torch.cat([*head, _join_nibbles(_groups(parts.codes, 4)).flatten(1)], 1)


def _split_q5_k(raw: torch.Tensor) -> Parts:
    scales, mins = _six_bits(raw[:, 4:16])
    low = _nibbles(_groups(raw[:, 48:], 4)).flatten(1)
    return Parts(low | _fields(raw[:, 16:48], 1) << 4, _half(raw, 0), scales, _half(raw, 2), mins)


def _join_q5_k(parts: Parts) -> torch.Tensor:
    head = [_half_bytes(parts.d), _half_bytes(parts.dmin), _join_six_bits(parts.scales, parts.mins)]
    low = _join_nibbles(_groups((parts.codes & 15), 4)).flatten(1)
    return torch.cat([*head, _join_fields(parts.codes >> 4, 1), low], 1)


def _split_q6_k(raw: torch.Tensor) -> Parts:
    low = _nibbles(_groups(raw[:, :128], 2))
    high = _fields(_groups(raw[:, 128:192], 2), 2)
    return Parts(_signed((low | high << 4).flatten(1), 32), _half(raw, 208), raw[:, 192:208].view(torch.int8))


def _join_q6_k(parts: Parts) -> torch.Tensor:
    assert parts.scales is not None
    codes = _groups(_unsigned(parts.codes, 32), 2)
    low, high = _join_nibbles(codes & 15).flatten(1), _join_fields(codes >> 4, 2).flatten(1)
    return torch.cat([low, high, parts.scales.view(torch.uint8), _half_bytes(parts.d)], 1)


def _split_iq4_nl(raw: torch.Tensor) -> Parts:
    return Parts(_nibbles(raw[:, 2:]), _half(raw, 0))


def _join_iq4_nl(parts: Parts) -> torch.Tensor:
    return torch.cat([_half_bytes(parts.d), _join_nibbles(parts.codes)], 1)


def _split_iq4_xs(raw: torch.Tensor) -> Parts:
    # Unlike elsewhere, neighbours share a byte of scales.
    high = torch.stack([raw[:, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    low = torch.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], dim=-1).flatten(1)
    codes = _nibbles(_groups(raw[:, 8:], 8)).flatten(1)
    return Parts(codes, _half(raw, 0), _signed(low | high << 4, 32))


def _join_iq4_xs(parts: Parts) -> torch.Tensor:
    scales = _unsigned(parts.scales, 32)
    quads, pairs = _groups((scales >> 4), 2), _groups((scales & 15), 4)
    high = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    codes = _join_nibbles(_groups(parts.codes, 8)).flatten(1)
    return torch.cat([_half_bytes(parts.d), high, pairs[..., 0] | pairs[..., 1] << 4, codes], 1)


def _split_tq1_0(raw: torch.Tensor) -> Parts:
    def digits(part: torch.Tensor, count: int) -> torch.Tensor:
        # Bytes hold a fraction of 256: its next digit is what multiplication by 3 carries out.
        powers = [part * 3**place for place in range(count)]
        return torch.cat([(power.to(torch.int16) * 3 >> 8).to(torch.uint8) for power in powers], dim=-1)

    codes = torch.cat([digits(raw[:, :32], 5), digits(raw[:, 32:48], 5), digits(raw[:, 48:52], 4)], 1)
    return Parts(_signed(codes, 1), _half(raw, 52))


def _join_tq1_0(parts: Parts) -> torch.Tensor:
    def joined(digits: torch.Tensor, width: int) -> torch.Tensor:
        total = digits.new_zeros(len(digits), width, dtype=torch.int32)
        for place, digit in enumerate(_groups(digits, digits.shape[1] // width).unbind(1)):
            total += digit.to(torch.int32) * TRITS[place]
        return ((total * 256 + 242) // 243).to(torch.uint8)

    codes = _unsigned(parts.codes, 1)
    fields = [joined(codes[:, :160], 32), joined(codes[:, 160:240], 16), joined(codes[:, 240:], 4)]
    return torch.cat([*fields, _half_bytes(parts.d)], 1)


def _split_tq2_0(raw: torch.Tensor) -> Parts:
    codes = _fields(_groups(raw[:, :64], 2), 2).flatten(1)
    if codes.numel() and int(codes.amax()) > 2:
        raise EncodingError("TQ2_0: a code is 3, which stands for none of -1, 0 and 1")
    return Parts(_signed(codes, 1), _half(raw, 64))


def _join_tq2_0(parts: Parts) -> torch.Tensor:
    codes = _join_fields(_groups(_unsigned(parts.codes, 1), 2), 2).flatten(1)
    return torch.cat([codes, _half_bytes(parts.d)], 1)


def _split_mxfp4(raw: torch.Tensor) -> Parts:
    return Parts(_nibbles(raw[:, 1:]), raw[:, 0])


def _join_mxfp4(parts: Parts) -> torch.Tensor:
    return torch.cat([parts.d.reshape(-1, 1), _join_nibbles(parts.codes)], 1)


CODECS: dict[str, Codec] = {
    "Q8_0": Codec(_split_q8_0, _join_q8_0),
    "Q4_0": Codec(_split_q4_0, _join_q4_0),
    "Q4_1": Codec(_split_q4_1, _join_q4_1),
    "Q5_0": Codec(_split_q5_0, _join_q5_0),
    "Q5_1": Codec(_split_q5_1, _join_q5_1),
    "Q2_K": Codec(_split_q2_k, _join_q2_k),
    "Q3_K": Codec(_split_q3_k, _join_q3_k),
    "Q4_K": Codec(_split_q4_k, _join_q4_k),
    "Q5_K": Codec(_split_q5_k, _join_q5_k),
    "Q6_K": Codec(_split_q6_k, _join_q6_k),
    "IQ4_NL": Codec(_split_iq4_nl, _join_iq4_nl),
    "IQ4_XS": Codec(_split_iq4_xs, _join_iq4_xs),
    "TQ1_0": Codec(_split_tq1_0, _join_tq1_0),
    "TQ2_0": Codec(_split_tq2_0, _join_tq2_0),
    "MXFP4": Codec(_split_mxfp4, _join_mxfp4),
}

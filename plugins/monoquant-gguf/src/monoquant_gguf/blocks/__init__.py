"""Rows of ggml blocks and quantized tensors, each from the other. Imports torch on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoquant_gguf.layouts import Layout

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor


def pack(rows: QuantizedTensor | torch.Tensor, layout: Layout) -> torch.Tensor:
    """The bytes of rows, uint8 ``[..., row_bytes]``: of blocks, or of floats in the layout's dtype.

    :raises EncodingError: when the layout does not hold the encoding.
    """
    from monoquant_gguf.blocks.parts import pack_rows

    return pack_rows(rows, layout)


def unpack(raw: torch.Tensor, layout: Layout, shape: tuple[int, ...]) -> QuantizedTensor | torch.Tensor:
    """Inverse of :func:`pack`: a float tensor where the layout is one of floats.

    :param raw: uint8 ``[..., row_bytes]``, contiguous.
    :param shape: of the rows; its last axis is what ``row_bytes`` hold.
    :raises EncodingError: when bytes and shape do not belong together, or hold a code that the type does not have.
    """
    from monoquant_gguf.blocks.parts import unpack_rows

    return unpack_rows(raw, layout, shape)

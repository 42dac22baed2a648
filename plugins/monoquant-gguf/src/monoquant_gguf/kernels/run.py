"""From a chunk of a tensor to its quantized form: checks, precision, importance, and which searches run."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from monoquant_core.blocks import absmax, check_finite
from monoquant_core.encoding import Encoding
from monoquant_core.errors import QuantizationError
from monoquant_core.schemes import Context
from monoquant_core.tensor import QuantizedTensor
from monoquant_gguf.blocks.parts import Parts, to_tensor
from monoquant_gguf.kernels import lanes as in_torch
from monoquant_gguf.kernels import search as better
from monoquant_gguf.kernels import searched
from monoquant_gguf.layouts import Layout
from monoquant_gguf.quantizer import accelerator

SPAN = 1 << 18  #: elements at a time, at least a row: what a search keeps beside them stays in the cache


@functools.lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    if accelerator() != "numba":
        return None
    from monoquant_gguf.kernels import compiled

    return compiled


def quantize(
    layout: Layout, rows: torch.Tensor, encoding: Encoding, context: Context, *, search: bool
) -> QuantizedTensor:
    """Codes and parameters of a chunk of whole rows.

    :raises QuantizationError: for NaN and infinity, and for values beyond what float16 scales hold.
    """
    matrix = rows.reshape(-1, rows.shape[-1]).to(torch.float32).contiguous()
    importance = _importance(context, matrix)
    compiled = _compiled() if matrix.device.type == "cpu" else None
    lanes = compiled or in_torch
    step = max(1, SPAN // matrix.shape[1])
    pieces = []
    for first in range(0, len(matrix), step):
        piece = matrix[first : first + step]
        if not bool(absmax(piece).isfinite().all()):
            check_finite(rows, context)
        if search:
            parts = better.quantize(layout, piece, importance, lanes)
        else:
            parts = searched.quantize(layout.name, piece, layout.block_size, importance, lanes)
        _check_held(parts, context)
        pieces.append(parts)
    tensor = to_tensor(_joined(pieces), layout, tuple(rows.shape))
    return QuantizedTensor(encoding, tensor.codes, tensor.scale, None, tensor.offset)


def _importance(context: Context, matrix: torch.Tensor) -> torch.Tensor | None:
    if context.importance is None:
        return None
    if context.importance.numel() != matrix.shape[1]:
        raise QuantizationError(
            f"{context.spec.name}: importance of {context.importance.numel()} inputs, where there are "
            f"{matrix.shape[1]}",
            hint="calibrate the model that is quantized",
        )
    return context.importance.to(matrix.device, torch.float32).reshape(-1)


def _check_held(parts: Parts, context: Context) -> None:
    for unit in (parts.d, parts.dmin):
        if unit is not None and unit.is_floating_point() and not bool(unit.isfinite().all()):
            raise QuantizationError(
                f"{context.spec.name}: its values are beyond what float16 scales hold",
                hint=f"leave the tensor as it is: --keep '{context.spec.name}'",
            )


def _joined(pieces: list[Parts]) -> Parts:
    if len(pieces) == 1:
        return pieces[0]

    def join(fields: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [field for field in fields if field is not None]
        return torch.cat(present) if present else None

    codes, d = join([p.codes for p in pieces]), join([p.d for p in pieces])
    assert codes is not None
    assert d is not None
    others = (join([getattr(p, name) for p in pieces]) for name in ("scales", "dmin", "mins"))
    return Parts(codes, d, *others)

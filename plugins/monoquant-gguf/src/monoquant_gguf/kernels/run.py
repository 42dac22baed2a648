"""From a chunk of a tensor to its quantized form: checks, precision, importance, and which searches run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch

from monoquant_core.blocks import check_finite, span
from monoquant_core.compiling import compiled
from monoquant_core.encoding import Encoding
from monoquant_core.errors import QuantizationError
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor
from monoquant_gguf.blocks.parts import Parts, to_tensor
from monoquant_gguf.kernels import lanes as in_torch
from monoquant_gguf.kernels import search as better
from monoquant_gguf.kernels import searched
from monoquant_gguf.kernels.simple import SIMPLE
from monoquant_gguf.layouts import Layout

#: Elements at a time, at least a row. What a search in torch keeps beside them stays in the cache; all else keeps
#: little, and takes the time of a call rather.
SPAN, SEARCH_SPAN = 1 << 19, 1 << 16


def quantize(
    layout: Layout,
    rows: torch.Tensor,
    encoding: Encoding,
    context: Context,
    *,
    search: bool,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Codes and parameters of a chunk of whole rows.

    :param importance: float32 ``[matrices, columns]``, of the experts of a stack or of the whole tensor; by default the
        context's.
    :raises QuantizationError: for NaN and infinity, and for values beyond what float16 scales hold.
    """
    matrix = rows.reshape(-1, rows.shape[-1])
    weights = _importance(context, importance, matrix)
    # Scales that are made of extremes are not finite where a value is not.
    plain = layout.name in SIMPLE and layout.name != "MXFP4" and weights is None
    lanes, elements = _searches(layout, weights, search, matrix.device)
    pieces = []
    for part in _spans(context, matrix, weights, elements):
        piece = matrix[part.start : part.stop].to(torch.float32).contiguous()
        weight = None
        if weights is not None:
            per_matrix = max(1, context.spec.shape[-2])
            weight = weights[(context.rows.start + part.start) // per_matrix if len(weights) > 1 else 0]
        if not plain:
            flat = piece.view(-1)
            if not math.isfinite(float(torch.dot(flat, flat))):  # squares of finite values may overflow, too
                check_finite(rows, context)
        if search:
            parts = better.quantize(layout, piece, weight, lanes, context.scratch)
        else:
            parts = searched.quantize(layout.name, piece, layout.block_size, weight, lanes, context.scratch)
        _check_held(parts, rows, context)
        pieces.append(parts)
    tensor = to_tensor(_joined(pieces, context.scratch), layout, tuple(rows.shape))
    return QuantizedTensor(encoding, tensor.codes, tensor.scale, None, tensor.offset)


def _searches(
    layout: Layout, weights: torch.Tensor | None, search: bool, device: torch.device
) -> tuple[ModuleType, int]:
    """What runs the searches, and how many elements at a time."""
    if layout.name in SIMPLE and weights is None and not (search and layout.name in better.NORMAL_STEP):
        return in_torch, span(SEARCH_SPAN if search else SPAN, device)
    if device.type == "cpu" and (kernels := compiled("monoquant_gguf.kernels.compiled")) is not None:
        return kernels, SPAN
    return in_torch, span(SEARCH_SPAN, device)


def _spans(context: Context, matrix: torch.Tensor, weights: torch.Tensor | None, elements: int) -> Iterator[range]:
    """Rows at a time, all of one expert where they differ in importance."""
    step, first = max(1, elements // matrix.shape[1]), 0
    while first < len(matrix):
        last = min(first + step, len(matrix))
        if weights is not None and len(weights) > 1:
            per_matrix = context.spec.shape[-2]
            at = context.rows.start + first
            last = min(last, first + per_matrix - at % per_matrix)
        yield range(first, last)
        first = last


def _importance(context: Context, given: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor | None:
    if given is None:
        if context.importance is None:
            return None
        given = context.importance if context.importance.ndim > 1 else context.importance.unsqueeze(0)
    experts = math.prod(context.spec.shape[:-2])
    if given.shape[1] != matrix.shape[1] or len(given) not in (1, experts):
        raise QuantizationError(
            f"{context.spec.name}: importance of {given.shape[1]} inputs, where there are {matrix.shape[1]}"
            if given.shape[1] != matrix.shape[1]
            else f"{context.spec.name}: importance of {len(given)} experts, where there are {experts}",
            hint="calibrate the model that is quantized",
        )
    return given.to(matrix.device, torch.float32)


def _check_held(parts: Parts, rows: torch.Tensor, context: Context) -> None:
    for unit in (parts.d, parts.dmin):
        if unit is not None and unit.is_floating_point() and not bool(unit.isfinite().all()):
            check_finite(rows, context)
            raise QuantizationError(
                f"{context.spec.name}: its values are beyond what float16 scales hold",
                hint=f"leave the tensor as it is: --keep '{context.spec.name}'",
            )


def _joined(pieces: list[Parts], scratch: Scratch) -> Parts:
    if len(pieces) == 1:
        return pieces[0]

    def join(fields: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [field for field in fields if field is not None]
        return torch.cat(present) if present else None

    first = pieces[0].codes
    shape = sum(len(p.codes) for p in pieces), first.shape[1]
    codes = torch.cat([p.codes for p in pieces], out=scratch.take("gguf.codes", shape, first.dtype, first.device))
    d = join([p.d for p in pieces])
    assert d is not None
    others = (join([getattr(p, name) for p in pieces]) for name in ("scales", "dmin", "mins"))
    return Parts(codes, d, *others)

"""How far two tensors are apart, in float64. Imports torch only when tensors are measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from monoquant_core.model import Source, TensorSpec
from monoquant_core.report import Comparison, sqnr_db
from monoquant_core.rows import chunks, quantum

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch

SEGMENT = 1 << 18  #: elements whose sums are made at once


class Energies(NamedTuple):
    """Sums over pairs of elements; they add up over the chunks of a tensor."""

    signal: float = 0.0  #: sum of squares of the reference
    noise: float = 0.0  #: sum of squares of the difference
    max_error: float = 0.0  #: largest absolute difference

    def plus(self, other: Energies) -> Energies:
        """Of both sets of elements."""
        return Energies(self.signal + other.signal, self.noise + other.noise, _larger(self.max_error, other.max_error))


def energies(reference: torch.Tensor, approx: torch.Tensor) -> Energies:
    """Signal and noise of two tensors of one shape, in float64 and segment by segment.

    Elements that are the same NaN or infinity on both sides count as equal; any other such pair is infinite noise.
    """
    total = _Moments()
    for a, b in zip(_segments(reference), _segments(approx), strict=True):
        total.add(a, b)
    return Energies(total.signal, total.noise, total.max_error)


def compare_sources(a: Source, b: Source) -> Iterator[Comparison]:
    """Tensor by tensor: the names of ``a`` in its order, then those only in ``b``.

    Quantized tensors are dequantized, and rows are streamed. A name that is tied to another one and that the other
    side lacks is left out: it was compared under its first name.

    :raises SourceError: naming the file and the tensor.
    """
    from monoquant_core.scratch import Scratch

    ours, theirs = {s.name: s for s in a.specs()}, {s.name: s for s in b.specs()}
    scratches = Scratch(), Scratch()
    for name in dict.fromkeys([*ours, *theirs]):
        first, second = ours.get(name), theirs.get(name)
        if first is not None and second is not None:
            yield _compare(a, b, first, second, scratches)
            continue
        spec = first or second
        assert spec is not None
        if spec.tied_to in ours and spec.tied_to in theirs:
            continue
        shapes = (first.shape if first else None, second.shape if second else None)
        yield Comparison(name, "only in A" if first else "only in B", shapes)


class _Moments:
    """Running sums of pairs."""

    def __init__(self) -> None:
        self.signal = self.noise = self.max_error = self.other = self.product = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Two float64 vectors."""
        if not len(a):
            return
        difference = a - b
        error = float(difference.abs().amax())
        if not math.isfinite(error):
            different = (a != b) & ~(a.isnan() & b.isnan())
            difference = difference[different]
            error = float(difference.abs().amax()) if len(difference) else 0.0
            error = error if math.isfinite(error) else math.inf
            finite = a.isfinite() & b.isfinite()
            a, b = a[finite], b[finite]
        self.max_error = _larger(self.max_error, error)
        self.noise += _square_sum(difference) if math.isfinite(error) else math.inf
        self.signal += _square_sum(a)
        self.other += _square_sum(b)
        self.product += float((a * b).sum())

    @property
    def cosine(self) -> float:
        """Of the angle between both; 1 where both are zero, 0 where one is."""
        if self.noise == 0:
            return 1.0
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        return max(-1.0, min(1.0, self.product / norms)) if norms else 0.0


def _compare(
    a: Source, b: Source, ours: TensorSpec, theirs: TensorSpec, scratches: tuple[Scratch, Scratch]
) -> Comparison:
    name, shapes = ours.name, (ours.shape, theirs.shape)
    if ours.shape != theirs.shape:
        return Comparison(name, "shapes differ", shapes)
    dtypes = (ours.dtype, theirs.dtype)
    # Two elements in one, which torch does not decode; and numbers of different kinds.
    if "float4_e2m1fn_x2" in dtypes or len({d.startswith("complex") for d in dtypes}) > 1:
        return Comparison(name, "not numeric", shapes)
    rows = math.lcm(
        quantum(ours.shape, ours.encoding, tensor_wide=True), quantum(theirs.shape, theirs.encoding, tensor_wide=True)
    )
    total = _Moments()
    for chunk in chunks(ours.shape, rows, SEGMENT) if ours.numel else ():
        pair = (source.read(name, chunk, scratch) for source, scratch in zip((a, b), scratches, strict=True))
        for x, y in zip(*map(_segments, pair), strict=True):
            total.add(x, y)
    ratio = sqnr_db(total.signal, total.noise) if math.isfinite(total.noise) else -math.inf
    return Comparison(name, "compared", shapes, ratio, total.max_error, total.cosine)


def _segments(value: object) -> Iterator[torch.Tensor]:
    """The values in order, as float64 vectors of at most ``SEGMENT`` elements."""
    from monoquant_core.tensor import QuantizedTensor

    tensor: torch.Tensor = value.dequantize() if isinstance(value, QuantizedTensor) else value  # type: ignore[assignment]
    if tensor.is_complex():
        import torch

        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), SEGMENT):
        yield flat[start : start + SEGMENT].cpu().double()


def _square_sum(values: torch.Tensor) -> float:
    return float(values.square().sum())


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a

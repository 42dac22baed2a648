"""Better scales for codes, and codes for scales, for many lanes at once in torch: what ``search`` adds to llama.cpp.

As in :mod:`.lanes`, sums of a lane run over its elements in order, and those of a block over its lanes, so that
``monoquant_gguf.kernels.compiled`` gets the same bits. A change is made where it lowers the squared error by more than
the rounding of that sum, so none ever raises it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from monoquant_core.blocks import number
from monoquant_gguf.kernels.ordered import clip, first_extreme, half, inverse, ordered_sum, root

CANDIDATES = 6
FINEST = 0.85  #: of the coarsest candidate: the finest one is at most this
MARGIN = 1 - 2.0**-16  #: sums of 256 squares in order of lanes and elements are nearer than that to exact ones
LEAST, MOST = 1e-30, 1e38  #: errors in between are made of float32 numbers of full precision


class Grid(NamedTuple):
    """The values that the codes of a type stand for, scale aside."""

    low: int
    high: int
    table: tuple[float, ...] = ()  #: the value of each code, from 0 on; empty where codes are the values

    def values(self, steps: torch.Tensor) -> torch.Tensor:
        """Nearest values, of two the even or the larger one."""
        if not self.table:
            return clip(steps, self.low, self.high).round_()
        return self._table(steps)[self.places(steps)]

    def codes(self, steps: torch.Tensor) -> torch.Tensor:
        """What :meth:`values` gives, as codes, int8."""
        return (self.places(steps) if self.table else self.values(steps)).to(torch.int8)

    def of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes."""
        return self._table(codes)[codes.to(torch.int64)] if self.table else codes.float()

    def places(self, steps: torch.Tensor) -> torch.Tensor:
        """Indices into the table."""
        table = self._table(steps)
        return torch.bucketize(steps + steps, table[1:] + table[:-1], right=True)

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=like.device)


class Nested(NamedTuple):
    """Codes of blocks whose scales, and minima, are codes themselves."""

    codes: torch.Tensor  #: int8 [lanes, elements]
    d: torch.Tensor  #: float32 [blocks], numbers of float16
    scales: torch.Tensor  #: float32 [blocks, lanes of one], whole numbers
    dmin: torch.Tensor | None = None
    mins: torch.Tensor | None = None


def better(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Where a squared error is certainly less than another."""
    return (new < old * MARGIN) & (old > LEAST) & (old < MOST)


def scaled(
    x: torch.Tensor, weights: torch.Tensor | None, codes: torch.Tensor, d: torch.Tensor, grid: Grid, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of every lane, those given or better ones.

    Candidates go from the scale that clips nothing to the one that suits a normal distribution; each is refit.

    :param x: float32 [lanes, elements]; weights of squared errors likewise.
    :param codes: int8; ``d`` float32 [lanes], numbers of float16.
    :param step: that suits a unit normal best.
    """
    x = x.t().contiguous()
    w = torch.ones_like(x) if weights is None else weights.t().contiguous()
    wx = w * x
    _, extreme = first_extreme(x)
    edge = grid.low if grid.low != -grid.high else grid.high
    coarsest = extreme / number(edge, x.device)
    deviation = root(ordered_sum(x * x) / number(len(x), x.device))
    finest = torch.minimum(deviation * step, coarsest.abs() * FINEST)
    first = inverse(coarsest)
    stride = (inverse(torch.where(coarsest < 0, -finest, finest)) - first) / number(CANDIDATES - 1, x.device)
    best, fit = torch.full_like(first, -1.0), torch.zeros_like(first)
    for k in range(CANDIDATES):
        q = grid.values(x * (first + stride * k))
        xl, ll = ordered_sum(wx * q), ordered_sum(w * q * q)
        gain = torch.where(ll > 0, xl * xl / ll, -1.0)
        fit, best = torch.where(gain > best, xl / ll, fit), torch.where(gain > best, gain, best)
    fit = half(fit)
    q = grid.values(x * inverse(fit))
    errors = [ordered_sum(w * (level * by - x).square_()) for level, by in ((q, fit), (codes.t().float(), d))]
    chosen = better(*errors)
    return torch.where(chosen.unsqueeze(1), q.t().to(codes.dtype), codes), torch.where(chosen, fit, d)


def refined(
    x: torch.Tensor, weights: torch.Tensor | None, start: Nested, grid: Grid, limits: tuple[int, int]
) -> Nested:
    """Units of least squares for all other codes; then scales and minima; then units again, each with nearest codes.

    :param x: float32 [lanes, elements]; weights of squared errors likewise.
    :param limits: of the codes of scales and minima.
    """
    work = _Refinement(x, weights, start, grid, limits)
    work.units()
    work.scales()
    work.units()
    return work.result(x)


class _Refinement:
    """Elements are ``[elements, lanes]``, what belongs to a lane ``[blocks, lanes of one]``."""

    def __init__(
        self, x: torch.Tensor, weights: torch.Tensor | None, start: Nested, grid: Grid, limits: tuple[int, int]
    ) -> None:
        self.x = x.t().contiguous()
        self.w = torch.ones_like(self.x) if weights is None else weights.t().contiguous()
        self.start, self.grid, self.limits = start, grid, limits
        self.levels = grid.of_codes(start.codes).t().contiguous()
        self.shape = start.scales.shape
        self.d = start.d.unsqueeze(1).expand(self.shape)
        self.s = start.scales
        self.dmin = torch.zeros_like(self.s) if start.dmin is None else start.dmin.unsqueeze(1).expand(self.shape)
        self.m = torch.zeros_like(self.s) if start.mins is None else start.mins
        self.sum_w, self.sum_x = self._sum(self.w), self._sum(self.w * self.x)
        self.error = self._errors(self.levels, self.d * self.s, self.dmin * self.m)
        self.changed = torch.zeros(self.shape, dtype=torch.bool, device=x.device)

    def units(self) -> None:
        """``d`` and ``dmin`` of whole blocks."""
        l1, l2, xl = (sums.double() for sums in self._sums())
        s, m = self.s.double(), self.m.double()
        uu, ux = self._total(s * s * l2), self._total(s * xl)
        d, dmin = ux / uu, torch.zeros_like(uu)
        if self.start.mins is not None:
            uv, vv = self._total(s * m * l1), self._total(m * m * self.sum_w.double())
            vx = self._total(m * self.sum_x.double())
            determinant = uu * vv - uv * uv
            solvable = determinant > 0
            d = torch.where(solvable, (ux * vv - uv * vx) / determinant, d)
            dmin = torch.where(solvable, (uv * ux - uu * vx) / determinant, 0.0)
        self._accept(half(d.float()), self.s, half(dmin.float()), self.m, whole=True)

    def scales(self) -> None:
        """Codes of the scales and minima of each lane."""
        l1, l2, xl = self._sums()
        low, high = self.limits
        if self.start.mins is None:
            s, m = clip((xl / l2) / self.d, low, high).round_(), self.m
        else:
            determinant = self.sum_w * l2 - l1 * l1
            solvable = determinant > 0
            slope = (self.sum_w * xl - self.sum_x * l1) / determinant
            below = (l1 * xl - l2 * self.sum_x) / determinant
            s = torch.where(solvable, clip(slope / self.d, low, high).round_(), self.s)
            m = torch.where(solvable, clip(below / self.dmin, low, high).round_(), self.m)
        self._accept(self.d, s, self.dmin, m, whole=False)

    def result(self, x: torch.Tensor) -> Nested:
        """The codes are those of the last accepted parameters, which are the nearest, or the first ones."""
        steps = (x + (self.dmin * self.m).view(-1, 1)) * inverse(self.d * self.s).view(-1, 1)
        codes = torch.where(self.changed.view(-1, 1), self.grid.codes(steps), self.start.codes)
        if self.start.mins is None:
            return Nested(codes, self.d[:, 0], self.s)
        return Nested(codes, self.d[:, 0], self.s, self.dmin[:, 0], self.m)

    def _accept(self, d: torch.Tensor, s: torch.Tensor, dmin: torch.Tensor, m: torch.Tensor, *, whole: bool) -> None:
        scale, below = d * s, dmin * m
        levels = self.grid.values((self.x + below.view(-1)) * inverse(scale).view(-1))
        error = self._errors(levels, scale, below)
        if whole:
            chosen = better(self._total(error), self._total(self.error)).expand(self.shape)
        else:
            chosen = better(error, self.error)
        self.levels = torch.where(chosen.reshape(-1), levels, self.levels)
        self.d, self.dmin = torch.where(chosen, d, self.d), torch.where(chosen, dmin, self.dmin)
        self.s, self.m = torch.where(chosen, s, self.s), torch.where(chosen, m, self.m)
        self.error = torch.where(chosen, error, self.error)
        self.changed |= chosen

    def _errors(self, levels: torch.Tensor, scale: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        difference = levels * scale.view(-1) - below.view(-1) - self.x
        return self._sum(self.w * (difference * difference))

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wl = self.w * self.levels
        return self._sum(wl), self._sum(wl * self.levels), self._sum(wl * self.x)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return ordered_sum(x).view(self.shape)

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        return ordered_sum(x.t().contiguous()).unsqueeze(1)

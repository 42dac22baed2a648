"""Ranges chosen by the mean squared error of the quantized values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monoquant_calibration.counted import MOST_CLIPPED, Counted
from monoquant_calibration.plugin import MseOptions
from monoquant_core.errors import OptionError

_PER_OCTAVE = 8  # ends tried first: for both signs at once, then for each
_REFINED = 9  # tried around the best one, in each round after that
_ROUNDS = (1.1, 1.03, 1.008)  # factors by which an end is moved at most
_WORTH = 0.01  # of the error must be saved to clip anything: unseen values may lie beyond the observed ones
_THIN = 1e-6  # steps: in a bin that is not wider, all values are its middle


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers of some bits that a range is mapped to."""

    bits: int
    symmetric: bool

    def of(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step, and the smallest and largest number of steps from zero, of every range."""
        if self.symmetric:
            largest = (1 << self.bits - 1) - 1
            return torch.maximum(-low, high) / largest, torch.full_like(low, -largest), torch.full_like(low, largest)
        levels = (1 << self.bits) - 1
        step = (high - low) / levels
        zero_point = (-low / step).round()
        return step, -zero_point, levels - zero_point


class Mse(Counted):
    """The range with the least squared error, each end for itself; of equal ends if they have to be."""

    def __init__(self, options: MseOptions) -> None:
        super().__init__(options)
        if not 2 <= options.bits <= 16:
            raise OptionError(f"mse: bits are 2 to 16, got {options.bits}")
        self._grid = Grid(options.bits, options.symmetric)

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        bins = self.histogram.bins()
        not_zero = (bins.lower != 0) | (bins.upper != 0)
        ends = torch.zeros(2, len(bins.counts), dtype=torch.float64)
        for i, counts in enumerate(bins.counts):
            kept = not_zero & (counts > 0)
            if bool(kept.any()):
                minimum, maximum = self.histogram.minimum[i].double(), self.histogram.maximum[i].double()
                lower, upper = bins.lower[kept].clamp(min=minimum), bins.upper[kept].clamp(max=maximum)
                ends[:, i] = Search(lower, upper, counts[kept].double(), self._grid).best()
        low, high = ends
        return low, high


class Search:
    """Looks for the range of least error of one channel's values.

    :param lower: where the occupied bins start, float64 ``[bins]``, ascending; the outermost values end the outer ones.
    """

    def __init__(self, lower: torch.Tensor, upper: torch.Tensor, counts: torch.Tensor, grid: Grid) -> None:
        if counts[0] == 1:
            upper[0] = lower[0]  # the one value that is known exactly
        if counts[-1] == 1:
            lower[-1] = upper[-1]
        self.minimum, self.maximum = lower[0].clamp(max=0.0), upper[-1].clamp(min=0.0)
        self.grid = grid
        self._tails = [_some(lower, counts).clamp(max=0.0), _some(upper.flip(0), counts.flip(0)).clamp(min=0.0)]
        magnitudes, order = torch.where(lower < 0, -lower, upper).sort(descending=True)
        self._magnitudes = _some(magnitudes, counts[order])
        # What is below half of the smallest step becomes zero in every range, and decides nothing.
        step = (self._tails[1].amin() - self._tails[0].amax()) / (1 << grid.bits) / _ROUNDS[0] ** 2
        kept = torch.maximum(lower.abs(), upper.abs()) > step / 2
        self._bins = lower[kept], upper[kept], counts[kept]

    def best(self) -> torch.Tensor:
        """Low and high, float64 ``[2]``; the widest range where clipping would save next to nothing."""
        best = self._choose(*self._clip(self._magnitudes))
        if self.grid.symmetric:
            for factor in _ROUNDS:
                best = self._choose(*self._clip(best[1] * _around(factor)))
        else:
            for end in (0, 1):
                best = self._move(best, end, self._tails[end])
            for factor in _ROUNDS:
                for end in (0, 1):
                    best = self._move(best, end, best[end] * _around(factor))
        widest = self._fit(self.minimum, self.maximum)
        errors = self._errors(*torch.stack([best, widest]).unbind(1))
        return widest if errors[1] <= (1 + _WORTH) * errors[0] else best

    def _clip(self, magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranges of values up to each magnitude."""
        return torch.maximum(-magnitudes, self.minimum), torch.minimum(magnitudes, self.maximum)

    def _move(self, best: torch.Tensor, end: int, candidates: torch.Tensor) -> torch.Tensor:
        """The best range with another end, low (0) or high (1), or the same."""
        ends = best.expand(len(candidates) + 1, 2).clone()
        ends[1:, end] = candidates.clamp(self.minimum, self.maximum)
        return self._choose(*ends.unbind(1))

    def _choose(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Of several ranges the one with the least error; of equally good ones the first."""
        ranges = self._fit(low, high)
        return ranges[:, self._errors(*ranges).argmin()]

    def _fit(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Ranges as the integers allow them."""
        if self.grid.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return torch.stack([low, high])

    def _errors(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return squared_errors(*self._bins, self.grid, low, high)


def squared_errors(
    lower: torch.Tensor, upper: torch.Tensor, counts: torch.Tensor, grid: Grid, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Squared error that every range would leave, summed over all values: float64 ``[ranges]``.

    The integral over every bin is exact, for values that lie evenly in it.
    """
    step, smallest, largest = (t.unsqueeze(1) for t in grid.of(low, high))

    def integral(x: torch.Tensor) -> torch.Tensor:
        """Of the squared error, from zero to x, in steps. Between two integers it grows by 1/12."""
        steps = x / step
        inside = steps.clamp(smallest, largest)
        nearest = inside.round()
        return nearest / 12 + ((inside - nearest) ** 3 + (steps - inside) ** 3) / 3

    width = (upper - lower) / step
    middle = (upper + lower) / 2 / step
    at_middle = (middle - middle.round().clamp(smallest, largest)) ** 2
    spread = (integral(upper) - integral(lower)) / width
    return (torch.where(width <= _THIN, at_middle, spread) * counts).sum(1) * step.squeeze(1) ** 2


def _some(ends: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Ends of bins to try, of those given from the outermost one on inwards: beyond them there are few values."""
    beyond = counts.cumsum(0) - counts
    ends = ends[beyond <= MOST_CLIPPED * counts.sum()]
    parts = (ends.abs().log2() * _PER_OCTAVE).floor()
    return ends[torch.nn.functional.pad(parts.diff() != 0, (1, 0), value=True)]


def _around(factor: float) -> torch.Tensor:
    return factor ** torch.linspace(-1, 1, _REFINED, dtype=torch.float64)

"""Ranges chosen by the Kullback-Leibler divergence of the quantized values from the observed ones.

S. Migacz, "8-bit inference with TensorRT" (GTC 2017): for every threshold, the values beyond it are moved to the
outermost bin of the distribution P; Q joins the bins of each integer and gives their values back evenly to those that P
occupies; the threshold with the smallest divergence of Q from P wins.

Two things differ. The bins have no width that they share, so that one outlier does not put all other values into one
of them; with densities, sums over bins become differences of running sums. And zeros are left out: they are exact,
whatever the range.
"""

from __future__ import annotations

import torch

from monoquant_calibration.counted import MOST_CLIPPED, Counted
from monoquant_calibration.plugin import EntropyOptions
from monoquant_core.errors import OptionError


class Entropy(Counted):
    """Clips both signs at the magnitude with the smallest divergence; from zero if no value is negative."""

    def __init__(self, options: EntropyOptions) -> None:
        super().__init__(options)
        if not 2 <= options.bits <= 8:
            raise OptionError(f"entropy: bits are 2 to 8, got {options.bits}")
        self._levels = 1 << options.bits - 1

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        bins = self.histogram.magnitudes()
        thresholds = torch.zeros(len(bins.counts), dtype=torch.float64)
        for i, counts in enumerate(bins.counts):
            kept = counts > 0
            if bool(kept.any()):
                thresholds[i] = threshold(bins.lower[kept], bins.upper[kept], counts[kept].double(), self._levels)
        low, high = self.histogram.minimum.double(), self.histogram.maximum.double()
        return torch.maximum(-thresholds, low), torch.minimum(thresholds, high)


def threshold(lower: torch.Tensor, upper: torch.Tensor, counts: torch.Tensor, levels: int) -> torch.Tensor:
    """The end of a bin that has the smallest divergence of all that clip few; of equal ones the largest.

    :param lower: where the bins of magnitudes start, float64 ``[bins]``; all are occupied.
    :param levels: integers for the magnitudes up to a threshold.
    """
    inside = counts.cumsum(0)
    tried = inside >= (1 - MOST_CLIPPED) * inside[-1]
    divergence = divergences(lower, upper, counts, levels, tried.nonzero().view(-1).flip(0))
    return upper[tried].flip(0)[divergence.argmin()]


def divergences(
    lower: torch.Tensor, upper: torch.Tensor, counts: torch.Tensor, levels: int, outermost: torch.Tensor
) -> torch.Tensor:
    """Divergence of the values quantized up to the end of a bin from all values, for every bin in ``outermost``.

    With ``c`` values in a bin of width ``w``, ``m`` values in the occupied width ``v`` of an integer, and ``M`` of all
    ``N`` values up to the threshold, ``P log (P / Q)`` of a bin is ``c / N (log (c / w) - log (m / v) + log (M / N))``,
    where the values beyond the threshold count in the outermost one. The second term adds up to one for each integer.
    """
    width = upper - lower
    total, inside = counts.sum(), counts.cumsum(0)[outermost]
    ends = upper[outermost].unsqueeze(1) * torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    values, occupied = _running(lower, upper, counts, ends).diff(dim=1), _running(lower, upper, width, ends).diff(dim=1)
    density = torch.where(occupied > 0, values / occupied, 0.0)
    exact = (counts * (counts / width).log()).cumsum(0)[outermost]
    quantized = torch.special.xlogy(values, density).sum(1)
    last, moved = counts[outermost], total - inside
    raised = torch.special.xlogy(last + moved, (last + moved) / width[outermost])
    raised -= last * (last / width[outermost]).log()
    quantized += moved * density[:, -1].log()
    divergence: torch.Tensor = (exact + raised - quantized) / total + (inside / total).log()
    return divergence


def _running(lower: torch.Tensor, upper: torch.Tensor, amounts: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """How much of the amounts of bins lies below each point, where they lie evenly in their bins."""
    sums = torch.nn.functional.pad(amounts.cumsum(0), (1, 0))
    index = torch.searchsorted(upper, points, right=True)
    inside = index.clamp(max=len(upper) - 1)
    part = ((points - lower[inside]) / (upper - lower)[inside]).clamp_(0, 1)
    return sums[index] + torch.where(index == inside, part * amounts[inside], 0.0)

"""Ranges that leave out a share of the values."""

from __future__ import annotations

import torch

from monoquant_calibration.counted import Counted
from monoquant_calibration.plugin import PercentileOptions
from monoquant_core.errors import OptionError


class Percentile(Counted):
    """From the percentile 100 - p to the percentile p of all values, zeros included; from zero if none is negative."""

    def __init__(self, options: PercentileOptions) -> None:
        super().__init__(options)
        if not 50 <= options.percentile <= 100:
            raise OptionError(f"percentile: percentile is 50 to 100, got {options.percentile}")
        self._percentile = options.percentile

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.histogram.quantile((100 - self._percentile) / 100), self.histogram.quantile(self._percentile / 100)

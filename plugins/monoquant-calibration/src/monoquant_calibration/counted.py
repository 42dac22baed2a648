"""What calibrators have in common that choose a range from the histogram of all values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch

from monoquant_calibration.plugin import MinMaxOptions
from monoquant_core.errors import CalibrationError
from monoquant_core.histogram import Histogram
from monoquant_core.stats import usable_range

MOST_CLIPPED = 0.1  #: of the values: no search for a range tries to clip more


class Counted(ABC):
    """Counts values; subclasses say which range they deserve."""

    order_matters = False

    def __init__(self, options: MinMaxOptions) -> None:
        self.histogram = Histogram(per_channel=options.granularity == "channel")

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        """Take in a batch."""
        self.histogram.observe(values, axis)

    def merge(self, other: Self) -> None:
        """Take in what another one observed."""
        self.histogram.merge(other.histogram)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of what was observed so far."""
        if not bool((self.histogram.total > 0).any()):
            raise CalibrationError("nothing was observed")
        low, high = usable_range(*self._ends())
        return (low, high) if self.histogram.per_channel else (low[0], high[0])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The histogram."""
        return self.histogram.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what ``state_dict`` was asked of."""
        self.histogram.load_state_dict(state)

    @abstractmethod
    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the range starts and ends, float64 [channels]; zero need not be in it."""

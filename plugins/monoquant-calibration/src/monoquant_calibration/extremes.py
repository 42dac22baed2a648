"""Ranges from the smallest and the largest values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from monoquant_calibration.plugin import MinMaxOptions, MovingAverageOptions
from monoquant_core.errors import CalibrationError, OptionError
from monoquant_core.observed import as_float32, by_channel, checked_state, limits, same_channels
from monoquant_core.stats import usable_range


class MinMax:
    """The range of all values."""

    order_matters = False

    def __init__(self, options: MinMaxOptions) -> None:
        self._per_channel = options.granularity == "channel"
        #: float32 [2, channels], low and high; no channels before something was observed
        self._ends = torch.empty(2, 0)

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        """Take in a batch."""
        if values.numel():
            self._add(_ends(values, axis, self._per_channel))

    def merge(self, other: MinMax) -> None:
        """Take in what another one observed."""
        if other._ends.numel():
            self._add(other._ends)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """From the smallest value to the largest."""
        return _range(self._ends, self._per_channel)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The ends of the range."""
        return {"ends": self._ends.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what ``state_dict`` was asked of."""
        channels = _channels(state, "ends", self._per_channel)
        self._ends = checked_state(state, {"ends": (torch.float32, (2, channels))})["ends"]

    def _add(self, ends: torch.Tensor) -> None:
        if not self._ends.numel():
            self._ends = ends.clone()
            return
        same_channels(self._ends[0], ends[0])
        self._ends = torch.stack([self._ends[0].minimum(ends[0]), self._ends[1].maximum(ends[1])])


class MovingAverage:
    """An exponential moving average of the ranges of batches, which starts with that of the first one.

    The average of batches ``x1 .. xn`` is linear in them, and only ``x1`` weighs more than it would later in a series:
    so an average is appended to another one exactly, if it remembers its first batch and how many there were.
    """

    order_matters = True

    def __init__(self, options: MovingAverageOptions) -> None:
        if not 0 < options.rate <= 1:
            raise OptionError(f"moving-average: rate is above 0 and at most 1, got {options.rate}")
        self._per_channel = options.granularity == "channel"
        self._rate = options.rate
        self._batches = 0
        #: float64 [2, channels]: the ends of the first batch, and the average
        self._first = self._mean = torch.empty(2, 0, dtype=torch.float64)

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        """Take in a batch."""
        if values.numel():
            ends = _ends(values, axis, self._per_channel).double()
            self._append(ends, ends, 1)

    def merge(self, other: MovingAverage) -> None:
        """Take in what another one observed, after what this one has."""
        if other._batches:
            self._append(other._first, other._mean, other._batches)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The average."""
        return _range(self._mean, self._per_channel)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The number of batches, the first one's ends and the average."""
        return {"batches": torch.tensor(self._batches), "first": self._first.clone(), "mean": self._mean.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what ``state_dict`` was asked of."""
        ends = (torch.float64, (2, _channels(state, "mean", self._per_channel)))
        values = checked_state(state, {"batches": (torch.int64, ()), "first": ends, "mean": ends})
        self._batches, self._first, self._mean = int(values["batches"]), values["first"], values["mean"]

    def _append(self, first: torch.Tensor, mean: torch.Tensor, batches: int) -> None:
        if self._batches:
            same_channels(self._mean[0], mean[0])
            # In a series of its own the first batch weighs (1 - rate)^(n - 1), here only rate times that.
            self._mean = mean + (self._mean - first) * (1 - self._rate) ** batches
        else:
            self._first, self._mean = first.clone(), mean.clone()
        self._batches += batches


def _ends(values: torch.Tensor, axis: int, per_channel: bool) -> torch.Tensor:
    """Smallest and largest values, float32 [2, channels].

    :raises CalibrationError: for NaN and infinity.
    """
    rows = by_channel(values, axis) if per_channel else as_float32(values).reshape(1, -1)
    return torch.stack(limits(rows, 1))


def _range(ends: torch.Tensor, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not ends.numel():
        raise CalibrationError("nothing was observed")
    low, high = usable_range(*ends)
    return (low, high) if per_channel else (low[0], high[0])


def _channels(state: Mapping[str, torch.Tensor], name: str, per_channel: bool) -> int:
    """How many channels a state is of: any number if it is per channel, otherwise none yet or one."""
    found = state[name].shape[-1] if name in state and state[name].ndim else 0
    return found if per_channel else min(found, 1)

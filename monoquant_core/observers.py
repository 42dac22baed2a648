"""Everything that calibration keeps of one activation while batches pass by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.histogram import Histogram
from monoquant_core.observed import as_float32, checked_state, limits, same_channels
from monoquant_core.stats import Calibrator, TensorStats

_SPAN = 1 << 18  # values squared at a time
_DEVICES = ("cpu", "cuda")  # others, such as Apple's, lack float64
_QUANTILE = 0.999  # what the largest magnitude is compared with


class Columns:
    """Rows, extremes and sums of squares of every column; of all values together where there is no axis of columns."""

    __slots__ = ("axis", "maximum", "minimum", "rows", "squares")

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.rows = 0
        self.minimum = torch.empty(0)  #: float32 [columns]
        self.maximum = torch.empty(0)
        self.squares = torch.empty(0, dtype=torch.float64)

    def observe(self, values: torch.Tensor) -> None:
        """Take in a batch.

        :raises CalibrationError: for NaN, infinity, and another number of columns; nothing is taken in then.
        """
        values = as_float32(values)
        if self.axis is None:
            values = values.reshape(-1, 1, 1)
        else:
            if not -values.ndim <= self.axis < values.ndim:
                raise CalibrationError(f"values of shape {tuple(values.shape)} have no axis {self.axis} of columns")
            at = self.axis % values.ndim
            values = values.reshape(math.prod(values.shape[:at]), values.shape[at], math.prod(values.shape[at + 1 :]))
        if not values.numel():
            return
        batch = Columns(self.axis)
        batch.minimum, batch.maximum = limits(values, (0, 2))
        batch.rows = values.shape[0] * values.shape[2]
        squares = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        step = max(1, _SPAN // (values.shape[1] * values.shape[2]))
        for start in range(0, len(values), step):
            squares += values[start : start + step].double().square_().sum((0, 2))
        batch.squares = squares.cpu()
        self.merge(batch)

    def merge(self, other: Columns) -> None:
        """Take in what another one observed.

        :raises CalibrationError: for another number of columns.
        """
        if not other.rows:
            return
        if not self.rows:
            self.minimum, self.maximum, self.squares = other.minimum, other.maximum, other.squares
        else:
            same_channels(self.minimum, other.minimum)
            self.minimum = self.minimum.minimum(other.minimum)
            self.maximum = self.maximum.maximum(other.maximum)
            self.squares = self.squares + other.squares
        self.rows += other.rows

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that it knows, as tensors."""
        known = {name: getattr(self, name).clone() for name in ("minimum", "maximum", "squares")}
        return {"rows": torch.tensor(self.rows, dtype=torch.int64), **known}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what ``state_dict`` was asked of.

        :raises CalibrationError: for anything that it does not give.
        """
        columns = state["minimum"].numel() if "minimum" in state else 0
        wanted = {"rows": (torch.int64, ()), "squares": (torch.float64, (columns,))}
        values = checked_state(state, wanted | dict.fromkeys(("minimum", "maximum"), (torch.float32, (columns,))))
        self.rows = int(values["rows"])
        self.minimum, self.maximum, self.squares = values["minimum"], values["maximum"], values["squares"]


class Observer:
    """A calibrator and what its range is judged by. Memory does not grow with the number of batches.

    Batches go to two calibrators, of earlier and of later ones, whose ranges should agree in the end. The earlier ones
    take in the later ones whenever they have become as many.

    :param make: constructs a calibrator; always with the same options.
    :param axis: where the columns are (-1 for linear layers, -3 for images); None if there are none.
    """

    def __init__(self, make: Callable[[], Calibrator], axis: int | None = -1) -> None:
        self._make = make
        self._early, self._late = make(), make()
        self._batches = [0, 0]
        self._columns = Columns(axis)
        self._histogram = None if hasattr(self._early, "histogram") else Histogram()

    def observe(self, values: torch.Tensor) -> None:
        """Take in a batch; one without values is nothing.

        :raises CalibrationError: for NaN or infinity, and for another number of columns than before.
        """
        if not values.numel():
            return
        values = as_float32(values if values.device.type in _DEVICES else values.cpu())
        if self._batches[1] >= self._batches[0]:
            self._early.merge(self._late)
            self._late, self._batches = self._make(), [sum(self._batches), 0]
        later = int(self._batches[0] > 0)
        self._columns.observe(values)
        (self._late if later else self._early).observe(values, -1 if self._columns.axis is None else self._columns.axis)
        if self._histogram is not None:
            self._histogram.observe(values)
        self._batches[later] += 1

    def merge(self, other: Observer) -> None:
        """Take in what another observer of the same activation and options saw; its batches count as the later ones.

        :raises CalibrationError: for another number of columns.
        """
        self._columns.merge(other._columns)
        if any(self._batches):
            self._early.merge(self._late)
            self._late = self._make()
            for part in (other._early, other._late):
                self._late.merge(part)
            self._batches = [sum(self._batches), sum(other._batches)]
        else:
            self._early.merge(other._early)
            self._late.merge(other._late)
            self._batches = list(other._batches)
        if self._histogram is not None and other._histogram is not None:
            self._histogram.merge(other._histogram)

    def stats(self) -> TensorStats:
        """What was learned so far; observing may go on.

        :raises CalibrationError: if nothing was observed.
        """
        columns = self._columns
        if not columns.rows:
            raise CalibrationError("nothing was observed")
        whole = self._make()
        for part in (self._early, self._late):
            whole.merge(part)
        low, high = whole.range()
        histogram = self._histogram or getattr(whole, "histogram", None)
        minimum, maximum, importance = columns.minimum, columns.maximum, None
        if columns.axis is None:
            minimum, maximum = minimum[0], maximum[0]
        else:
            # Squares of what is above 2**64 are beyond float32: such columns are equally important.
            importance = (columns.squares / columns.rows).clamp(max=torch.finfo(torch.float32).max).float()
        moved = self._moved(high.double() - low.double()) if all(self._batches) else None
        clipped = outlier = None
        if histogram is not None:
            outlier = outlier_ratio(histogram)
            clipped = clipped_share(histogram, low, high)
        return TensorStats(columns.rows, minimum, maximum, importance, low, high, clipped, outlier, moved)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that it observed, as tensors: to be saved, and merged by another process."""
        state = {f"{key}.{n}": v for key, part in self._parts() for n, v in part.state_dict().items()}
        return {"batches": torch.tensor(self._batches), **state}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become the observer, of the same options, that ``state_dict`` was asked of.

        :raises CalibrationError: for anything that it does not give.
        """
        own = {name: value for name, value in state.items() if "." not in name}
        self._batches = checked_state(own, {"batches": (torch.int64, (2,))})["batches"].tolist()
        for key, part in self._parts():
            part.load_state_dict({n.removeprefix(f"{key}."): v for n, v in state.items() if n.startswith(f"{key}.")})

    def _parts(self) -> list[tuple[str, Calibrator | Columns | Histogram]]:
        parts: list[tuple[str, Calibrator | Columns | Histogram]] = [("early", self._early), ("late", self._late)]
        parts.append(("columns", self._columns))
        return parts if self._histogram is None else [*parts, ("histogram", self._histogram)]

    def _moved(self, width: torch.Tensor) -> float:
        """Distance of the ranges of the earlier and the later batches, in widths of the whole; a mean over channels."""
        ends = zip(self._early.range(), self._late.range(), strict=True)
        first, second = ((a.double() - b.double()).abs() for a, b in ends)
        return float((torch.maximum(first, second) / width).mean())


def clipped_share(histogram: Histogram, low: torch.Tensor, high: torch.Tensor) -> float | None:
    """Share of all values that a range cuts off; None for ranges of channels that were not counted for themselves.

    Less than half a step of 8 bits outside is no cutting off: rounding moves values as far. A range of a GELU's output
    leaves out a quarter of the values that way, which are all but zero.
    """
    margin = (high.double() - low.double()) / 510
    low, high = low.double() - margin, high.double() + margin
    total = histogram.total
    if low.ndim and len(low) != len(total):
        return None
    return float((histogram.outside(low, high) * total).sum() / total.sum())


def outlier_ratio(histogram: Histogram) -> float:
    """The largest magnitude over the 99.9th percentile of the magnitudes that are not zero; at least 1."""
    bins = histogram.magnitudes()
    counts = bins.counts.sum(0).cumsum(0)
    if not len(counts):
        return 1.0
    largest = torch.maximum(histogram.maximum.max(), -histogram.minimum.min())
    quantile = bins.upper[torch.searchsorted(counts, math.ceil(_QUANTILE * int(counts[-1])))]
    return max(1.0, float(largest / quantile))

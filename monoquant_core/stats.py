"""Statistics of observed activations. ``TensorStats`` holds torch tensors; importing this module imports none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from monoquant_core.errors import CalibrationError

if TYPE_CHECKING:
    from typing import Self

    import torch


@dataclass(frozen=True, slots=True, eq=False)
class TensorStats:
    """What calibration learned of the input of one layer.

    :raises CalibrationError: for statistics that cannot be.
    """

    count: int  #: rows (tokens, pixels) observed
    minimum: torch.Tensor  #: float32, [] or [columns]
    maximum: torch.Tensor  #: float32, the same shape
    importance: torch.Tensor | None = None  #: float32 [columns]: mean squared input of every column
    histogram: torch.Tensor | None = None  #: int64 [bins], equal bins from minimum.min() to maximum.max()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CalibrationError(f"statistics of {self.count} observations: nothing was observed")
        if self.minimum.shape != self.maximum.shape:
            raise CalibrationError(f"minimum {tuple(self.minimum.shape)}, maximum {tuple(self.maximum.shape)}")
        if self.minimum.ndim > 1:
            raise CalibrationError(f"minimum and maximum are numbers or vectors, got {self.minimum.ndim} axes")
        for label in ("minimum", "maximum", "importance"):
            value = getattr(self, label)
            if value is not None and not bool(value.isfinite().all()):
                raise CalibrationError(f"{label} is not finite: the observed activations contain NaN or infinity")
        if bool((self.minimum > self.maximum).any()):
            raise CalibrationError("minimum is above maximum")
        if self.importance is not None and (self.importance.ndim != 1 or bool((self.importance < 0).any())):
            raise CalibrationError("importance is a vector of non-negative numbers")

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of both sets of observations. Histograms survive only when their ranges are equal.

        :raises CalibrationError: when the shapes differ.
        """
        if self.minimum.shape != other.minimum.shape:
            raise CalibrationError(f"cannot merge {tuple(self.minimum.shape)} with {tuple(other.minimum.shape)}")
        count = self.count + other.count
        importance = histogram = None
        if self.importance is not None and other.importance is not None:
            if self.importance.shape != other.importance.shape:
                raise CalibrationError("cannot merge importance of different lengths")
            weighted = self.importance.double() * self.count + other.importance.double() * other.count
            importance = (weighted / count).float()
        if self.histogram is not None and other.histogram is not None:
            same = self.minimum.equal(other.minimum) and self.maximum.equal(other.maximum)
            if same and self.histogram.shape == other.histogram.shape:
                histogram = self.histogram + other.histogram
        low, high = self.minimum.minimum(other.minimum), self.maximum.maximum(other.maximum)
        return TensorStats(count, low, high, importance, histogram)


class Calibrator(Protocol):
    """Turns observed values of one activation into a range."""

    def observe(self, values: torch.Tensor) -> None:
        """Take in a batch of values, of any shape.

        :raises CalibrationError: for NaN or infinity.
        """
        ...

    def merge(self, other: Self) -> None:
        """Take in what another calibrator of the same options observed."""
        ...

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, low <= 0 <= high.

        :raises CalibrationError: if nothing was observed.
        """
        ...

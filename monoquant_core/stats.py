"""Statistics of observed activations. ``TensorStats`` holds torch tensors; importing this module imports none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from monoquant_core.errors import CalibrationError
from monoquant_core.model import TensorSpec

if TYPE_CHECKING:
    from typing import Self

    import torch

NARROWEST = 2.0**-110  #: a narrower range would have a step below float32's smallest normal number


@dataclass(frozen=True, slots=True, eq=False)
class TensorStats:
    """What calibration learned of one activation. Columns are features of a layer's input, or channels of an image.

    :raises CalibrationError: for statistics that cannot be.
    """

    count: int  #: rows (tokens, pixels) observed; where there are no columns, values
    minimum: torch.Tensor  #: float32, [] or [columns]
    maximum: torch.Tensor  #: float32, the same shape
    importance: torch.Tensor | None = None  #: float32 [columns]: mean squared input of every column
    low: torch.Tensor | None = None  #: float32, [] or [columns]: where the calibrated range starts, at most 0
    high: torch.Tensor | None = None  #: float32, the shape of ``low``: where it ends, at least 0 and above ``low``
    clipped: float | None = None  #: share of the values outside of the range by more than half a step of 8 bits
    outlier: float | None = None  #: largest magnitude over the 99.9th percentile of all that are not zero
    moved: float | None = None  #: how far the range of the later batches is from that of the earlier ones, in widths

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CalibrationError(f"statistics of {self.count} observations: nothing was observed")
        if self.minimum.shape != self.maximum.shape:
            raise CalibrationError(f"minimum {tuple(self.minimum.shape)}, maximum {tuple(self.maximum.shape)}")
        for label in ("minimum", "maximum", "importance", "low", "high"):
            value = getattr(self, label)
            if value is None:
                continue
            if value.ndim > 1:
                raise CalibrationError(f"{label} is a number or a vector, got {value.ndim} axes")
            if not bool(value.isfinite().all()):
                raise CalibrationError(f"{label} is not finite: the observed activations contain NaN or infinity")
        if bool((self.minimum > self.maximum).any()):
            raise CalibrationError("minimum is above maximum")
        if self.importance is not None and (self.importance.ndim != 1 or bool((self.importance < 0).any())):
            raise CalibrationError("importance is a vector of non-negative numbers")
        self._check_range()
        for label in ("clipped", "outlier", "moved"):
            number = getattr(self, label)
            if number is not None and not 0 <= number < float("inf"):
                raise CalibrationError(f"{label} is a non-negative number, got {number}")

    def _check_range(self) -> None:
        if self.low is None and self.high is None:
            return
        if self.low is None or self.high is None or self.low.shape != self.high.shape:
            raise CalibrationError("a range has a low and a high end, of the same shape")
        if bool(((self.low > 0) | (self.high < 0) | (self.low >= self.high)).any()):
            raise CalibrationError("a range is not empty and holds zero")

    @property
    def dead(self) -> int:
        """How many columns were zero in every row."""
        return int(((self.minimum == 0) & (self.maximum == 0)).sum())

    @property
    def constant(self) -> int:
        """How many columns had one value, other than zero, in every row."""
        return int(((self.minimum == self.maximum) & (self.minimum != 0)).sum()) if self.count > 1 else 0


class Calibrator(Protocol):
    """Turns observed values of one activation into a range: one of all values, or one for each channel.

    Its memory does not grow with the number of batches. One that keeps a
    :class:`~monoquant_core.histogram.Histogram` of all that it observed shows it as ``histogram``, so that the quality
    of the range can be told without counting a second time.
    """

    #: whether the range depends on the order of batches, as a moving average's does; merging then appends
    order_matters: bool

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        """Take in a batch of values of any shape and dtype; one without values is nothing.

        :param axis: where the channels are, for a calibrator with a range for each.
        :raises CalibrationError: for NaN or infinity, and for another number of channels than before; nothing of the
            batch is taken in then.
        """
        ...

    def merge(self, other: Self) -> None:
        """Take in what another calibrator of the same options observed, as if it had been observed here.

        :raises CalibrationError: for another number of channels.
        """
        ...

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, float32 [] or [channels]; low <= 0 <= high and low < high.

        :raises CalibrationError: if nothing was observed.
        """
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that it observed, as tensors of its own: to be saved, and merged by another process."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become the calibrator, of the same options, that ``state_dict`` was asked of.

        :raises CalibrationError: for anything that it does not give.
        """
        ...


def usable_range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A range as calibrators give it: widened to hold zero, in float32, and 0 to 1 where nothing but zero is in it."""
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    empty = high.double() - low.double() < NARROWEST
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 1.0)


def input_stats(stats: Mapping[str, TensorStats], tensor: str) -> TensorStats | None:
    """Statistics of the input that a weight is multiplied with, or None.

    :param stats: by point, ``"layer1.conv:input"`` for the tensor ``layer1.conv.weight``; or by tensor.
    """
    module = tensor.removesuffix("weight")
    point = module.removesuffix(".") if module == "" or module.endswith(".") else tensor
    found = stats.get(f"{point}:input")
    return stats.get(tensor) if found is None else found


def column_importance(stats: TensorStats, spec: TensorSpec) -> torch.Tensor | None:
    """Importance of every input of a weight, as ``Context.importance`` has it; None where statistics have none.

    Channels of an image are as important at every place of a convolution's kernel; a convolution in groups applies
    the same columns to several channels, whose importance is averaged.

    :raises CalibrationError: when they are of another number of inputs.
    """
    importance, shape = stats.importance, spec.shape
    if importance is None or spec.kind == "conv_transpose" or len(shape) < 2:
        return None
    if spec.kind == "conv" and len(shape) > 2:
        channels = shape[1]
        if len(importance) % channels == 0:
            return importance.view(-1, channels).mean(0).repeat_interleave(math.prod(shape[2:]))
    elif len(importance) == (shape[0] if spec.transposed else shape[-1]):
        return importance
    raise CalibrationError(
        f"{spec.name} {list(shape)}: statistics of {len(importance)} inputs: they are of another model",
        hint="calibrate the model that is quantized",
    )

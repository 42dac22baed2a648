"""Counts of observed values, in bins that do not depend on what else is observed.

A bin is the float32 numbers that share sign, exponent and the first bits of the mantissa. So bins are the same for
every batch, process and order, and to merge is to add integers: the result equals, bit for bit, the histogram of
everything. They are as fine next to 1e-30 as next to 1e30, so that one outlier does not blur all other values, as it
does where bins are equally wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.observed import as_float32, by_channel, checked_state, limits, same_channels

BITS = 8  #: of the mantissa: a bin is at most 0.4 % of its value wide
CHANNEL_BITS = 6  #: with a histogram for every channel, whose memory counts: at most 1.6 %

_OCTAVES = 256  # exponents of float32, of which the last one means infinity and NaN
_SPAN = 1 << 18  # values counted at a time: their codes stay in the cache
_BEYOND = 2.0**128  # where the last bin ends


@dataclass(frozen=True, slots=True)
class Bins:
    """The occupied bins of a histogram, in ascending order. Zero has one of its own, without width."""

    lower: torch.Tensor  #: float64 [bins]; where all values are binned, the first one is the smallest value
    upper: torch.Tensor  #: float64 [bins]; and the last one the largest value
    counts: torch.Tensor  #: int64 [channels, bins]; one channel where one histogram holds all


class Histogram:
    """How often every value was observed: for all values, or for each channel.

    Memory follows the powers of two between the smallest and the largest magnitude, not the number of values: 100 KB as
    activations come and 1 MB at most; for each channel a quarter of it. Numbers below 2**-132 count as zero.
    """

    __slots__ = ("_bits", "counts", "first", "maximum", "minimum", "per_channel", "zeros")

    def __init__(self, per_channel: bool = False) -> None:
        self.per_channel = per_channel
        self._bits = CHANNEL_BITS if per_channel else BITS
        channels = 0 if per_channel else 1
        self.first = 0  #: exponent field of the first octave
        #: int64 [channels, 2, octaves, 2^bits]: positive and negative values, by magnitude
        self.counts = torch.zeros(channels, 2, 0, 1 << self._bits, dtype=torch.int64)
        self.zeros = torch.zeros(channels, dtype=torch.int64)
        self.minimum = torch.full((channels,), torch.inf)  #: float32 [channels]
        self.maximum = torch.full((channels,), -torch.inf)

    @property
    def total(self) -> torch.Tensor:
        """How many values were observed, int64 [channels]."""
        return self.counts.sum((1, 2, 3)) + self.zeros

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        """Count values of any shape and dtype, for each channel those along ``axis``.

        :raises CalibrationError: for NaN and infinity, and for another number of channels; nothing is counted then.
        """
        if not values.numel():
            return
        rows = by_channel(values, axis) if self.per_channel else as_float32(values).reshape(1, -1)
        low, high = limits(rows, 1)
        batch = Histogram(self.per_channel)
        batch.minimum, batch.maximum = low, high
        counted = _count_channels(rows, self._bits) if self.per_channel else _count(rows[0], self._bits)
        batch.first, batch.counts, batch.zeros = counted
        self.merge(batch)

    def merge(self, other: Histogram) -> None:
        """Take in everything that another histogram counted.

        :raises CalibrationError: for another number of channels.
        """
        if self.per_channel != other.per_channel:
            raise CalibrationError("cannot merge a histogram of all values with one for each channel")
        if not len(other.zeros):
            return
        if not len(self.zeros):
            self.load_state_dict(other.state_dict())
            return
        same_channels(self.zeros, other.zeros)
        self._widen(other)
        start = other.first - self.first
        self.counts[:, :, start : start + other.counts.shape[2]] += other.counts
        self.zeros = self.zeros + other.zeros
        self.minimum = self.minimum.minimum(other.minimum)
        self.maximum = self.maximum.maximum(other.maximum)

    def bins(self) -> Bins:
        """The occupied bins."""
        below, above = self._edges()
        zero = torch.zeros(1, dtype=torch.float64)
        positive, negative = self.counts.flatten(2).unbind(1)
        lower = torch.cat([-above.flip(0), zero, below])
        upper = torch.cat([-below.flip(0), zero, above])
        counts = torch.cat([negative.flip(1), self.zeros.unsqueeze(1), positive], 1)
        occupied = counts.sum(0) > 0
        lower, upper, counts = lower[occupied], upper[occupied], counts[:, occupied]
        if len(lower):
            upper.clamp_(max=self.maximum.max().double())
            lower = torch.minimum(lower.clamp_(min=self.minimum.min().double()), upper)
        return Bins(lower, upper, counts)

    def magnitudes(self) -> Bins:
        """The occupied bins of the magnitudes that are not zero, whole ones."""
        below, above = self._edges()
        counts = self.counts.sum(1).flatten(1)
        occupied = counts.sum(0) > 0
        return Bins(below[occupied], above[occupied], counts[:, occupied])

    def quantile(self, q: float) -> torch.Tensor:
        """What ``numpy.quantile`` gives of all values, within the width of a bin; exact for 0 and 1.

        :param q: 0 to 1.
        :return: float64 [channels].
        :raises CalibrationError: if nothing was observed.
        """
        total = self.total
        if not len(total) or not bool((total > 0).all()):
            raise CalibrationError("nothing was observed")
        bins = self.bins()
        rank = q * (total - 1).double()
        below = rank.floor()
        first, second = (self._order_statistic(bins, k.long()) for k in (below, torch.minimum(below + 1, total - 1)))
        return first + (second - first) * (rank - below)

    def outside(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Share of the values below ``low`` or above ``high``, float64 [channels]; exact where they are ends of bins.

        :param low: a number, or one for every channel.
        """
        bins = self.bins()
        # A channel's own ends, where it does not fill its outermost bins.
        lower = torch.maximum(bins.lower, self.minimum.double().unsqueeze(1))
        upper = torch.minimum(bins.upper, self.maximum.double().unsqueeze(1))
        width, low, high = upper - lower, low.double().reshape(-1, 1), high.double().reshape(-1, 1)
        under = torch.where(width > 0, (low - lower) / width, (lower < low).double()).clamp_(0, 1)
        over = torch.where(width > 0, (upper - high) / width, (upper > high).double()).clamp_(0, 1)
        return (bins.counts * (under + over)).sum(1) / self.total.clamp(min=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that it knows, as tensors."""
        first = torch.tensor(self.first, dtype=torch.int64)
        names = ("counts", "zeros", "minimum", "maximum")
        return {"first": first} | {name: getattr(self, name).clone() for name in names}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become the histogram that ``state_dict`` was asked of.

        :raises CalibrationError: for anything that it does not give.
        """
        channels = len(self.zeros) if not self.per_channel else state["zeros"].numel() if "zeros" in state else 0
        octaves = state["counts"].shape[2] if "counts" in state and state["counts"].ndim == 4 else 0
        wanted = {"first": (torch.int64, ()), "counts": (torch.int64, (channels, 2, octaves, 1 << self._bits))}
        wanted |= {"zeros": (torch.int64, (channels,))}
        wanted |= dict.fromkeys(("minimum", "maximum"), (torch.float32, (channels,)))
        values = checked_state(state, wanted)
        first = int(values["first"])
        if not 0 <= first <= first + octaves < _OCTAVES:
            raise CalibrationError(f"state of a histogram: octaves {first} to {first + octaves}")
        self.first = first
        self.counts, self.zeros = values["counts"], values["zeros"]
        self.minimum, self.maximum = values["minimum"], values["maximum"]

    def _edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the bins of positive values start and end, float64."""
        codes = torch.arange((self.counts.shape[2] << self._bits) + 1) + (self.first << self._bits)
        edges = (codes << 23 - self._bits).to(torch.int32).view(torch.float32).double().nan_to_num_(posinf=_BEYOND)
        return edges[:-1], edges[1:]

    def _order_statistic(self, bins: Bins, k: torch.Tensor) -> torch.Tensor:
        """The k-th smallest value of every channel, from 0: where it lies if values lie evenly in their bin."""
        ends = bins.counts.cumsum(1)
        index = torch.searchsorted(ends, k.unsqueeze(1), right=True)
        inside = bins.counts.gather(1, index)
        part = (k.unsqueeze(1) - (ends.gather(1, index) - inside) + 0.5) / inside
        lower, upper = bins.lower[index], bins.upper[index]
        value = (lower + (upper - lower) * part).squeeze(1)
        value = torch.where(k == 0, self.minimum.double(), value)
        value = torch.where(k == self.total - 1, self.maximum.double(), value)
        return value.clamp(self.minimum.double(), self.maximum.double())

    def _widen(self, other: Histogram) -> None:
        """Make room for the octaves of another histogram."""
        if not other.counts.shape[2]:
            return
        if not self.counts.shape[2]:
            self.first, self.counts = other.first, torch.zeros_like(other.counts)
            return
        start = min(self.first, other.first)
        stop = max(self.first + self.counts.shape[2], other.first + other.counts.shape[2])
        before, after = self.first - start, stop - self.first - self.counts.shape[2]
        if before or after:
            self.counts = torch.nn.functional.pad(self.counts, (0, 0, before, after))
            self.first = start


def _count(values: torch.Tensor, bits: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """First octave, counts ``[1, 2, octaves, 2^bits]`` and zeros ``[1]`` of a float32 vector."""
    table = torch.zeros(2 << 8 + bits, dtype=torch.int64)
    span = _SPAN if values.device.type == "cpu" else values.numel()
    for start in range(0, values.numel(), span):
        codes = _codes(values[start : start + span], bits)
        table += torch.bincount(codes, minlength=len(table)).cpu()
    counts = table.view(1, 2, _OCTAVES, 1 << bits)
    zeros = counts[:, :, 0, 0].sum(1)
    counts[:, :, 0, 0] = 0
    occupied = counts.sum((0, 1, 3)).nonzero().flatten().tolist() or [0, -1]
    return occupied[0], counts[:, :, occupied[0] : occupied[-1] + 1].clone(), zeros


def _count_channels(rows: torch.Tensor, bits: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The same for every row of float32 ``[channels, values]``."""
    codes = _codes(rows, bits)
    magnitudes = codes & (1 << 8 + bits) - 1
    zero = magnitudes == 0
    first, last = (int(end) >> bits for end in (magnitudes.masked_fill(zero, 1 << 30).amin(), magnitudes.amax()))
    octaves = max(0, last + 1 - first)
    # All bins of a channel, one after another, and its zeros.
    size = octaves << bits
    places = (magnitudes - (first << bits)).add_(codes >> 8 + bits, alpha=size).masked_fill_(zero, 2 * size)
    places += torch.arange(len(rows), device=rows.device, dtype=torch.int32).unsqueeze(1) * (2 * size + 1)
    table = torch.bincount(places.flatten(), minlength=len(rows) * (2 * size + 1)).cpu().view(len(rows), -1)
    return first if octaves else 0, table[:, :-1].reshape(len(rows), 2, octaves, 1 << bits), table[:, -1].clone()


def _codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The leading bits of float32 numbers: sign, exponent and ``bits`` of the mantissa, as int32."""
    return torch.bitwise_right_shift(values.view(torch.int32), 23 - bits).bitwise_and_((2 << 8 + bits) - 1)

"""Histograms: numpy's quantiles of all the data, and merging that gives the same bits whatever the order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.errors import CalibrationError
from monoquant_core.histogram import BITS, CHANNEL_BITS, Histogram

QUANTILES = (0.0, 1e-4, 0.01, 0.5, 0.9, 0.999, 0.9999, 1.0)

AWKWARD = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1 + 2.0**-8, 1 - 2.0**-24, 1e-30, -1e-30, 1e-44, 1e30, -3.4e38, 3.4e38]
numbers = st.one_of(
    st.sampled_from(AWKWARD), st.floats(-1e4, 1e4, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
batches = st.lists(st.lists(numbers, min_size=0, max_size=12), min_size=1, max_size=5)


def histogram(*values: torch.Tensor, per_channel: bool = False) -> Histogram:
    made = Histogram(per_channel)
    for batch in values:
        made.observe(batch)
    return made


def same(a: Histogram, b: Histogram) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def activations(seed: int = 0, columns: int = 24) -> torch.Tensor:
    """Columns of very different spread, with zeros and a few outliers."""
    values = torch.randn(500, columns, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, columns)
    values[::50] *= 40
    return torch.where(values.abs() < 1e-3, 0.0, values)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("q", QUANTILES)
def test_quantiles_are_numpys_within_a_bin(q: float, per_channel: bool) -> None:
    values = activations()
    found = histogram(values, per_channel=per_channel).quantile(q).numpy()
    wanted = np.quantile(values.double().numpy(), q, axis=0 if per_channel else None)
    if q in (0, 1):
        assert np.array_equal(found, np.atleast_1d(wanted))
    else:
        width = 2.0 ** -(CHANNEL_BITS if per_channel else BITS)
        np.testing.assert_allclose(found, np.atleast_1d(wanted), rtol=width, atol=0)


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from(QUANTILES))
def test_quantiles_of_anything(values: list[list[float]], q: float) -> None:
    flat = torch.tensor([v for batch in values for v in batch])
    if not flat.numel():
        return
    order = flat.double().sort().values
    rank = q * (len(order) - 1)
    ends = order[math.floor(rank)], order[math.ceil(rank)]
    found = histogram(flat).quantile(q).item()
    slack = 2.0**-BITS * max(abs(e.item()) for e in ends) + 2.0**-132
    assert ends[0] - slack <= found <= ends[1] + slack


@settings(deadline=None, max_examples=60)
@given(batches, st.booleans(), st.randoms(use_true_random=False))
def test_order_and_grouping_change_no_bit(values: list[list[float]], per_channel: bool, random: object) -> None:
    """Rows of three channels, one by one, together, shuffled, and as a tree of merges."""
    rows = [torch.tensor(v[: len(v) // 3 * 3]).view(-1, 3) for v in values]
    whole = histogram(torch.cat(rows), per_channel=per_channel)
    assert same(histogram(*rows, per_channel=per_channel), whole)
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = [histogram(r, per_channel=per_channel) for r in shuffled]
    while len(parts) > 1:
        for left, right in zip(parts[::2], parts[1::2], strict=False):
            left.merge(right)
        parts = parts[::2]
    assert same(parts[0], whole)


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_value_is_in_a_bin_that_holds_it(per_channel: bool) -> None:
    values = torch.cat([activations(), torch.tensor(AWKWARD).unsqueeze(1).expand(-1, 24)])
    made = histogram(values, per_channel=per_channel)
    bins = made.bins()
    assert int(bins.counts.sum()) == values.numel()
    assert made.total.tolist() == ([len(values)] * 24 if per_channel else [values.numel()])
    assert bool((bins.lower[1:] >= bins.upper[:-1]).all()), "bins overlap"
    assert (bins.lower[0].item(), bins.upper[-1].item()) == (values.min().item(), values.max().item())
    flat = values.double().flatten()
    flat = torch.where(flat.abs() < 2.0**-132, 0.0, flat)
    for lower, upper, count in zip(bins.lower, bins.upper, bins.counts.sum(0), strict=True):
        # Bins are open on the side that is away from zero.
        closed = lower <= 0 if lower == upper == 0 else None
        inside = (
            (flat == 0)
            if closed
            else (flat.abs() >= min(abs(lower), abs(upper))) & (flat.sign() == (lower + upper).sign())
        )
        inside &= (flat.abs() < max(abs(lower), abs(upper))) | (flat == bins.lower[0]) | (flat == bins.upper[-1])
        if not closed:
            assert int((inside & (flat >= lower) & (flat <= upper)).sum()) == int(count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_any_dtype_is_counted_at_its_value(dtype: torch.dtype) -> None:
    values = (activations() / 4).to(dtype)
    assert same(histogram(values), histogram(values.float()))


def test_channels_lie_on_the_axis_that_is_given() -> None:
    values = activations().view(5, 100, 24)
    rows = histogram(values, per_channel=True)
    moved = Histogram(per_channel=True)
    moved.observe(values.movedim(-1, 1), axis=1)
    assert same(rows, moved)
    again = Histogram(per_channel=True)
    again.observe(values.movedim(-1, 1).contiguous(), axis=-2)
    assert same(rows, again)


@pytest.mark.parametrize("per_channel", [False, True])
def test_share_outside_is_that_of_the_values(per_channel: bool) -> None:
    values = activations()
    made = histogram(values, per_channel=per_channel)
    axis = 0 if per_channel else None
    low, high = (torch.from_numpy(np.atleast_1d(np.quantile(values.numpy(), q, axis=axis))) for q in (0.02, 0.97))
    outside = (values.double() < low) | (values.double() > high)
    wanted = outside.double().mean(0) if per_channel else outside.double().mean().view(1)
    torch.testing.assert_close(made.outside(low, high), wanted, atol=0.004, rtol=0)
    assert made.outside(values.min(), values.max()).sum() == 0
    assert made.outside(torch.tensor(1e9), torch.tensor(2e9)).tolist() == [1.0] * len(made.total)
    assert histogram(torch.zeros(4), torch.ones(4)).outside(torch.tensor(0.0), torch.tensor(0.5)).tolist() == [0.5]


def test_memory_follows_magnitudes_and_not_batches() -> None:
    made = histogram(activations(0))
    before = made.counts.nbytes
    for _ in range(20):
        made.observe(activations(0))
    assert made.counts.nbytes == before < 120_000
    everything = torch.tensor(list(itertools.product([1.0, -1.0], np.logspace(-44, 38, 500)))).prod(1)
    made.observe(everything)
    assert made.counts.nbytes <= 1 << 20
    channels = Histogram(per_channel=True)
    channels.observe(everything.unsqueeze(1).expand(-1, 4))
    assert channels.counts.nbytes <= 4 << 18


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_refuses_what_is_not_finite_and_keeps_what_it_has(bad: float) -> None:
    for per_channel in (False, True):
        made = histogram(activations(), per_channel=per_channel)
        before = made.state_dict()
        with pytest.raises(CalibrationError, match="NaN or infinity was observed"):
            made.observe(torch.full((2, 24), bad, dtype=torch.float64))
        assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_refuses_other_channels_and_what_has_no_range() -> None:
    channels = histogram(activations(), per_channel=True)
    with pytest.raises(CalibrationError, match="23 channels, where 24 were observed before"):
        channels.observe(torch.ones(2, 23))
    with pytest.raises(CalibrationError, match="cannot merge a histogram of all values with one for each channel"):
        channels.merge(histogram(activations()))
    with pytest.raises(CalibrationError, match="no axis -3 of channels"):
        channels.observe(torch.ones(2, 24), axis=-3)
    with pytest.raises(CalibrationError, match="complex64 values have no range"):
        Histogram().observe(torch.ones(2, dtype=torch.complex64))
    for empty in (Histogram(), Histogram(per_channel=True)):
        with pytest.raises(CalibrationError, match="nothing was observed"):
            empty.quantile(0.5)


def test_state_is_checked() -> None:
    good = histogram(activations(), per_channel=True).state_dict()
    again = Histogram(per_channel=True)
    again.load_state_dict(good)
    assert same(again, histogram(activations(), per_channel=True))
    far = good | {"first": torch.tensor(250)}
    for bad, message in (
        ({k: v for k, v in good.items() if k != "zeros"}, "a state of counts, first, maximum, minimum, where"),
        (good | {"counts": good["counts"][:, :1]}, "a state whose counts is"),
        (good | {"minimum": good["minimum"][:3]}, "a state whose minimum is"),
        (far, "octaves 250 to"),
    ):
        with pytest.raises(CalibrationError, match=message):
            Histogram(per_channel=True).load_state_dict(bad)
    with pytest.raises(CalibrationError):
        Histogram().load_state_dict(good)

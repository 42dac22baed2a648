"""Ranges against torch's observers, numpy's percentiles, and brute force over the raw data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_calibration.extremes import MinMax, MovingAverage
from monoquant_calibration.mse import Grid, Mse, squared_errors
from monoquant_calibration.percentile import Percentile
from monoquant_calibration.plugin import (
    EntropyOptions,
    MinMaxOptions,
    MovingAverageOptions,
    MseOptions,
    PercentileOptions,
)
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from monoquant_core.errors import CalibrationError, OptionError
from monoquant_core.histogram import BITS, CHANNEL_BITS
from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.stats import Calibrator

ROWS, COLUMNS = 4000, 8


def random(kind: str, seed: int = 0) -> torch.Tensor:
    """Activations of some kind, float32 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    other = torch.randn(ROWS, COLUMNS, generator=generator)
    return {
        "normal": lambda: normal,
        "relu": normal.relu,
        "gelu": lambda: torch.nn.functional.gelu(normal * 2),
        "negative": lambda: -normal.abs() - 0.5,
        "lognormal": (normal * 1.5).exp,
        "heavy tails": lambda: normal / other.abs().clamp(min=0.02),
        "laplace": lambda: normal * (-torch.rand(ROWS, COLUMNS, generator=generator).clamp(min=1e-9).log()).sqrt(),
        "uniform": lambda: torch.rand(ROWS, COLUMNS, generator=generator) - 0.3,
        "two clusters": lambda: torch.where(other > 0, normal * 0.1 + 5, normal * 0.1 - 1),
        "columns of other spread": lambda: normal * torch.logspace(-2, 2, COLUMNS),
        "an outlier": lambda: normal.index_fill(0, torch.tensor([500]), 60.0),
    }[kind]()


KINDS = [
    *("normal", "relu", "gelu", "negative", "lognormal", "heavy tails", "laplace", "uniform", "two clusters"),
    *("columns of other spread", "an outlier"),
]


def ends(calibrator: Calibrator, *batches: torch.Tensor, axis: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    for batch in batches:
        calibrator.observe(batch, axis)
    return calibrator.range()


def holding_zero(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return low.clamp(max=0), high.clamp(min=0)


# --- torch's observers ---


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_torchs(kind: str) -> None:
    batches = random(kind).split(700)
    observer, channels = MinMaxObserver(), PerChannelMinMaxObserver(ch_axis=1)
    for batch in batches:
        observer(batch)
        channels(batch)
    assert ends(MinMax(MinMaxOptions()), *batches) == holding_zero(observer.min_val, observer.max_val)
    found = ends(MinMax(MinMaxOptions("channel")), *batches)
    for mine, torchs in zip(found, holding_zero(channels.min_val, channels.max_val), strict=True):
        assert torch.equal(mine, torchs)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "lognormal", "columns of other spread"])
def test_moving_average_is_torchs(kind: str, rate: float) -> None:
    """Torch averages in float32, we in float64."""
    batches = random(kind).split(300)
    observer = MovingAverageMinMaxObserver(averaging_constant=rate)
    channels = MovingAveragePerChannelMinMaxObserver(averaging_constant=rate, ch_axis=1)
    for batch in batches:
        observer(batch)
        channels(batch)
    found = ends(MovingAverage(MovingAverageOptions(rate=rate)), *batches)
    wanted = holding_zero(observer.min_val, observer.max_val)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=3e-6, atol=0)
    found = ends(MovingAverage(MovingAverageOptions("channel", rate)), *batches)
    wanted = holding_zero(channels.min_val, channels.max_val)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=3e-6, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.25, 0.9, 1.0]),
    st.integers(0, 8),
)
def test_moving_averages_append(batches: list[list[float]], rate: float, cut: int) -> None:
    """Against the recurrence, in exact order."""
    low, high = min(batches[0]), max(batches[0])
    for batch in batches[1:]:
        low, high = low + rate * (min(batch) - low), high + rate * (max(batch) - high)
    first, second = (MovingAverage(MovingAverageOptions(rate=rate)) for _ in range(2))
    for i, batch in enumerate(batches):
        (first if i < cut else second).observe(torch.tensor(batch))
    first.merge(second)
    found = first.state_dict()["mean"].flatten().tolist()
    assert found == pytest.approx([low, high], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["normal", "laplace", "gelu", "lognormal", "an outlier"])
def test_mse_is_no_worse_than_torchs_histogram_observer(kind: str) -> None:
    """Torch's searches for the least error on a histogram too."""
    values = random(kind)
    observer = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    observer(values)
    scale, zero_point = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), 0, 255)
    low, high = ends(Mse(MseOptions()), values)
    mine = mean_squared_error(values, float(low), float(high))
    assert mine <= 1.005 * (theirs.double() - values.double()).square().mean().item()


# --- percentiles ---


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_numpys_within_a_bin(kind: str, percentile: float) -> None:
    values = random(kind)
    data = values.double().numpy()
    for granularity, axis, bits in (("tensor", None, BITS), ("channel", 0, CHANNEL_BITS)):
        low, high = ends(Percentile(PercentileOptions(granularity, percentile)), *values.split(900))
        for mine, q, side in ((low, 100 - percentile, np.minimum), (high, percentile, np.maximum)):
            wanted = side(np.percentile(data, q, axis=axis), 0)
            np.testing.assert_allclose(mine.numpy(), wanted, rtol=2.0**-bits if percentile < 100 else 1e-7, atol=0)


@pytest.mark.parametrize("kind", ["relu", "lognormal"])
def test_percentile_of_one_sided_values_starts_at_zero(kind: str) -> None:
    assert ends(Percentile(PercentileOptions()), random(kind))[0] == 0
    assert ends(Percentile(PercentileOptions()), -random(kind))[1] == 0


def test_an_outlier_does_not_move_the_percentile() -> None:
    values = random("normal")
    plain = ends(Percentile(PercentileOptions(percentile=99.9)), values)
    for outlier in (1e4, 1e30, -1e30):
        far = ends(Percentile(PercentileOptions(percentile=99.9)), values, torch.tensor([outlier]))
        torch.testing.assert_close(torch.stack(far), torch.stack(plain), rtol=0.02, atol=0)


# --- least squared error ---


def mean_squared_error(values: torch.Tensor, low: float, high: float, bits: int = 8, symmetric: bool = False) -> float:
    """Of quantizing the raw data as ONNX says: uint with a rounded zero point, or int without and without -2^(b-1)."""
    data = values.double().numpy()
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scale, smallest = max(-low, high) / largest, -largest
    else:
        scale = (high - low) / (2**bits - 1)
        smallest = -round(-low / scale)
        largest = smallest + 2**bits - 1
    return float(np.mean((np.clip(np.rint(data / scale), smallest, largest) * scale - data) ** 2))


def brute_force(values: torch.Tensor, bits: int, symmetric: bool) -> float:
    """Least error over many ranges, coarse and then fine."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    parts = np.concatenate([np.geomspace(0.01, 0.5, 12), np.linspace(0.55, 1, 10)])
    if symmetric:
        top = max(-low, high)
        pairs = [(-top * p, top * p) for p in np.concatenate([parts, np.linspace(0.01, 1, 200)])]
    else:
        pairs = [(low * a, high * b) for a in (parts if low else [1.0]) for b in (parts if high else [1.0])]
    best = min((mean_squared_error(values, a, b, bits, symmetric), a, b) for a, b in pairs)
    near = np.linspace(0.9, 1.1, 9)
    return min(
        mean_squared_error(
            values, max(low, best[1] * a) if not symmetric else -best[2] * b, min(high, best[2] * b), bits, symmetric
        )
        for a in (near if low and not symmetric else [1.0])
        for b in near
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_least_of_brute_force_on_the_raw_data(kind: str, bits: int, symmetric: bool) -> None:
    values = random(kind)[:1000]
    low, high = ends(Mse(MseOptions(bits=bits, symmetric=symmetric)), values)
    if symmetric:
        assert low == -high
    found = mean_squared_error(values, float(low), float(high), bits, symmetric)
    assert found <= 1.02 * brute_force(values, bits, symmetric)
    plain = ends(MinMax(MinMaxOptions()), values)
    assert found <= 1.01 * mean_squared_error(values, float(plain[0]), float(plain[1]), bits, symmetric)


def test_images_of_bytes_stay_exact() -> None:
    """Values of 256 levels: clipping would save an error that they do not have."""
    pixels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255
    low, high = ends(Mse(MseOptions()), pixels)
    assert (low, high) == (0, 1)


@pytest.mark.parametrize("grid", [Grid(8, False), Grid(8, True), Grid(3, False), Grid(2, True)])
def test_squared_errors_are_the_integrals(grid: Grid) -> None:
    """Against the mean over many points of every bin."""
    lower = torch.tensor([-5.0, -1.0, -0.01, 0.5, 2.0, 7.0, 9.0]).double()
    upper = torch.tensor([-2.0, -0.1, -0.001, 0.5, 6.9, 9.0, 300.0]).double()
    counts = torch.tensor([3.0, 10, 7, 4, 2, 1, 1]).double()
    low, high = torch.tensor([-5.0, -1.0, 0.0]).double(), torch.tensor([300.0, 7.0, 9.0]).double()
    if grid.symmetric:
        low = -high
    found = squared_errors(lower, upper, counts, grid, low, high)
    points = lower.unsqueeze(1) + (upper - lower).unsqueeze(1) * (torch.arange(200_000).double() + 0.5) / 200_000
    for i in range(3):
        errors = torch.stack(
            [
                torch.tensor(mean_squared_error(p, float(low[i]), float(high[i]), grid.bits, grid.symmetric))
                for p in points
            ]
        )
        assert float(found[i]) == pytest.approx(float((errors * counts).sum()), rel=1e-6)


# --- anything ---

NAMES = ["minmax", "moving-average", "percentile", "entropy", "mse"]

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 255.0, 1e-30, -1e-30, 1e-44, 2.0**-132, 3.4e38, -3.4e38]),
    st.floats(-1e3, 1e3, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["tensor", "channel"]),
    st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=3),
)
def test_ranges_of_anything_hold_zero_and_are_no_wider_than_needed(
    name: str, granularity: str, batches: list[list[float]]
) -> None:
    declaration = load_registry().calibrator(name)
    calibrator = declaration.load()(build(declaration.options, {"granularity": granularity}, owner=name))
    low, high = ends(calibrator, *(torch.tensor(b).unsqueeze(1) for b in batches))
    flat = [v for b in batches for v in b]
    assert (low.shape, high.shape) == (((1,),) * 2 if granularity == "channel" else ((),) * 2)
    assert float(low) <= 0 <= float(high)
    assert float(low) < float(high) < math.inf
    if float(high) != 1 or low:
        # Not beyond what was observed, but for the rounding of a float64 to float32.
        slack = 1 + 2.0**-23
        assert min(0, *flat, 0) * slack <= float(low)
        assert float(high) <= max(0, *flat, 0) * slack


# --- options ---


def test_options_are_checked() -> None:
    registry = load_registry()
    for name, values, message in (
        ("percentile", {"percentile": 100.1}, "percentile is 50 to 100, got 100.1"),
        ("percentile", {"percentile": math.nan}, "percentile is at least 50"),
        ("percentile", {"percentile": 49}, "percentile is at least 50, got 49"),
        ("moving-average", {"rate": 0.0}, "rate is above 0 and at most 1, got 0.0"),
        ("moving-average", {"rate": 1.5}, "rate is above 0 and at most 1, got 1.5"),
        ("entropy", {"bits": 9}, "bits are 2 to 8, got 9"),
        ("mse", {"bits": 1}, "bits is at least 2, got 1"),
        ("mse", {"bits": 17}, "bits are 2 to 16, got 17"),
        ("minmax", {"granularity": "group"}, "granularity is one of tensor, channel, got 'group'"),
    ):
        declaration = registry.calibrator(name)
        with pytest.raises(OptionError) as caught:
            declaration.load()(build(declaration.options, values, owner=name))
        assert message in str(caught.value)


def test_channels_must_stay_as_many() -> None:
    for name in ("minmax", "moving-average", "percentile", "entropy", "mse"):
        declaration = load_registry().calibrator(name)
        calibrator = declaration.load()(build(declaration.options, {"granularity": "channel"}, owner=name))
        calibrator.observe(torch.ones(2, 3, 5), axis=1)
        assert calibrator.range()[0].shape == (3,)
        with pytest.raises(CalibrationError, match="5 channels, where 3 were observed before"):
            calibrator.observe(torch.ones(2, 3, 5))
        with pytest.raises(CalibrationError, match="no axis 3 of channels"):
            calibrator.observe(torch.ones(2, 3, 5), axis=3)


def test_entropy_and_mse_of_channels_are_those_of_each() -> None:
    """Bins are coarser for channels; one channel is near what it would be alone."""
    values = random("columns of other spread")
    for name in ("entropy", "mse"):
        declaration = load_registry().calibrator(name)
        options: EntropyOptions = build(declaration.options, {"granularity": "channel"}, owner=name)
        low, high = ends(declaration.load()(options), values)
        for i in range(COLUMNS):
            alone = ends(declaration.load()(options), values[:, i : i + 1])
            assert torch.equal(torch.stack([low[i], high[i]]), torch.cat(alone))

"""Entropy against its textbook form in float64, and against onnxruntime's on the same data."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from monoquant_calibration.entropy import Entropy, divergences
from monoquant_calibration.plugin import EntropyOptions

SIZE = 1 << 17

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(SIZE, generator=GENERATOR)
DATA = {
    "normal": NORMAL,
    "half normal": NORMAL.abs(),
    "laplace": NORMAL.sign() * -torch.rand(SIZE, generator=GENERATOR).clamp(min=1e-7).log(),
    "lognormal": torch.randn(SIZE, generator=GENERATOR).exp(),
    "heavy tails": NORMAL / torch.randn(SIZE, generator=GENERATOR).abs().clamp(min=0.1),
    "uniform": torch.rand(SIZE, generator=GENERATOR) * 2 - 1,
    "skewed": torch.nn.functional.gelu(NORMAL * 2),
}


def found(values: torch.Tensor, bits: int = 8) -> float:
    calibrator = Entropy(EntropyOptions(bits=bits))
    calibrator.observe(values)
    low, high = calibrator.range()
    return max(-float(low), float(high))


def textbook(values: torch.Tensor, bins: int = 2048, levels: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and their divergences, as the TensorRT slides describe them: equal bins, every threshold one of their
    ends, values beyond it in the last bin of P, each level's values spread over the bins that P occupies."""
    magnitudes = values.double().abs().numpy()
    counts, edges = np.histogram(magnitudes, bins=bins, range=(0, magnitudes.max()))
    results = []
    for i in range(levels, bins + 1):
        inside = counts[:i].astype(np.float64)
        p = inside.copy()
        p[-1] += counts[i:].sum()
        level = np.arange(i) * levels // i
        occupied = inside > 0
        values_of = np.bincount(level, inside, levels)
        bins_of = np.bincount(level, occupied, levels)
        q = np.where(occupied, values_of[level] / np.maximum(bins_of[level], 1), 0)
        if p[-1] > 0 and q[-1] == 0:
            results.append(np.inf)
            continue
        p, q = p / p.sum(), q / q.sum()
        kept = p > 0
        results.append(float((p[kept] * np.log(p[kept] / q[kept])).sum()))
    return edges[levels:], np.array(results)


@pytest.mark.parametrize("kind", DATA)
def test_the_textbook_agrees(kind: str) -> None:
    """Its curve is flat and rough around the best threshold, so its own value near ours is compared, too."""
    thresholds, curve = textbook(DATA[kind])
    best = thresholds[curve.argmin()]
    mine = found(DATA[kind])
    at = np.abs(thresholds - mine) <= 0.015 * mine
    assert curve[at].min() <= 1.01 * curve.min(), f"{mine}, the textbook says {best}"
    assert mine == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("levels", [8, 128])
def test_divergences_are_the_sums_over_bins(levels: int) -> None:
    """With bins so narrow that each lies in one level, the running sums are the textbook's sums."""
    edges = torch.linspace(0, 4, 2049).double()
    values = NORMAL.abs().double()
    counts = torch.histc(values[values < 4], 2048, 0, 4).double()
    occupied = counts > 0
    lower, upper, kept = edges[:-1][occupied], edges[1:][occupied], counts[occupied]
    tried = torch.tensor([i for i in range(len(kept)) if upper[i] >= 1 and round(float(upper[i]) * 512) % levels == 0])
    mine = divergences(lower, upper, kept, levels, tried)
    assert len(tried) > 5
    for k, i in enumerate(tried.tolist()):
        bins = round(float(upper[i]) * 512)
        inside = counts[:bins].numpy()
        p = inside.copy()
        p[-1] += counts[bins:].sum().item()
        shape = (levels, bins // levels)
        taken = inside.reshape(shape) > 0
        spread = np.where(
            taken, inside.reshape(shape).sum(1, keepdims=True) / np.maximum(taken.sum(1, keepdims=True), 1), 0
        )
        p, q = p / p.sum(), spread.ravel() / spread.sum()
        here = p > 0
        assert float(mine[k]) == pytest.approx(float((p[here] * np.log(p[here] / q[here])).sum()), rel=1e-9)


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
def test_onnxruntime_agrees_where_both_are_symmetric(kind: str) -> None:
    """Its levels are those of both signs, and one-sided values use only half of its bins, so those differ."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    collector = calibrate.HistogramCollector("entropy", False, 1024, 128, 99.99, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": [DATA[kind].numpy()]})
        low, high, *_ = collector.compute_collection_result()["x"]
    assert found(DATA[kind], bits=7) == pytest.approx(max(-float(low), float(high)), rel=0.15)


def test_an_outlier_is_clipped_that_blinds_equal_bins() -> None:
    plain = found(NORMAL)
    for outlier in (1e3, 1e30):
        values = torch.cat([NORMAL, torch.tensor([outlier])])
        assert found(values) == pytest.approx(plain, rel=0.1)
        thresholds, curve = textbook(values)
        assert thresholds[curve.argmin()] > 100, "all other values are in one of its bins, or a few"


def test_zeros_change_nothing() -> None:
    for zeros in (1, 10 * SIZE):
        assert found(torch.cat([NORMAL, torch.zeros(zeros)])) == found(NORMAL)


def test_fewer_bits_clip_more() -> None:
    ranges = [found(DATA["laplace"], bits) for bits in (2, 4, 6, 8)]
    assert ranges == sorted(ranges)
    assert ranges[0] < 0.7 * ranges[-1]


def test_ends_that_were_not_reached_are_not_given() -> None:
    calibrator = Entropy(EntropyOptions())
    calibrator.observe(DATA["skewed"])
    low, high = calibrator.range()
    assert low == DATA["skewed"].min()
    assert 3 < high < DATA["skewed"].max()

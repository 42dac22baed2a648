"""What every calibrator must do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.stats import Calibrator
from monoquant_core.testing.checks import assert_satisfies
from monoquant_core.testing.samples import generator


def _batches() -> list[torch.Tensor]:
    """Activations as they come: other shapes, other spreads, one outlier."""
    values = [
        torch.randn(shape, generator=generator(i)) for i, shape in enumerate([(8, 16), (3, 5, 16), (40,), (1, 1)])
    ]
    values[1][0, 0, 0] = 30.0
    return [values[0], values[1], values[2] * 3 - 1, values[3]]


class CalibratorConformance:
    """Subclass it and give a fixture ``make``: a function that constructs a fresh calibrator of fixed options."""

    #: False for a calibrator whose range depends on the order of batches, such as a moving average
    order_independent = True
    #: relative difference that order and merging may make, for calibrators that keep a histogram
    tolerance = 0.0

    @pytest.fixture
    def make(self) -> Callable[[], Calibrator]:
        """Constructs the calibrator."""
        raise NotImplementedError("give your class a fixture 'make'")

    @pytest.fixture
    def make_widest(self) -> Callable[[], Calibrator] | None:
        """Constructs it so that nothing is cut off (percentile 100), where it can be told so."""
        return None

    def test_satisfies_the_protocol(self, make: Callable[[], Calibrator]) -> None:
        """Every method is there."""
        assert_satisfies(make(), Calibrator)

    def test_range_holds_zero(self, make: Callable[[], Calibrator]) -> None:
        """Low <= 0 <= high and low < high, whatever was seen."""
        seen = [*_batches(), torch.full((4,), 5.0), torch.full((4,), -5.0), torch.zeros(3), torch.full((2,), 1e-30)]
        for batch in seen:
            low, high = _range(make, [batch])
            assert low <= 0 <= high, f"{low} and {high} do not hold zero"
            assert low < high, f"an empty range for {batch.flatten()[:4].tolist()}"
            assert math.isfinite(low), f"low is {low}"
            assert math.isfinite(high), f"high is {high}"

    def test_nothing_observed(self, make: Callable[[], Calibrator]) -> None:
        """A range of nothing raises CalibrationError; an empty batch is nothing."""
        with pytest.raises(CalibrationError):
            make().range()
        calibrator = make()
        calibrator.observe(torch.empty(0, 16))
        with pytest.raises(CalibrationError):
            calibrator.range()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, make: Callable[[], Calibrator], bad: float) -> None:
        """NaN and infinity raise CalibrationError when they are observed."""
        batch = torch.randn(4, 4)
        batch[2, 1] = bad
        with pytest.raises(CalibrationError):
            make().observe(batch)

    def test_leaves_its_input_alone(self, make: Callable[[], Calibrator]) -> None:
        """Activations are still needed by the model."""
        batch = _batches()[0]
        before = batch.clone()
        make().observe(batch)
        assert torch.equal(batch, before)

    def test_dtypes(self, make: Callable[[], Calibrator]) -> None:
        """Half-precision activations are observed at their values."""
        for dtype in (torch.float16, torch.bfloat16):
            batch = _batches()[0].to(dtype)
            assert _range(make, [batch]) == _range(make, [batch.float()])

    def test_order_does_not_matter(self, make: Callable[[], Calibrator]) -> None:
        """Any order of batches gives the same range, where the class declares so."""
        if not self.order_independent:
            pytest.skip("declares order_independent = False")
        expected = _range(make, _batches())
        for order in itertools.permutations(_batches()):
            self._assert_close(_range(make, list(order)), expected)

    def test_merging_is_observing_everything(self, make: Callable[[], Calibrator]) -> None:
        """Two calibrators that saw half each, merged, know what one that saw everything knows."""
        batches = _batches()
        expected = _range(make, batches)
        for cut in range(len(batches) + 1):
            first, second = make(), make()
            for batch in batches[:cut]:
                first.observe(batch)
            for batch in batches[cut:]:
                second.observe(batch)
            first.merge(second)
            low, high = first.range()
            self._assert_close((float(low), float(high)), expected)

    def test_widest_is_the_minimum_and_the_maximum(self, make_widest: Callable[[], Calibrator] | None) -> None:
        """With nothing cut off, the range is that of the values."""
        if make_widest is None:
            pytest.skip("has no fixture make_widest")
        batches = _batches()
        low = min(0.0, *(float(b.min()) for b in batches))
        high = max(0.0, *(float(b.max()) for b in batches))
        self._assert_close(_range(make_widest, batches), (low, high))

    def _assert_close(self, found: tuple[float, float], expected: tuple[float, float]) -> None:
        for label, a, b in zip(("low", "high"), found, expected, strict=True):
            assert math.isclose(a, b, rel_tol=self.tolerance, abs_tol=0), f"{label}: {a}, not {b}"


def _range(make: Callable[[], Calibrator], batches: list[torch.Tensor]) -> tuple[float, float]:
    calibrator = make()
    for batch in batches:
        calibrator.observe(batch)
    low, high = calibrator.range()
    return float(low), float(high)

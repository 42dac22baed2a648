"""What every calibrator must do."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.stats import Calibrator
from monoquant_core.testing.checks import assert_satisfies
from monoquant_core.testing.samples import generator

Make = Callable[[], Calibrator]

_CHANNELS = 16


def _batches() -> list[torch.Tensor]:
    """Activations as they come: other shapes, other spreads, one outlier, one batch of what a ReLU gives."""
    shapes = [(8, _CHANNELS), (3, 5, _CHANNELS), (40, _CHANNELS), (1, _CHANNELS), (6, _CHANNELS)]
    values = [torch.randn(shape, generator=generator(i)) for i, shape in enumerate(shapes)]
    values[1][0, 0, 0] = 30.0
    return [values[0], values[1], values[2] * 3 - 1, values[3], values[4].relu()]


def _orders(batches: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Every batch in every place, forwards and backwards."""
    turned = [batches[i:] + batches[:i] for i in range(len(batches))]
    return turned + [order[::-1] for order in turned]


#: batches whose range is easily empty, infinite or without zero
_EXTREMES = {
    "zeros": torch.zeros(3, _CHANNELS),
    "positive constant": torch.full((4, _CHANNELS), 5.0),
    "negative constant": torch.full((4, _CHANNELS), -5.0),
    "tiny": torch.full((2, _CHANNELS), 1e-30),
    "subnormal": torch.full((2, _CHANNELS), -1e-44),
    "huge": torch.full((2, _CHANNELS), 1e30),
    "largest of both signs": torch.tensor([[-3.4e38], [3.4e38]]).expand(2, _CHANNELS),
    "one outlier": torch.cat([torch.randn(64, _CHANNELS, generator=generator(7)), torch.full((1, _CHANNELS), 1e30)]),
    "powers of two": torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]).unsqueeze(1).expand(7, _CHANNELS),
    "negative zero": torch.full((2, _CHANNELS), -0.0),
    "transposed": torch.randn(_CHANNELS, 5, generator=generator(8)).t(),
}


class CalibratorConformance:
    """Subclass it and give a fixture ``make``: a function that constructs a fresh calibrator of fixed options."""

    #: relative difference that order and merging may make, for calibrators that do not count exactly
    tolerance = 0.0

    @pytest.fixture
    def make(self) -> Make:
        """Constructs the calibrator."""
        raise NotImplementedError("give your class a fixture 'make'")

    @pytest.fixture
    def make_widest(self) -> Make | None:
        """Constructs it so that nothing is cut off (percentile 100), where it can be told so."""
        return None

    def test_satisfies_the_protocol(self, make: Make) -> None:
        """Every method is there, and ``order_matters`` is a boolean."""
        assert_satisfies(make(), Calibrator)
        assert isinstance(make().order_matters, bool), "order_matters is True or False"

    def test_range_holds_zero(self, make: Make) -> None:
        """Low <= 0 <= high and low < high in finite float32, whatever was seen, for one range or each channel's."""
        for name, batch in [*_EXTREMES.items(), *((f"batch {i}", b) for i, b in enumerate(_batches()))]:
            low, high = _observed(make, [batch]).range()
            assert low.dtype == high.dtype == torch.float32, f"{name}: {low.dtype} and {high.dtype}"
            assert low.shape == high.shape, f"{name}: {tuple(low.shape)} and {tuple(high.shape)}"
            assert low.shape in ((), (_CHANNELS,)), f"{name}: a range of shape {tuple(low.shape)}"
            assert bool((low <= 0).all()), f"{name}: {low} is above zero"
            assert bool((high >= 0).all()), f"{name}: {high} is below zero"
            assert bool((low < high).all()), f"{name}: an empty range"
            assert bool((low.isfinite() & high.isfinite()).all()), f"{name}: {low} to {high}"

    def test_nothing_observed(self, make: Make) -> None:
        """A range of nothing raises CalibrationError; an empty batch is nothing."""
        with pytest.raises(CalibrationError):
            make().range()
        calibrator = make()
        calibrator.observe(torch.empty(0, _CHANNELS))
        with pytest.raises(CalibrationError):
            calibrator.range()
        assert _range(make, [torch.empty(0, _CHANNELS), *_batches()]) == _range(make, _batches())

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, make: Make, bad: float) -> None:
        """NaN and infinity raise CalibrationError when they are observed, and nothing of their batch is taken in."""
        batch = torch.randn(4, _CHANNELS, generator=generator(9)) * 100
        batch[2, 1] = bad
        with pytest.raises(CalibrationError):
            make().observe(batch)
        calibrator = _observed(make, _batches())
        with pytest.raises(CalibrationError):
            calibrator.observe(batch)
        assert _ends(calibrator) == _range(make, _batches()), "a refused batch changed the range"

    def test_leaves_its_input_alone(self, make: Make) -> None:
        """Activations are still needed by the model."""
        batch = _batches()[0]
        before = batch.clone()
        make().observe(batch)
        assert torch.equal(batch, before)

    def test_dtypes(self, make: Make) -> None:
        """Half-precision and float64 activations are observed at their values."""
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            batch = _batches()[0].to(dtype)
            assert _range(make, [batch]) == _range(make, [batch.float()]), f"{dtype}"

    def test_any_shape(self, make: Make) -> None:
        """One range takes values of any shape; ranges of channels are those of the axis, of one number."""
        batch = _batches()[1]
        per_channel = bool(_observed(make, [batch]).range()[0].ndim)
        if not per_channel:
            for shape in ((-1,), (15, _CHANNELS), (_CHANNELS, 15)):
                assert _range(make, [batch.reshape(shape)]) == _range(make, [batch])
            make().observe(torch.tensor(1.0))
            return
        calibrator = make()
        calibrator.observe(batch.movedim(-1, 1), axis=1)
        assert _ends(calibrator) == _range(make, [batch])
        with pytest.raises(CalibrationError):
            calibrator.observe(torch.ones(2, _CHANNELS + 1))

    def test_order_does_not_matter(self, make: Make) -> None:
        """Any order and grouping of batches gives the same range, unless ``order_matters`` is declared."""
        batches = _batches()
        expected = _range(make, batches)
        if make().order_matters:
            changed = [_range(make, order) != expected for order in _orders(batches)]
            assert any(changed), "declares that the order matters, and it never does"
            return
        for order in _orders(batches):
            self._assert_close(_range(make, order), expected)
        self._assert_close(_range(make, [torch.cat([b.reshape(-1, _CHANNELS) for b in batches])]), expected)

    def test_merging_is_observing_everything(self, make: Make) -> None:
        """Calibrators that saw a part each, merged, know what one that saw everything knows, in any grouping."""
        batches = _batches()
        expected = _range(make, batches)
        ordered = make().order_matters
        # What depends on the order weighs batches in floating point.
        rounding = 2.0**-22 if ordered else 0.0
        for cut in range(len(batches) + 1):
            first, second = _observed(make, batches[:cut]), _observed(make, batches[cut:])
            first.merge(second)
            self._assert_close(_ends(first), expected, rounding)
        singles = [_observed(make, [b]) for b in batches]
        while len(singles) > 1:  # as a tree
            for left, right in zip(singles[::2], singles[1::2], strict=False):
                left.merge(right)
            singles = singles[::2]
        self._assert_close(_ends(singles[0]), expected, rounding)
        if not ordered:
            for order in _orders(batches):
                merged = make()
                for batch in order:
                    merged.merge(_observed(make, [batch]))
                self._assert_close(_ends(merged), expected)

    def test_merging_leaves_the_other_alone(self, make: Make) -> None:
        """What was merged is not shared: both may go on observing."""
        batches = _batches()
        first, second = make(), _observed(make, batches[:1])
        first.merge(second)
        first.observe(batches[2] * 50)
        assert _ends(second) == _range(make, batches[:1])

    def test_state(self, make: Make) -> None:
        """``state_dict`` holds tensors of its own, from which a fresh calibrator goes on; pickling keeps it too."""
        batches = _batches()
        calibrator = _observed(make, batches[:3])
        state = calibrator.state_dict()
        for name, value in state.items():
            assert isinstance(name, str), f"{name!r} is no name"
            assert isinstance(value, torch.Tensor), f"{name} is no tensor: {value!r}"
        kept = {name: value.clone() for name, value in state.items()}
        loaded, pickled = make(), pickle.loads(pickle.dumps(calibrator))
        loaded.load_state_dict(state)
        for other in (loaded, pickled):
            assert _ends(other) == _range(make, batches[:3])
            for batch in batches[3:]:
                other.observe(batch * 50)
        assert all(torch.equal(state[n], kept[n]) for n in kept), "a state shares memory with its calibrator"
        assert _ends(calibrator) == _range(make, batches[:3])
        expected = _range(make, batches[:3] + [b * 50 for b in batches[3:]])
        assert _ends(loaded) == expected
        assert _ends(pickled) == expected
        untouched = make()
        untouched.load_state_dict(make().state_dict())
        with pytest.raises(CalibrationError):
            untouched.range()

    def test_refuses_a_damaged_state(self, make: Make) -> None:
        """A state without one of its tensors, or with one of another dtype, raises CalibrationError."""
        state = _observed(make, _batches()).state_dict()
        assert state, "a state without tensors"
        for name, value in state.items():
            other = value.bool() if value.dtype != torch.bool else value.float()
            for damaged in ({k: v for k, v in state.items() if k != name}, state | {name: other}):
                with pytest.raises(CalibrationError):
                    make().load_state_dict(damaged)

    def test_memory_is_constant(self, make: Make) -> None:
        """Many batches of the same spread take no more memory than a few."""
        calibrator = make()
        sizes = []
        for n in (5, 65):
            for i in range(n):
                calibrator.observe(_batches()[i % 5])
            sizes.append((_nbytes(calibrator.state_dict().values()), len(pickle.dumps(calibrator))))
        assert sizes[0][0] == sizes[1][0], f"{sizes[0][0]} bytes after 5 batches, {sizes[1][0]} after 70"
        assert sizes[1][1] - sizes[0][1] < 64, "it keeps something of every batch"

    def test_widest_is_the_minimum_and_the_maximum(self, make_widest: Make | None) -> None:
        """With nothing cut off, the range is that of the values."""
        if make_widest is None:
            pytest.skip("has no fixture make_widest")
        values = torch.cat([b.reshape(-1, _CHANNELS) for b in _batches()])
        low, high = _observed(make_widest, _batches()).range()
        if not low.ndim:
            values = values.reshape(-1, 1)
        expected = values.amin(0).clamp(max=0).tolist() + values.amax(0).clamp(min=0).tolist()
        self._assert_close(low.view(-1).tolist() + high.view(-1).tolist(), expected)

    def _assert_close(self, found: Sequence[float], expected: Sequence[float], rounding: float = 0.0) -> None:
        for a, b in zip(found, expected, strict=True):
            assert math.isclose(a, b, rel_tol=max(self.tolerance, rounding), abs_tol=0), f"{a}, not {b}"


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _observed(make: Make, batches: Sequence[torch.Tensor]) -> Calibrator:
    calibrator = make()
    for batch in batches:
        calibrator.observe(batch)
    return calibrator


def _ends(calibrator: Calibrator) -> list[float]:
    low, high = calibrator.range()
    return [*low.reshape(-1).tolist(), *high.reshape(-1).tolist()]


def _range(make: Make, batches: Sequence[torch.Tensor]) -> list[float]:
    return _ends(_observed(make, batches))

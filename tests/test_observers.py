"""Observers: columns against torch, ranges that move, outliers, and merging across processes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from monoquant_core.errors import CalibrationError
from monoquant_core.histogram import Histogram
from monoquant_core.observers import Observer, clipped_share, outlier_ratio
from monoquant_core.stats import Calibrator, TensorStats, usable_range


class Ends:
    """A calibrator of smallest and largest values."""

    order_matters = False

    def __init__(self, per_channel: bool = False) -> None:
        self.counted = Histogram(per_channel)

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        self.counted.observe(values, axis)

    def merge(self, other: Ends) -> None:
        self.counted.merge(other.counted)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.counted.quantile(1.0)
        low, high = usable_range(self.counted.minimum, self.counted.maximum)
        return (low, high) if self.counted.per_channel else (low[0], high[0])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.counted.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.counted.load_state_dict(state)


class Shows(Ends):
    """The same, whose histogram may be used."""

    @property
    def histogram(self) -> Histogram:
        return self.counted


def channels() -> Ends:
    return Shows(per_channel=True)


MAKERS = [Ends, Shows, channels]


def batches(n: int = 5, columns: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    spread = torch.linspace(0, 3, columns)
    return [torch.randn(4 + i, 3, columns, generator=generator) * spread for i in range(n)]


def observed(make: Callable[[], Calibrator], values: list[torch.Tensor], axis: int | None = -1) -> Observer:
    observer = Observer(make, axis)
    for batch in values:
        observer.observe(batch)
    return observer


def same(a: TensorStats, b: TensorStats) -> None:
    for name in TensorStats.__dataclass_fields__:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0 if name != "importance" else 1e-6, atol=0)
        elif name != "moved":
            assert one == other, name


@pytest.mark.parametrize("make", MAKERS)
def test_columns_are_torchs(make: Callable[[], Ends]) -> None:
    values = torch.cat([b.flatten(0, 1) for b in batches()])
    stats = observed(make, batches()).stats()
    assert stats.count == len(values)
    assert torch.equal(stats.minimum, values.amin(0))
    assert torch.equal(stats.maximum, values.amax(0))
    torch.testing.assert_close(stats.importance, values.double().square().mean(0).float(), rtol=1e-6, atol=0)
    assert (stats.dead, stats.constant, stats.clipped) == (1, 0, 0.0)
    assert stats.low is not None
    assert stats.low.shape == ((8,) if make is channels else ())


@pytest.mark.parametrize(("shape", "axis", "count"), [((2, 6, 5, 7), -3, 70), ((6, 5, 7), -3, 35), ((9, 6), -1, 9)])
def test_columns_of_images_and_of_rows(shape: tuple[int, ...], axis: int, count: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stats = observed(channels, [values, values * 2], axis).stats()
    rest = [a for a in range(len(shape)) if a != axis % len(shape)]
    assert stats.count == 2 * count
    assert torch.equal(stats.maximum, values.amax(rest).mul(2).maximum(values.amax(rest)))
    wanted = values.double().square().mean(rest) * 2.5
    torch.testing.assert_close(stats.importance, wanted.float(), rtol=1e-6, atol=0)
    assert stats.high is not None
    assert torch.equal(stats.high, stats.maximum.clamp(min=0))


def test_values_without_columns_have_ends_and_no_importance() -> None:
    stats = observed(Ends, [torch.ones(3, 4), torch.full((7,), -2.0), torch.tensor(5.0)], None).stats()
    assert (stats.count, stats.minimum.item(), stats.maximum.item()) == (20, -2.0, 5.0)
    assert stats.importance is None


def test_importance_beyond_float32_is_its_largest_number() -> None:
    stats = observed(Ends, [torch.tensor([[1e30, 1e-30, 3.0]])]).stats()
    assert stats.importance is not None
    assert stats.importance.tolist() == [torch.finfo(torch.float32).max, 0.0, 9.0]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_merging_is_observing_everything(make: Callable[[], Ends], cut: int) -> None:
    whole, (first, second) = observed(make, batches()), (observed(make, b) for b in (batches()[:cut], batches()[cut:]))
    first.merge(second)
    same(first.stats(), whole.stats())
    first.observe(batches(2)[0])
    whole.observe(batches(2)[0])
    same(first.stats(), whole.stats())


def test_processes_merge_through_files(tmp_path: Path) -> None:
    """Each shard is observed in a process of its own."""
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_observers import Shows, batches, observed
from safetensors.torch import save_file
for part in range(2):
    save_file(observed(Shows, batches()[part::2]).state_dict(), Path(sys.argv[2]) / f"{part}.safetensors")
"""
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True)
    merged = Observer(Shows)
    for part in range(2):
        observer = Observer(Shows)
        observer.load_state_dict(load_file(tmp_path / f"{part}.safetensors"))
        merged.merge(observer)
    same(merged.stats(), observed(Shows, batches()).stats())


@pytest.mark.parametrize("make", MAKERS)
def test_a_saved_observer_goes_on(make: Callable[[], Ends], tmp_path: Path) -> None:
    observer = observed(make, batches()[:3])
    save_file(observer.state_dict(), tmp_path / "state.safetensors")
    again = Observer(make)
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for batch in batches()[3:]:
        again.observe(batch)
        observer.observe(batch)
    same(again.stats(), observer.stats())
    assert again.stats().moved == observer.stats().moved
    state = observer.state_dict()
    for name in ("batches", "columns.rows", "early.counts"):
        with pytest.raises(CalibrationError):
            Observer(make).load_state_dict({k: v for k, v in state.items() if k != name})


def test_moved_compares_the_later_batches_with_the_earlier_ones() -> None:
    steady = [torch.tensor([[-1.0, 3.0]])] * 4
    assert observed(Ends, steady).stats().moved == 0
    assert observed(Ends, [*steady[:2], *(b * 2 for b in steady[:2])]).stats().moved == 3 / 8
    assert observed(Ends, [*(b * 2 for b in steady[:2]), *steady[:2]]).stats().moved == 3 / 8
    assert observed(Ends, steady[:1]).stats().moved is None, "there is nothing to compare with"
    # Of 5 batches, 4 are the earlier ones: the fifth began when there were as many later ones.
    assert observed(Ends, [*steady, steady[0] * 2]).stats().moved == 3 / 8
    shards = observed(Ends, steady[:2])
    shards.merge(observed(Ends, [b * 2 for b in steady[:3]]))
    assert shards.stats().moved == 3 / 8
    collected = Observer(Ends)
    collected.merge(observed(Ends, [*steady[:2], *(b * 2 for b in steady[:2])]))
    assert collected.stats().moved == 3 / 8, "one shard is what it was"


def test_an_outlier_is_told_by_the_magnitudes_that_are_not_zero() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for zeros in (0, 10_000_000):
        made = Histogram()
        made.observe(values)
        made.observe(torch.zeros(zeros))
        wanted = values.abs().max().item() / np.quantile(values.abs().numpy(), 0.999)
        assert outlier_ratio(made) == pytest.approx(wanted, rel=0.01)
        made.observe(torch.tensor([-1e6]))
        assert outlier_ratio(made) == pytest.approx(1e6 / np.quantile(values.abs().numpy(), 0.999), rel=0.01)
    for constant in (0.0, 5.0):
        made = Histogram()
        made.observe(torch.full((10,), constant))
        assert outlier_ratio(made) == 1.0


def test_clipped_share_of_channels() -> None:
    made = Histogram(per_channel=True)
    made.observe(torch.tensor([[1.0, 1.0], [2.0, 8.0]]))
    assert clipped_share(made, torch.zeros(2), torch.tensor([1.5, 8.0])) == 0.25
    assert clipped_share(made, torch.tensor(0.0), torch.tensor(1.5)) == 0.5
    assert clipped_share(Histogram(), torch.zeros(2), torch.ones(2)) is None


@pytest.mark.parametrize("bad", [torch.tensor([[math.nan, 1.0]]), torch.ones(3, 3), torch.tensor(1.0)])
def test_refuses_a_batch_and_goes_on(bad: torch.Tensor) -> None:
    for make in MAKERS:
        observer = observed(make, [torch.ones(2, 2), torch.zeros(2, 2)])
        with pytest.raises(CalibrationError):
            observer.observe(bad)
        same(observer.stats(), observed(make, [torch.ones(2, 2), torch.zeros(2, 2)]).stats())
    with pytest.raises(CalibrationError, match="nothing was observed"):
        observed(Ends, [torch.empty(0, 2)]).stats()

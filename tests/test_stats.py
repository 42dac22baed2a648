"""Statistics: what cannot be, and merging against observing everything at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monoquant_core.errors import CalibrationError
from monoquant_core.stats import TensorStats

ZERO, ONE = torch.zeros(()), torch.ones(())

REFUSALS = {
    "nothing observed": (lambda: TensorStats(0, ZERO, ONE), "statistics of 0 observations: nothing was observed"),
    "negative count": (lambda: TensorStats(-1, ZERO, ONE), "nothing was observed"),
    "shapes": (lambda: TensorStats(1, torch.zeros(3), torch.ones(4)), "minimum (3,), maximum (4,)"),
    "matrices": (lambda: TensorStats(1, torch.zeros(2, 2), torch.ones(2, 2)), "numbers or vectors, got 2 axes"),
    "NaN minimum": (lambda: TensorStats(1, ZERO * math.nan, ONE), "minimum is not finite"),
    "infinite maximum": (lambda: TensorStats(1, ZERO, ONE * math.inf), "maximum is not finite"),
    "NaN importance": (lambda: TensorStats(1, ZERO, ONE, torch.tensor([math.nan])), "importance is not finite"),
    "backwards": (
        lambda: TensorStats(1, torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])),
        "minimum is above maximum",
    ),
    "negative importance": (
        lambda: TensorStats(1, ZERO, ONE, torch.tensor([-1.0])),
        "a vector of non-negative numbers",
    ),
    "scalar importance": (lambda: TensorStats(1, ZERO, ONE, ONE), "a vector of non-negative numbers"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    build, message = REFUSALS[case]
    with pytest.raises(CalibrationError) as caught:
        build()
    assert message in str(caught.value)


def observe(batch: torch.Tensor) -> TensorStats:
    histogram = torch.histc(batch, 16, -4, 4).to(torch.int64)
    low, high = batch.amin(0), batch.amax(0)
    return TensorStats(len(batch), low, high, batch.double().square().mean(0).float(), histogram)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99))
def test_merging_shards_is_observing_everything(sizes: list[int], seed: int) -> None:
    batches = [torch.randn(n, 6, generator=torch.Generator().manual_seed(seed + n)) for n in sizes]
    merged = observe(batches[0])
    for batch in batches[1:]:
        merged = merged.merge(observe(batch))
    whole = observe(torch.cat(batches))
    assert merged.count == whole.count
    assert torch.equal(merged.minimum, whole.minimum)
    assert torch.equal(merged.maximum, whole.maximum)
    assert merged.importance is not None
    assert whole.importance is not None
    torch.testing.assert_close(merged.importance, whole.importance, rtol=1e-6, atol=0)


def test_merge_weights_by_count() -> None:
    a = TensorStats(3, ZERO, ONE, torch.tensor([4.0]))
    b = TensorStats(1, -ONE, ZERO, torch.tensor([8.0]))
    for merged in (a.merge(b), b.merge(a)):
        assert merged.count == 4
        assert merged.importance is not None
        assert merged.importance.tolist() == [5.0]
        assert merged.minimum.item() == -1.0
        assert merged.maximum.item() == 1.0


def test_merge_keeps_what_both_have() -> None:
    bins = torch.tensor([1, 2])
    full = TensorStats(1, ZERO, ONE, torch.tensor([1.0]), bins)
    assert full.merge(TensorStats(1, ZERO, ONE)).importance is None
    both = full.merge(full)
    assert both.histogram is not None
    assert both.histogram.tolist() == [2, 4]
    assert full.merge(TensorStats(1, ZERO, 2 * ONE, histogram=bins)).histogram is None
    assert full.merge(TensorStats(1, ZERO, ONE, histogram=torch.tensor([1, 2, 3]))).histogram is None


def test_merge_refuses_other_shapes() -> None:
    with pytest.raises(CalibrationError, match=r"cannot merge \(\) with \(3,\)"):
        TensorStats(1, ZERO, ONE).merge(TensorStats(1, torch.zeros(3), torch.ones(3)))
    a = TensorStats(1, ZERO, ONE, torch.ones(2))
    with pytest.raises(CalibrationError, match="importance of different lengths"):
        a.merge(TensorStats(1, ZERO, ONE, torch.ones(3)))

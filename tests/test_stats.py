"""Statistics: what cannot be, and what is said of columns and ranges."""

from __future__ import annotations

import math

import pytest
import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.stats import TensorStats, input_stats, usable_range

ZERO, ONE = torch.zeros(()), torch.ones(())

REFUSALS = {
    "nothing observed": (lambda: TensorStats(0, ZERO, ONE), "statistics of 0 observations: nothing was observed"),
    "negative count": (lambda: TensorStats(-1, ZERO, ONE), "nothing was observed"),
    "shapes": (lambda: TensorStats(1, torch.zeros(3), torch.ones(4)), "minimum (3,), maximum (4,)"),
    "matrices": (lambda: TensorStats(1, torch.zeros(2, 2), torch.ones(2, 2)), "a number or a vector, got 2 axes"),
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
    "half a range": (lambda: TensorStats(1, ZERO, ONE, low=ZERO), "a low and a high end"),
    "another half": (lambda: TensorStats(1, ZERO, ONE, low=ZERO, high=torch.ones(2)), "of the same shape"),
    "without zero": (lambda: TensorStats(1, ZERO, ONE, low=ONE, high=2 * ONE), "is not empty and holds zero"),
    "an empty range": (lambda: TensorStats(1, ZERO, ONE, low=ZERO, high=ZERO), "is not empty and holds zero"),
    "an infinite range": (lambda: TensorStats(1, ZERO, ONE, low=-ONE / 0, high=ONE), "low is not finite"),
    "a negative share": (lambda: TensorStats(1, ZERO, ONE, clipped=-0.1), "clipped is a non-negative number, got -0.1"),
    "no ratio": (lambda: TensorStats(1, ZERO, ONE, outlier=math.nan), "outlier is a non-negative number, got nan"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    build, message = REFUSALS[case]
    with pytest.raises(CalibrationError) as caught:
        build()
    assert message in str(caught.value)


def test_columns_that_say_nothing_are_counted() -> None:
    low, high = torch.tensor([0.0, 0.0, 2.0, -1.0, -1.0]), torch.tensor([0.0, 1.0, 2.0, -1.0, 0.0])
    stats = TensorStats(9, low, high)
    assert (stats.dead, stats.constant) == (1, 2)
    assert TensorStats(1, low, high).constant == 0, "one row cannot vary"
    assert (TensorStats(9, ZERO, ZERO).dead, TensorStats(9, ZERO, ONE).dead) == (1, 0)


@pytest.mark.parametrize(
    ("low", "high", "usable"),
    [
        ((-1.0), 2.0, (-1.0, 2.0)),
        (1.0, 2.0, (0.0, 2.0)),
        (-2.0, -1.0, (-2.0, 0.0)),
        (0.0, 0.0, (0.0, 1.0)),
        (1e-40, 1e-40, (0.0, 1.0)),
        (-1e-30, 0.0, (-1e-30, 0.0)),
        (-3e38, 3e38, (-3e38, 3e38)),
    ],
)
def test_usable_ranges_hold_zero_and_more(low: float, high: float, usable: tuple[float, float]) -> None:
    for shape in ((), (2,)):
        found = usable_range(torch.full(shape, low).double(), torch.full(shape, high).double())
        assert [t.dtype for t in found] == [torch.float32] * 2
        for end, wanted in zip(found, usable, strict=True):
            assert torch.equal(end, torch.full(shape, wanted))
        TensorStats(1, ZERO, ONE, low=found[0], high=found[1])


def test_input_stats_are_found_by_module_and_by_tensor() -> None:
    conv, root, projection, named = (TensorStats(n, ZERO, ONE) for n in (1, 2, 3, 4))
    stats = {"layer1.conv:input": conv, ":input": root, "attn.in_proj_weight:input": projection, "head.weight": named}
    assert input_stats(stats, "layer1.conv.weight") is conv
    assert input_stats(stats, "weight") is root
    assert input_stats(stats, "attn.in_proj_weight") is projection
    assert input_stats(stats, "head.weight") is named
    assert input_stats(stats, "layer2.conv.weight") is None
    assert input_stats({"head.weight": named, "head:input": conv}, "head.weight") is conv, "the point is what is meant"

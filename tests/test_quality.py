"""What is said of calibration data: each warning with its number, and silence where nothing is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from monoquant_core.quality import Finding, judge
from monoquant_core.stats import TensorStats

LOW, HIGH = torch.tensor(-1.0), torch.tensor(3.0)
COLUMNS = (torch.tensor([-1.0, -0.5, -0.2, 0.0]), torch.tensor([3.0, 2.0, 0.5, 1.0]))
GOOD = TensorStats(1000, *COLUMNS, torch.ones(4), LOW, HIGH, clipped=0.0002, outlier=3.0, moved=0.05)


def found(stats: TensorStats = GOOD, **about: object) -> list[Finding]:
    given: dict[str, object] = {"samples": 256, "duplicates": 0, "unreached": [], "variety": 0.9, **about}
    return judge({"conv:input": stats, "fc:input": GOOD}, **given)  # type: ignore[arg-type]


def changed(**fields: object) -> TensorStats:
    return dataclasses.replace(GOOD, **fields)  # type: ignore[arg-type]


def test_good_data_is_not_spoken_of() -> None:
    assert found() == []
    assert found(samples=100) == []
    assert found(variety=None) == []


ZERO = torch.zeros(4)
CASES: dict[str, tuple[list[Finding], str, str]] = {
    "few": (found(samples=4), "4 samples: ", "give at least 100"),
    "one": (found(samples=1), "1 sample: ", "--samples"),
    "duplicates": (found(duplicates=3), "3 of 256 samples equal another one", "give different ones"),
    "alike": (found(variety=0.07), "7% of its answers differ", "give real data"),
    "unreached": (found(unreached=["head:input", "aux:input"]), "no batch reached head:input, aux:input", "keep them"),
    "clipped": (found(changed(clipped=0.021)), "clipped at conv:input (2.1%)", "wider range"),
    "outlier": (found(changed(outlier=40.0)), "at conv:input (40x the 99.9th percentile)", "look for broken samples"),
    "constant": (
        found(changed(minimum=torch.tensor([0.0, 0.0, 0.0, -1.0]), maximum=torch.tensor([0.0, 0.0, 2.0, 3.0]))),
        "",
        "",
    ),
    "dead": (found(changed(minimum=ZERO, maximum=ZERO)), "one value in all rows at conv:input (100%)", "more diverse"),
    "moved": (found(changed(moved=0.3)), "still move at conv:input (0.30 of their width)", "give more samples"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_warning_has_its_number_and_says_what_to_do(case: str) -> None:
    findings, number, advice = CASES[case]
    if not number:  # half of the columns are nothing to speak of
        assert findings == []
        return
    (finding,) = findings
    assert number in finding.text
    assert advice in finding.text
    assert "\n" not in finding.text


def test_limits() -> None:
    assert found(changed(clipped=0.0099)) == []
    assert found(changed(outlier=19.0)) == []
    assert found(changed(moved=0.24)) == []
    assert found(samples=99) != []
    assert found(variety=0.11) == []


def test_an_outlier_that_the_range_leaves_out_is_none() -> None:
    """The maximum is 40 times the percentile, and the range ends long before it."""
    assert found(changed(outlier=40.0, low=LOW / 10, high=HIGH / 10)) == []


def test_many_points_are_one_warning_the_worst_first() -> None:
    stats = {f"layer{i}:input": changed(clipped=0.02 + i / 100) for i in range(9)}
    (finding,) = judge(stats, samples=256, duplicates=0, unreached=[])
    assert finding.points[0] == "layer8:input"
    assert "layer8:input (10.0%), layer7:input (9.0%), layer6:input (8.0%) and 6 more" in finding.text

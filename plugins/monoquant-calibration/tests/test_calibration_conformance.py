"""The conformance kit on every calibrator, with each option changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from monoquant_calibration.extremes import MinMax
from monoquant_calibration.percentile import Percentile
from monoquant_calibration.plugin import MinMaxOptions, PercentileOptions

from monoquant_core.testing import CalibratorConformance
from monoquant_core.testing.plugin import conformance_classes

globals().update(conformance_classes("calibration"))

WIDEST: dict[str, Callable[[], Any]] = {
    "minmax": lambda: MinMax(MinMaxOptions()),
    "minmax of channels": lambda: MinMax(MinMaxOptions(granularity="channel")),
    "percentile 100": lambda: Percentile(PercentileOptions(percentile=100.0)),
    "percentile 100 of channels": lambda: Percentile(PercentileOptions(granularity="channel", percentile=100.0)),
}


class TestWidest(CalibratorConformance):
    @pytest.fixture(params=WIDEST)
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Any]:
        return WIDEST[request.param]

    @pytest.fixture
    def make_widest(self, make: Callable[[], Any]) -> Callable[[], Any]:
        return make

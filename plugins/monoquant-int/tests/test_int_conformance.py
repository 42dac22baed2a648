"""The kit on every scheme of the plugin, and on combinations of options that matter."""

from __future__ import annotations

from typing import Any

import pytest

from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.schemes import Quantizer
from monoquant_core.testing import QuantizerConformance
from monoquant_core.testing.plugin import conformance_classes

globals().update(conformance_classes("int"))

COMBINATIONS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {"granularity": "group", "group_size": 32}),
    ("int8", {"granularity": "group", "group_size": 32, "symmetric": False}),
    ("int8", {"granularity": "tensor", "symmetric": False}),
    ("int8", {"rounding": "search"}),
    ("int4", {"group_size": 32, "rounding": "nearest"}),
    ("int4", {"group_size": 16, "symmetric": False}),
    ("int4", {"granularity": "channel", "symmetric": False, "rounding": "nearest"}),
    ("int4", {"granularity": "tensor"}),
    *((f"int{bits}", {"group_size": 32}) for bits in (2, 3, 5, 6, 7)),
]


class TestCombinations(QuantizerConformance):
    """Options changed together."""

    @pytest.fixture(params=COMBINATIONS, ids=lambda c: " ".join([c[0], *(f"{k}={v}" for k, v in c[1].items())]))
    def quantizer(self, request: pytest.FixtureRequest) -> Quantizer:
        name, options = request.param
        declaration = load_registry().scheme(name)
        made: Quantizer = declaration.load()(build(declaration.options, options, owner=name))
        return made

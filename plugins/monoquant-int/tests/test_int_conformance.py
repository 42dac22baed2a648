"""The kit on the plugin and on its schemes, every option changed at least once."""

from __future__ import annotations

from typing import Any

import pytest

from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.schemes import Quantizer
from monoquant_core.testing import PluginConformance, QuantizerConformance

SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int8", {"granularity": "tensor", "symmetric": False}),
    ("int8", {"granularity": "group", "group_size": 32, "narrow_range": True}),
    ("int8", {"symmetric": False, "rounding": "search"}),
    ("w8a8", {}),
    ("int4", {}),
    ("int4", {"group_size": 32, "rounding": "nearest"}),
    ("int4", {"group_size": 16, "symmetric": False}),
    ("int4", {"granularity": "tensor", "narrow_range": True}),
    ("int2", {"group_size": 32}),
    ("int3", {"granularity": "channel"}),
    ("int7", {"group_size": 64, "symmetric": False, "rounding": "nearest"}),
]


class TestPlugin(PluginConformance):
    """What it declares."""

    plugin = "int"


@pytest.mark.usefixtures("searches")
class TestSchemes(QuantizerConformance):
    """What it quantizes."""

    @pytest.fixture(params=SCHEMES, ids=lambda c: " ".join([c[0], *(f"{k}={v}" for k, v in c[1].items())]))
    def quantizer(self, request: pytest.FixtureRequest) -> Quantizer:
        name, options = request.param
        declaration = load_registry().scheme(name)
        made: Quantizer = declaration.load()(build(declaration.options, options, owner=name))
        return made

"""The conformance kit on every scheme, every option changed at least once."""

from __future__ import annotations

from typing import Any

import pytest
from monoquant_gguf.plugin import TYPES

from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.schemes import Quantizer
from monoquant_core.testing import QuantizerConformance

OPTIONS: list[dict[str, Any]] = [{}, {"rounding": "llama.cpp"}, {"allow_fallback": True}]


class TestSchemes(QuantizerConformance):
    """What they quantize."""

    @pytest.fixture(params=[(name, options) for name in TYPES for options in OPTIONS], ids=str)
    def quantizer(self, request: pytest.FixtureRequest) -> Quantizer:
        name, options = request.param
        declaration = load_registry().scheme(name)
        made: Quantizer = declaration.load()(build(declaration.options, options, owner=name))
        return made

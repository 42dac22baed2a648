"""Either implementation of the search."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
from monoquant_int import kernels

MISSING = importlib.util.find_spec("numba") is None


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("search", id="torch"),
        pytest.param("compiled", id="numba", marks=pytest.mark.skipif(MISSING, reason="pip install numba")),
    ],
)
def searches(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """What searches, whatever the size of the tensor."""
    module = importlib.import_module(f"monoquant_int.{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "searches_for", lambda spec, device: module)
        yield module

"""llama.cpp, which nobody here wrote: through the shared ctypes wrapper of the xllamacpp wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def llamacpp(shared: Path) -> ModuleType:
    """The wrapper: ``Model``, ``logits``, ``embed``, ``dequantize``."""
    pytest.importorskip("xllamacpp")
    path = shared / "tools" / "ggmlref.py"
    spec = importlib.util.spec_from_file_location("ggmlref", path)
    if spec is None or spec.loader is None or not path.is_file():
        pytest.skip(f"no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

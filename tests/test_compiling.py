"""Compiled kernels: kept on disk while their sources stay, and done without where numba does not work."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from monoquant_core import compiling


def test_without_numba_there_are_no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compiling.accelerator() == "torch"
    assert compiling.compiled.__wrapped__("monoquant_core.errors") is None


def test_what_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.warns(UserWarning, match="numba is installed and cannot be used, so searches run in torch: No module"):
        assert compiling.compiled.__wrapped__("monoquant_core.no_such_module") is None


KERNEL = """
from helper import add
from monoquant_core.compiling import jit
import helper

def kernel(x):
    return add(x)

kernel = jit(kernel, (helper.__file__,))
print(kernel(1), sum(kernel.stats.cache_hits.values()))
"""


def test_a_kernel_is_kept_until_what_it_calls_changes(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    (tmp_path / "kernel.py").write_text(KERNEL)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    said = []
    for number in (1, 1, 2):
        helper = (
            f"from numba.extending import register_jitable\n@register_jitable\ndef add(x):\n    return x + {number}\n"
        )
        (tmp_path / "helper.py").write_text(helper)
        done = subprocess.run(
            [sys.executable, "-c", "import kernel"], env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.split())
    assert said == [["2", "0"], ["2", "1"], ["3", "0"]]

"""Fixtures for tests that run the command as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a user in a plain terminal: nothing of the test run's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MONOQUANT_", "PYTEST_", "FORCE_", "NO_COLOR"))}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **(extra or {})}


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("plan", path, env={...})``: the command's exit status, stdout and stderr."""

    def call(*args: object, env: Mapping[str, str] | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "monoquant_core.cli", *map(str, args)],
            capture_output=True,
            text=True,
            env=environment(env),
            timeout=120,
            **kwargs,  # type: ignore[call-overload]
        )

    return call


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """``install("ternary", code)``: a plugin that is found as if pip had put it there; gives the environment for it."""
    site = tmp_path / "site"

    def put(name: str, code: str) -> dict[str, str]:
        site.mkdir(exist_ok=True)
        (site / f"{name}_plugin.py").write_text(dedent(code))
        info = site / f"monoquant_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: monoquant-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[monoquant]\n{name} = {name}_plugin\n")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}

    return put

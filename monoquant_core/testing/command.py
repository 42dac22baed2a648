"""``monoquant conformance``: the kit on an installed plugin, without any code."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path

from monoquant_core.errors import MonoquantError, UnknownNameError
from monoquant_core.hookspecs import PROJECT


def run(name: str) -> int:
    """Run the conformance kit on the plugin whose entry point has this name; its report goes to stdout.

    :return: 0 when everything holds, else 1.
    :raises UnknownNameError: when no such plugin is installed.
    :raises MonoquantError: without pytest.
    """
    installed = sorted({ep.name for ep in entry_points(group=PROJECT)})
    if name not in installed:
        raise UnknownNameError(f"no plugin {name!r}; installed: {', '.join(installed) or 'none'}")
    if importlib.util.find_spec("pytest") is None:
        raise MonoquantError("the conformance kit needs pytest", hint="pip install pytest")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the samples are small: threads would only wait for each other
    import pytest

    suite = Path(__file__).with_name("test_installed_plugin.py")
    status = pytest.main(
        [
            str(suite),
            f"--monoquant-plugin={name}",
            *("-p", "monoquant_core.testing.plugin", "-p", "no:cacheprovider"),
            # Nothing of the folder it is started in: neither settings nor conftest.py.
            *("-c", os.devnull, "--noconftest", f"--rootdir={suite.parent}", "--import-mode=importlib"),
            *("-q", "-rfEs", "--tb=short", "--no-header"),
        ]
    )
    return 0 if status == pytest.ExitCode.OK else 1

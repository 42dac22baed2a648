"""The tests of ``--device`` on a device that is made up, so that they run everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a real one")
def test_accelerator_tests_pass_on_a_device_that_computes_otherwise() -> None:
    # Named here, because the made-up device is torch's accelerator from then on.
    code = """
import torch, far_device
torch.manual_seed(0)
print(any(float(x.to("far").sum()) != float(x.sum()) for x in torch.rand(50, 999)))
"""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert told.stdout == "True\n", told.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "far_device", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, HERE / "test_accelerator.py"],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "torch has no accelerator" not in done.stdout

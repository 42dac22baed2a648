"""Clocks: CPU time of calls in this process, CPU and wall time of child processes."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MONOQUANT = (sys.executable, "-m", "monoquant_core.cli")


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest run: on a shared machine the one that was disturbed least."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.seconds)


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, Timing]:
    """Run all contenders in turn, ``rounds`` times, after one round that is not counted.

    Taking turns spreads what else the machine does over all of them.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in contenders.items():
                start = clock()
                run()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True)
class Child:
    """A finished child process."""

    cpu: float  #: user and system seconds, its children included
    wall: float
    output: str  #: what it wrote to stdout


def run_child(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Child:
    """Run a command to its end.

    :param environment: variables that it gets beside those of this process.
    :raises RuntimeError: when it fails, with what it said.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            said = err.read().decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{said}")
        return Child(usage.ru_utime + usage.ru_stime, wall, out.read().decode())

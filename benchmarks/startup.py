"""How long the command takes before it does anything."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.measure import MONOQUANT, interleaved, run_child
from benchmarks.results import Gate, Section, Table
from benchmarks.synthetic import geometry, write_checkpoint

BOUND = 0.5  # seconds
CHECKPOINT_GB = 0.01


def measure(temp: Path, *, rounds: int) -> Section:
    """Time the commands that read no tensor."""
    checkpoint = temp / "plan-this"
    write_checkpoint(checkpoint, geometry(CHECKPOINT_GB))
    commands: dict[str, list[str | Path]] = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "monoquant --help": [*MONOQUANT, "--help"],
        "monoquant plugins list": [*MONOQUANT, "plugins", "list"],
        "monoquant plan": [*MONOQUANT, "plan", checkpoint],
    }
    runs = {name: lambda words=words: run_child(words) for name, words in commands.items()}
    times = interleaved(runs, rounds, time.perf_counter)
    rows = [(f"`{name}`", f"{t.best:.3f}", f"{t.median:.3f}") for name, t in times.items()]
    gates = [
        Gate(f"`{name}`: wall time", BOUND, "at most", " s", times[name].best, times[name].median)
        for name in commands
        if name.startswith("monoquant")
    ]
    return Section(
        "Start-up",
        f"Wall time of commands that import no torch, {rounds} runs in turn; python alone for comparison.",
        (Table(("command", "s", "median"), rows),),
        gates,
    )

"""How long the command takes before it does anything."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import MONOQUANT, Child, Timing, run_child
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
    children: dict[str, list[Child]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            children[name].append(run_child(words))
    wall = {name: Timing(tuple(child.wall for child in runs)) for name, runs in children.items()}
    cpu = {name: Timing(tuple(child.cpu for child in runs)) for name, runs in children.items()}
    figures = {name: (wall[name].best, wall[name].median, cpu[name].best, cpu[name].median) for name in commands}
    rows = [(f"`{name}`", *(f"{value:.3f}" for value in found)) for name, found in figures.items()]
    gates = [
        Gate(f"`{name}`: wall time", BOUND, "at most", " s", wall[name].best, wall[name].median)
        for name in commands
        if name.startswith("monoquant")
    ]
    return Section(
        "Start-up",
        f"Commands that import no torch, {rounds} runs in turn; python alone for comparison.",
        (Table(("command", "wall s", "median", "CPU s", "median"), rows),),
        gates,
    )

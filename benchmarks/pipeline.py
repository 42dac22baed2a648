"""The whole command against ``cp -r``: CPU time, wall time and peak memory, the check and the SQNR on."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import MONOQUANT, Child, Timing, run_child
from benchmarks.results import Gate, Section, Table, number
from benchmarks.synthetic import geometry, write_checkpoint

CPU_GATE = 3.0  # times cp
MEMORY_GATE = 64.0  # MB above start-up
GROWTH_GATE = 8.0  # MB more for the larger model: "the same", less what allocators do
START_UP_GB = 0.001


@dataclass(frozen=True)
class Runs:
    """Runs of one command."""

    cpu: Timing
    wall: Timing
    peak: float = 0.0  #: MB, the highest of all runs
    usual_peak: float = 0.0  #: MB, the median
    predicted: float = 0.0  #: MB above start-up, as the plan said
    sqnr_db: float = 0.0


def measure(temp: Path, *, sizes: Sequence[float], rounds: int) -> Section:
    """Make a checkpoint of every size (GB), copy and quantize it in turn; from 4 GB on in a third of the rounds."""
    small = temp / "start-up"
    write_checkpoint(small, geometry(START_UP_GB))
    start_up = summary([_quantize(small, temp / "out", threads=1) for _ in range(rounds)])
    rows = [("start-up", "", *cells(start_up), "", "", "", megabytes(start_up.peak), "", "", "")]
    gates, peaks = [], []
    for size in sizes:
        folder = temp / "checkpoint"
        nbytes = write_checkpoint(folder, geometry(size))
        copies, alone, quantized = [], [], []
        for _ in range(rounds if size < 4 else max(1, rounds // 3)):
            copies.append(_copy(folder, temp / "copy"))
            alone.append(_quantize(folder, temp / "out", threads=1))
            quantized.append(_quantize(folder, temp / "out"))
        shutil.rmtree(folder)
        cp, one, ours = summary(copies), summary(alone), summary(quantized)
        label = f"{number(nbytes / 1e9)} GB"
        best = (one.cpu.best - start_up.cpu.best) / cp.cpu.best
        median = (one.cpu.median - start_up.cpu.median) / cp.cpu.median
        above = max(one.peak, ours.peak) - start_up.peak
        peaks.append(ours.usual_peak)  # the highest depends on how often it was run
        gates.append(Gate(f"int8 pipeline, {label}: CPU beyond start-up / cp", CPU_GATE, "at most", "x", best, median))
        gates.append(Gate(f"int8 pipeline, {label}: peak above start-up", MEMORY_GATE, "at most", " MB", above))
        rows.append(("cp -r", label, *cells(cp), f"{cp.cpu.best * 1e9 / nbytes:.2f}", "1x", "1x", "", "", "", ""))
        for name, runs in (("quantize --threads 1", one), ("quantize", ours)):
            cpu, wall = runs.cpu.best - start_up.cpu.best, runs.wall.best / cp.wall.best
            memory = (megabytes(runs.peak), f"{runs.peak - start_up.peak:.1f} MB", f"{runs.predicted:.1f} MB")
            ratios = (f"{cpu * 1e9 / nbytes:.2f}", f"{number(cpu / cp.cpu.best)}x", f"{number(wall)}x")
            rows.append((name, label, *cells(runs), *ratios, *memory, f"{runs.sqnr_db:.1f} dB"))
    if len(peaks) > 1:
        growth = max(peaks) - min(peaks)
        gates.append(Gate("int8 pipeline: median peak, all sizes: difference", GROWTH_GATE, "at most", " MB", growth))
    header = (
        "command", "checkpoint", "CPU s", "median", "wall s", "median", "CPU s per GB", "CPU of cp", "wall of cp",
        "peak", "above start-up", "predicted", "SQNR",
    )  # fmt: skip
    return Section(
        "Pipeline",
        f"""`monoquant quantize --scheme int8` of synthetic sharded bf16 Llama checkpoints, nearly all of whose
bytes are quantized, with the check of every tensor and the SQNR on, against `cp -r` of the same folder; both
read from the page cache. The outputs are fsynced, cp's is not. CPU is user and system time of the child
process; start-up is the same command on a checkpoint of {START_UP_GB * 1000:.0f} MB, subtracted from CPU per GB
and from the ratio of CPU, not from wall. The gates judge runs of one thread, which is what cp has: two that share
caches and memory take more CPU time for the same work. The other rows have {os.cpu_count()} threads, one per core.
What cp costs per GB depends on whether the system has memory for the copy at hand or must find it first: compare it
across sizes, too. Peak is VmHWM of the child, the highest of all runs. MB and GB are decimal.""",
        (Table(header, rows),),
        gates,
    )


def megabytes(value: float) -> str:
    """MB, as text."""
    return f"{value:.0f} MB"


def _copy(source: Path, target: Path) -> Child:
    # A reflink would copy nothing.
    command: list[str | Path] = ["cp", "-r", *(["--reflink=never"] if sys.platform == "linux" else []), source, target]
    return run_once(command, target)


def _quantize(source: Path, target: Path, threads: int = 0) -> Child:
    words = ["--scheme", "int8", "--json", "--threads", str(threads)]
    return run_once([*MONOQUANT, "quantize", source, "-o", target, *words], target)


def run_once(command: Sequence[str | Path], target: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Run a command, and remove what it made."""
    os.sync()  # what the run before left unwritten is not this one's
    child = run_child(command, environment)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return child


def summary(children: Sequence[Child]) -> Runs:
    """Runs of one command as one."""
    cpu, wall = Timing(tuple(c.cpu for c in children)), Timing(tuple(c.wall for c in children))
    reports = [json.loads(c.output) for c in children if c.output.strip()]
    if not reports:
        return Runs(cpu, wall)
    peaks, predicted = [r["peak_bytes"] for r in reports], max(r["predicted_bytes"] for r in reports)
    usual = statistics.median(peaks)
    return Runs(cpu, wall, max(peaks) / 1e6, usual / 1e6, predicted / 1e6, reports[0]["sqnr_db"])


def cells(runs: Runs) -> tuple[str, str, str, str]:
    """CPU and wall seconds, the best and the median of each."""
    return (f"{runs.cpu.best:.2f}", f"{runs.cpu.median:.2f}", f"{runs.wall.best:.2f}", f"{runs.wall.median:.2f}")

"""``--device``: an accelerator against the CPU, in the same process and in the whole command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import monoquant_core as mq
from benchmarks.measure import MONOQUANT, Child, Timing, interleaved
from benchmarks.pipeline import cells, megabytes, run_once, summary
from benchmarks.results import Gate, Section, Table, number
from benchmarks.synthetic import NAME, geometry, heavy_tailed, write_checkpoint
from monoquant_core.engine import DEVICE_CHUNKS, DEVICE_THREADS, RunOptions, write
from monoquant_core.memory import default_threads, usable_cores
from monoquant_core.planning import Plan
from monoquant_core.reencode import reencode
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tasks import CHUNK_ELEMENTS, elements_of_tasks, task_ranges
from monoquant_core.workers import Workers

KERNEL_GATE = 1.0  # times as fast as the CPU, the way there and back included


@dataclass(frozen=True, eq=False)
class Job:
    """One scheme in one format."""

    title: str
    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    format: str = "safetensors"
    gate: bool = False  #: whether it is held to being faster than the CPU


KERNELS = (
    Job("int8 per channel", "int8"),
    Job("int4 g128 nearest", "int4", {"rounding": "nearest"}),
    Job("int4 g128 search", "int4", {"rounding": "search"}, gate=True),
    Job("fp8 per channel", "fp8"),
    Job("Q8_0", "Q8_0", {"rounding": "llama.cpp"}, "gguf"),
    Job("Q4_K llama.cpp", "Q4_K", {"rounding": "llama.cpp"}, "gguf"),
    Job("Q4_K search", "Q4_K", {"rounding": "search"}, "gguf"),
    Job("Q6_K search", "Q6_K", {"rounding": "search"}, "gguf"),
)
COMMANDS = (Job("int8", "int8"), Job("int4", "int4"), Job("Q4_K_M", "Q4_K_M", format="gguf"))
SWEEP_CHUNKS, SWEEP_THREADS, SWEEP_BELOW = (16, 64), (1, 2, 4, 8), 4  #: the last in GB


def accelerator() -> str:
    """Name of torch's accelerator as ``--device`` takes it; empty where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else ""


def measure(temp: Path, *, size: int, rounds: int, sizes: Sequence[float], runs: int) -> list[Section]:
    """Kernels on a ``size`` x ``size`` matrix, commands on checkpoints of ``sizes`` GB; nothing without a device."""
    device = accelerator()
    if not device:
        print("device: left out, torch has no accelerator here", file=sys.stderr)
        return []
    return [
        _kernels(temp / "device-kernels", device, size=size, rounds=rounds),
        *_commands(temp, device, sizes=sizes, runs=runs),
    ]


def _kernels(temp: Path, device: str, *, size: int, rounds: int) -> Section:
    rows, gates = [], []
    weight = heavy_tailed((size, size)).to(torch.bfloat16)
    there = weight.to(device)
    with Workers(default_threads()) as workers:
        for i, job in enumerate(KERNELS):
            plan = _plan(temp / str(i), weight, job)
            copied, _ = _work(plan, weight, device)
            _, packed = _work(plan, there, device)
            contenders: dict[str, Callable[[], object]] = {
                "cpu": partial(_on_cores, plan, weight, workers),
                "copied": copied,
                "there": packed,
            }
            times = interleaved(contenders, rounds, clock=_now(device))
            rows.append((job.title, *_figures(weight.numel(), times)))
            _tell(rows[-1])
            if job.gate:
                best, median = (times["cpu"].best / times["copied"].best, times["cpu"].median / times["copied"].median)
                title = f"{job.title} on {device}, copies included: speed / the CPU's"
                gates.append(Gate(title, KERNEL_GATE, "at least", "x", best, median))
    header = (
        "kernel", f"{default_threads()} threads", "median", "with copies", "median", "of the CPU",
        "data there", "median", "of the CPU",
    )  # fmt: skip
    return Section(
        f"Kernels on {device}",
        f"""Million elements per second of a {size}x{size} bf16 matrix of heavy-tailed weights, quantized and packed:
on {default_threads()} threads of the CPU, as many as a run takes, in chunks of
{elements_of_tasks(default_threads())} elements as the engine does (searches with numba where it is installed), and on
{device}, {DEVICE_CHUNKS * CHUNK_ELEMENTS} elements at a time. "With copies": the matrix
lies in the memory of the host, and so do the packed bytes in the end, as in a run; "data there": both stay on the
device. Wall time, the device idle before and after; contenders take turns, {rounds} rounds; first the fastest round,
then the median, which the ratios use.""",
        (Table(header, rows),),
        gates,
    )


def _figures(numel: int, times: dict[str, Timing]) -> list[str]:
    found = []
    for name in ("cpu", "copied", "there"):
        found += [number(numel / times[name].best / 1e6), number(numel / times[name].median / 1e6)]
        if name != "cpu":
            found.append(f"{number(times['cpu'].median / times[name].median)}x")
    return found


def _now(device: str) -> Callable[[], float]:
    import time

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def _plan(folder: Path, weight: torch.Tensor, job: Job) -> Plan:
    folder.mkdir(parents=True)
    save_file({NAME: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    options = {"architecture": "generic"} if job.format == "gguf" else {}
    return mq.plan(folder, scheme=job.scheme, options=job.options, format=job.format, format_options=options)


def _one(plan: Plan, weight: torch.Tensor, rows: range, scratch: Scratch) -> dict[str, torch.Tensor]:
    """What the engine does between reading and writing."""
    step, exporter = plan.steps[0], plan.exporter
    proposal, held = step.placed.proposal, step.placed.held
    assert exporter is not None
    assert step.quantizer is not None
    assert proposal is not None
    assert held.encoding is not None
    part = weight[rows.start : rows.stop]
    x = scratch.take("engine.float", part.shape, torch.float32, part.device).copy_(part)
    made = step.quantizer.quantize(x, proposal.encoding, Context(step.specs[0], rows, scratch))  # type: ignore[arg-type]
    if made.encoding != held.encoding:
        made = reencode(made, held.encoding)
    return dict(exporter.pack(made, step.placed.output, held, rows.start))


def _on_cores(plan: Plan, weight: torch.Tensor, workers: Workers) -> None:
    ranges = task_ranges(plan.steps[0], elements_of_tasks(workers.threads))
    workers.map(lambda rows, scratch: bool(_one(plan, weight, rows, scratch)), ranges)


def _work(plan: Plan, weight: torch.Tensor, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same on the device: with copies there and back, and without."""
    ranges, scratch = task_ranges(plan.steps[0], CHUNK_ELEMENTS * DEVICE_CHUNKS), Scratch()

    def copied() -> None:
        with torch.inference_mode():
            for rows in ranges:
                part = _one(plan, weight[rows.start : rows.stop].to(device), range(len(rows)), scratch)
                for value in part.values():
                    value.cpu()

    def there() -> None:
        with torch.inference_mode():
            for rows in ranges:
                _one(plan, weight, rows, scratch)

    return copied, there


def _commands(temp: Path, device: str, *, sizes: Sequence[float], runs: int) -> list[Section]:
    rows, sweep = [], list[tuple[str, ...]]()
    for index, size in enumerate(sizes):
        folder = temp / "device-checkpoint"
        nbytes = write_checkpoint(folder, geometry(size))
        for job in COMMANDS:
            found: dict[str, list[Child]] = {"cpu": [], device: []}
            if index == 0 and job.format == "gguf":
                _command(folder, temp, job, "cpu")  # compiles what is not in numba's cache
            for _ in range(runs if size < 4 else 1):
                for name, children in found.items():
                    children.append(_command(folder, temp, job, name))
            walls = {}
            for name, children in found.items():
                one = summary(children)
                walls[name] = one.wall.median
                ratio = f"{number(walls['cpu'] / one.wall.median)}x"
                label = f"{number(nbytes / 1e9)} GB"
                rows.append((job.title, label, name, *cells(one), ratio, megabytes(one.peak), f"{one.sqnr_db:.2f} dB"))
                _tell(rows[-1])
        if index == 0 and size < SWEEP_BELOW:
            sweep = _sweep(folder, temp, device)
        shutil.rmtree(folder)
    header = ("scheme", "checkpoint", "device", "CPU s", "median", "wall s", "median", "speed", "peak", "SQNR")
    return [
        Section(
            f"The whole command on {device}",
            f"""`monoquant quantize` of synthetic sharded bf16 Llama checkpoints, the check and the SQNR on, with
`--device cpu`, which takes {default_threads()} threads of {usable_cores()} cores, and with `--device {device}`,
which takes {min(default_threads(), DEVICE_THREADS)}.
Inputs come from the page cache, outputs are fsynced to {_where(temp)}. CPU is user and system time of the child
process; wall time has all of it, start-up and the device's included; peak is VmHWM of the child, memory of the host.
{runs} runs in turn, of 4 GB and more one.""",
            (Table(header, rows),),
        ),
        *([_sweep_section(device, sweep)] if sweep else []),
    ]


def _sweep_section(device: str, rows: Sequence[Sequence[str]]) -> Section:
    return Section(
        f"Threads and chunks on {device}",
        f"""Seconds of wall time that the engine takes for the smallest checkpoint, start-up aside, by the number of
threads and by how many times {CHUNK_ELEMENTS} elements are worked on at a time; the better of two runs. The defaults
are {DEVICE_THREADS} threads (or as many as there are cores, if fewer) and {DEVICE_CHUNKS} times.""",
        (Table(("scheme", "elements", *(f"{t} threads" for t in SWEEP_THREADS)), rows),),
    )


def _sweep(folder: Path, temp: Path, device: str) -> list[tuple[str, ...]]:
    rows = []
    for job in COMMANDS[:2]:
        with mq.quantize(folder, scheme=job.scheme) as model:
            plan = model.plan("safetensors", destination="out")
            for chunks in SWEEP_CHUNKS:
                best = []
                for threads in SWEEP_THREADS:
                    options = RunOptions(threads, CHUNK_ELEMENTS * chunks // DEVICE_CHUNKS, device)
                    seconds = []
                    for _ in range(2):
                        seconds.append(write(plan, model.source, temp / "out", options).seconds)
                        shutil.rmtree(temp / "out")
                    best.append(f"{min(seconds):.2f}")
                rows.append((job.title, f"{chunks} x", *best))
                _tell(rows[-1])
    return rows


def _command(folder: Path, temp: Path, job: Job, device: str) -> Child:
    target = temp / ("out.gguf" if job.format == "gguf" else "out")
    words: list[str | Path] = ["quantize", folder, "-o", target, "--scheme", job.scheme, "--device", device, "--json"]
    return run_once([*MONOQUANT, *words, *(["--tokenizer", "none"] if job.format == "gguf" else [])], target)


def _tell(row: Sequence[str]) -> None:
    """A row as soon as it is known: a lent machine may be gone before the page is."""
    print(*row, sep=" | ", file=sys.stderr, flush=True)


def _where(folder: Path) -> str:
    return "memory (tmpfs)" if os.path.realpath(folder).startswith("/dev/shm") else "the disk"

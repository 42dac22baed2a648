"""Types and mixtures of GGUF against llama.cpp's C: ``ggml_quantize_chunk`` of the same values, in the same run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from monoquant_gguf import blocks
from monoquant_gguf.kernels.run import quantize
from monoquant_gguf.layouts import QUANTIZED, Layout, by_name

import monoquant_core as mq
from benchmarks import ggml
from benchmarks.kernels import DTYPES, one_thread
from benchmarks.measure import MONOQUANT, Child, Timing, interleaved
from benchmarks.pipeline import START_UP_GB, Runs, cells, megabytes, run_once, summary
from benchmarks.results import Gate, Section, Table, number
from benchmarks.synthetic import Geometry, geometry, heavy_tailed, write_checkpoint
from monoquant_core.compiling import accelerator
from monoquant_core.model import TensorSpec
from monoquant_core.rows import all_rows
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tasks import CHUNK_ELEMENTS

COLUMNS = 4096
SPEED_GATES = {"Q8_0": 1.6, "Q4_0": 1.0, "Q4_K": 4.5, "Q6_K": 3.2}  #: float32 to llama.cpp's bytes, x C
NEEDS_NUMBA = frozenset({"Q4_K", "Q6_K"})
CPU_GATE, MEMORY_GATE = 0.35, 128.0  #: x C; MB above start-up
SCHEME = "Q4_K_M"
LLAMA = Geometry(hidden=2048, ffn=5632, layers=11, vocabulary=15104)  #: 627 million parameters

TODAY = """Today's way was measured elsewhere, on a checkpoint of that size and 2 x86-64 cores with AVX2 (llama.cpp of
October 2026): convert_hf_to_gguf to F16 took 13.5 CPU seconds, llama-quantize to Q4_K_M 50, with a file of 1.25 GB in
between; `cp` of the checkpoint took 0.54 there."""


@dataclass(frozen=True, eq=False)
class _Trial:
    """One type: its times, and what it wrote."""

    layout: Layout
    times: dict[str, Timing]
    different: int | None  #: bytes that are not llama.cpp's
    errors: dict[str, float]  #: relative squared error by rounding

    def speed(self, what: str, *, median: bool = False) -> float | None:
        """Times as fast as C."""
        c, ours = self.times.get("C"), self.times[what]
        if c is None:
            return None
        return c.median / ours.median if median else c.best / ours.best


def measure_types(*, rows: int, rounds: int) -> Section:
    """Quantize and pack a matrix of ``rows`` x 4096 to every type, in both roundings and both dtypes."""
    weight = heavy_tailed((rows, COLUMNS))
    with one_thread():
        trials = [_trial(layout, weight, rounds) for layout in QUANTIZED]
    labels = [f"{rounding}, {dtype}" for rounding in ("llama.cpp", "search") for dtype in DTYPES]
    table = []
    for trial in trials:
        c = trial.times.get("C")
        row = [trial.layout.name, _melems(weight.numel(), c) if c else "", *(_ours(trial, x, weight) for x in labels)]
        different = "" if trial.different is None else str(trial.different)
        table.append((*row, different, *(f"{trial.errors[r]:.5g}" for r in ("llama.cpp", "search"))))
    return Section(
        "Types of GGUF",
        f"""Million elements per second and core of a {rows}x{COLUMNS} matrix of heavy-tailed weights, quantized and
packed to llama.cpp's blocks in chunks of {CHUNK_ELEMENTS} elements as the engine does, and how many times as fast as
`ggml_quantize_chunk` of the xllamacpp wheel that is. C gets the matrix as float32, which it quantizes from; ours
gets the dtype that is named. CPU time of the process, one thread; contenders take turns, {rounds} rounds; the figures
are those of the fastest round. Searches run with {accelerator()}. "differ" counts the bytes that
`--rounding llama.cpp` writes and C does not. Errors are squared errors relative to the squares of the weights.""",
        (Table(("type", "C", *labels, "differ", "error of llama.cpp", "of search"), table),),
        _type_gates({trial.layout.name: trial for trial in trials}),
    )


def measure_pipeline(temp: Path, *, size: float | None, rounds: int) -> Section:
    """From a folder to Q4_K_M: the whole command, and what C takes for the same tensors and types.

    :param size: of the checkpoint in GB; by default it is that of :data:`LLAMA`.
    """
    small, folder = temp / "gguf-start-up", temp / "gguf-checkpoint"
    write_checkpoint(small, geometry(START_UP_GB))
    nbytes = write_checkpoint(folder, LLAMA if size is None else geometry(size))
    first = _first(small, temp) if size is None else None  # compiling takes longer than all of a quick run
    children: dict[str, list[Child]] = {"start-up": [], "search": [], "llama.cpp": []}
    c: list[float] = []
    _convert(small, temp, "search")  # compiles what is not in numba's cache
    for _ in range(rounds):
        children["start-up"].append(_convert(small, temp, "search"))
        if ggml.available():
            c.append(_c_seconds(folder))
        for rounding in ("search", "llama.cpp"):
            children[rounding].append(_convert(folder, temp, rounding))
    runs = {name: summary(done) for name, done in children.items()}
    return Section(
        "From a checkpoint to Q4_K_M",
        f"""`monoquant quantize --format gguf --scheme {SCHEME}` of a synthetic bf16 Llama of {nbytes / 1e9:.2f} GB,
with the check and the SQNR on, against `ggml_quantize_chunk` of the same tensors to the same types: its time alone,
on one thread, without reading, converting to float32 and writing. CPU is user and system time, of ours that of the
whole command, imports included; C and the commands take turns, {rounds} rounds, and gates judge the best. Peak is
VmHWM, the highest of all runs; start-up is the same command on {START_UP_GB * 1000:.0f} MB. The first run, with an
empty cache of numba's, compiles as well: it is the start-up that a machine has once. {os.cpu_count()} cores, as many
threads, searches with {accelerator()}. MB and GB are decimal.

{TODAY}""",
        (_pipeline_table(runs, first, c),),
        _pipeline_gates(runs, c),
    )


def _trial(layout: Layout, weight: torch.Tensor, rounds: int) -> _Trial:
    contenders: dict[str, Callable[[], object]] = {}
    if ggml.available():
        contenders["C"] = partial(ggml.quantize, weight, layout)
    given = {label: weight.to(dtype) for label, dtype in DTYPES.items()}
    for label, x in given.items():
        for rounding in ("llama.cpp", "search"):
            contenders[f"{rounding}, {label}"] = partial(_run, layout, x, rounding, Scratch())
    times = interleaved(contenders, rounds)
    errors = {
        r: _relative_error(layout, list(_packed(layout, weight, r, Scratch())), weight) for r in ("llama.cpp", "search")
    }
    different = sum(_different(layout, x) for x in given.values()) if ggml.available() else None
    return _Trial(layout, times, different, errors)


def _run(layout: Layout, weight: torch.Tensor, rounding: str, scratch: Scratch) -> None:
    for _ in _packed(layout, weight, rounding, scratch):
        pass


def _packed(layout: Layout, weight: torch.Tensor, rounding: str, scratch: Scratch) -> Iterator[torch.Tensor]:
    """Blocks of one chunk after another."""
    spec = TensorSpec("weight", tuple(weight.shape), str(weight.dtype).removeprefix("torch."))
    encoding, step = layout.encoding_for(2), CHUNK_ELEMENTS // COLUMNS
    for first in range(0, len(weight), step):
        rows = range(first, min(first + step, len(weight)))
        context = Context(spec, rows, scratch)
        made = quantize(layout, weight[rows.start : rows.stop], encoding, context, search=rounding == "search")
        yield blocks.pack(made, layout)


def _relative_error(layout: Layout, packed: list[torch.Tensor], weight: torch.Tensor) -> float:
    held = blocks.unpack(torch.cat(packed), layout, tuple(weight.shape))
    assert not isinstance(held, torch.Tensor)
    return float((held.dequantize() - weight).double().square_().sum() / weight.double().square_().sum())


def _different(layout: Layout, weight: torch.Tensor) -> int:
    ours = torch.cat(list(_packed(layout, weight, "llama.cpp", Scratch())))
    return int((ours != ggml.quantize(weight.float(), layout)).sum())


def _ours(trial: _Trial, what: str, weight: torch.Tensor) -> str:
    speed = trial.speed(what)
    return _melems(weight.numel(), trial.times[what]) + ("" if speed is None else f" ({number(speed)}x)")


def _type_gates(trials: dict[str, _Trial]) -> list[Gate]:
    gates = []
    for name, bound in SPEED_GATES.items():
        what, reason = f"{name}, f32: speed / ggml's C", ""
        if not ggml.available():
            reason = ggml.MISSING
        elif name in NEEDS_NUMBA and accelerator() != "numba":
            reason = "pip install 'monoquant[gguf-fast]'"
        if reason:
            gates.append(Gate(what, bound, "at least", "x", None, reason=reason))
            continue
        best, median = (trials[name].speed("llama.cpp, f32", median=m) for m in (False, True))
        gates.append(Gate(what, bound, "at least", "x", best, median))
    different = [trial.different for trial in trials.values() if trial.different is not None]
    gates.append(
        Gate("all types: bytes that differ from C's", 0, "at most", "", sum(different))
        if different
        else Gate("all types: bytes that differ from C's", 0, "at most", "", None, reason=ggml.MISSING)
    )
    worst = max(trial.errors["search"] / trial.errors["llama.cpp"] for trial in trials.values())
    gates.append(Gate("all types: squared error of search / llama.cpp's", 1, "at most", "x", worst))
    return gates


def _pipeline_table(runs: dict[str, Runs], first: Child | None, c: list[float]) -> Table:
    start_up, rows = runs["start-up"], []
    if c:
        timing = Timing(tuple(c))
        rows.append(
            ("ggml_quantize_chunk alone", f"{timing.best:.2f}", f"{timing.median:.2f}", *[""] * 2, "1x", *[""] * 4)
        )
    for name in ("search", "llama.cpp"):
        run = runs[name]
        ratio = f"{number(run.cpu.best / min(c))}x" if c else ""
        memory = (f"{run.peak - start_up.peak:.1f} MB", f"{run.predicted:.1f} MB", f"{run.sqnr_db:.2f} dB")
        rows.append((f"--rounding {name}", *cells(run), ratio, megabytes(run.peak), *memory))
    rows.append(("start-up", *cells(start_up), "", megabytes(start_up.peak), "", "", ""))
    if first is not None:
        once = summary([first])
        above = f"{once.peak - start_up.peak:.1f} MB"
        rows.append(("first run", *cells(once), "", megabytes(once.peak), above, "", ""))
    header = ("what", "CPU s", "median", "wall s", "median", "of C", "peak", "above start-up", "predicted", "SQNR")
    return Table(header, rows)


def _pipeline_gates(runs: dict[str, Runs], c: list[float]) -> list[Gate]:
    ours, timing = runs["search"], Timing(tuple(c))
    what = f"{SCHEME} of a folder: CPU, start-up included / ggml's C alone"
    if c and accelerator() == "numba":
        cpu = Gate(
            what, CPU_GATE, "at most", "x", ours.cpu.best / timing.best, ours.cpu.median / timing.median
        )  # fmt: skip
    else:
        cpu = Gate(what, CPU_GATE, "at most", "x", None, reason=ggml.MISSING if not c else "pip install numba")
    above = max(runs[name].peak for name in ("search", "llama.cpp")) - runs["start-up"].peak
    return [cpu, Gate(f"{SCHEME} of a folder: peak above start-up", MEMORY_GATE, "at most", " MB", above)]


def _convert(folder: Path, temp: Path, rounding: str, cache: Path | None = None) -> Child:
    target = temp / "out.gguf"
    options = ("--format", "gguf", "--scheme", SCHEME, "--rounding", rounding, "--tokenizer", "none", "--json")
    command: list[str | Path] = [*MONOQUANT, "quantize", folder, "-o", target, *options]
    return run_once(command, target, {} if cache is None else {"NUMBA_CACHE_DIR": str(cache)})


def _first(folder: Path, temp: Path) -> Child:
    with tempfile.TemporaryDirectory(dir=temp) as cache:
        return _convert(folder, temp, "search", Path(cache))


def _c_seconds(folder: Path) -> float:
    """CPU seconds that C takes for the tensors that the mixture quantizes."""
    plan = mq.plan(folder, scheme=SCHEME, format="gguf", format_options={"tokenizer": "none"})
    seconds = 0.0
    source = mq.open_source(folder)
    with one_thread():
        for step in plan.steps:
            if step.action != "quantize":
                continue
            (spec,) = step.specs
            weight = source.read(spec.name, all_rows(spec.shape))
            assert isinstance(weight, torch.Tensor)
            x = weight.float()
            start = time.process_time()
            ggml.quantize(x, by_name(step.placed.held.layout))
            seconds += time.process_time() - start
    return seconds


def _melems(numel: int, timing: Timing) -> str:
    return number(numel / timing.best / 1e6)

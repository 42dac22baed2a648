"""Kernels against memcpy, compressed-tensors and torchao: CPU time of one thread, in one process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from monoquant_int import kernels as integers
from monoquant_int import search
from safetensors.torch import save_file

import monoquant_core as mq
from benchmarks import peers
from benchmarks.measure import Timing, interleaved
from benchmarks.results import Gate, Section, Table, number
from benchmarks.synthetic import NAME, heavy_tailed
from monoquant_core.compiling import compiled
from monoquant_core.planning import Plan, Step
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tasks import CHUNK_ELEMENTS, task_ranges
from monoquant_core.tensor import QuantizedTensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One scheme, and what it is held to."""

    title: str
    scheme: str
    options: Mapping[str, object]
    pack: bool  #: whether the format's packing is part of the job
    peer: str = ""  #: its counterpart in peers
    memcpy: Mapping[str, float] | None = None  #: least speed relative to memcpy, by dtype
    peers: bool = False  #: whether it is held to multiples of its peers' speed
    melems: float = 0.0  #: least million elements per second
    searches: ModuleType | None = None  #: what runs the search, where there is one


COMPILED = compiled("monoquant_int.compiled")
KERNELS = (
    Kernel("int8 per channel", "int8", {}, pack=False, peer="int8", memcpy={"f32": 0.35, "bf16": 0.20}, peers=True),
    Kernel("int8 per channel, packed", "int8", {}, pack=True),
    Kernel(
        "int4 g128 nearest, packed",
        "int4",
        {"rounding": "nearest"},
        pack=True,
        peer="int4",
        memcpy={"f32": 0.24, "bf16": 0.13},
        peers=True,
    ),
    Kernel("int4 g128 search, packed", "int4", {"rounding": "search"}, pack=True, melems=60, searches=search),
    *(
        [Kernel("int4 g128 search, numba, packed", "int4", {"rounding": "search"}, pack=True, searches=COMPILED)]
        if COMPILED is not None
        else []
    ),
    Kernel("fp8 per channel", "fp8", {}, pack=False, peer="fp8"),
)
COMPRESSED_TENSORS_GATE, TORCHAO_GATE = 8.0, 3.0


def measure(temp: Path, *, size: int, rounds: int) -> Section:
    """Time every kernel on a ``size`` x ``size`` matrix in both dtypes."""
    rows, gates, errors = [], [], []
    with one_thread():
        for label, dtype in DTYPES.items():
            weight = heavy_tailed((size, size)).to(dtype)
            plans = {kernel: _plan(temp / f"{label}{i}", weight, kernel) for i, kernel in enumerate(KERNELS)}
            copy = torch.empty_like(weight)
            contenders: dict[str, Callable[[], object]] = {"memcpy": partial(copy.copy_, weight)}
            for kernel, plan in plans.items():
                contenders[kernel.title] = _ours(plan, weight, kernel)
                if kernel.peer:
                    contenders[f"ct {kernel.peer}"] = partial(peers.COMPRESSED_TENSORS[kernel.peer], weight)
                    if kernel.peer in peers.TORCHAO:
                        contenders[f"ao {kernel.peer}"] = partial(peers.TORCHAO[kernel.peer], weight)
            times = interleaved(contenders, rounds)
            for kernel in KERNELS:
                rows.append(_row(kernel, label, weight.numel(), times))
                gates += _gates(kernel, label, weight.numel(), times)
            gigabytes = weight.nbytes / times["memcpy"].best / 1e9
            melems = _melems(weight.numel(), times["memcpy"].best)
            rows.append(
                ("memcpy", label, melems, _melems(weight.numel(), times["memcpy"].median), "1x", "", "", "", "")
            )
            rows[-1] = (f"memcpy ({number(gigabytes)} GB/s)", *rows[-1][1:])
            errors += [
                (label, kernel.title, _relative_error(plans[kernel], weight)) for kernel in KERNELS if kernel.pack
            ]
            errors.append(
                (label, "compressed-tensors int4 g128 (absmax)", peers.absmax_error(weight) / _energy(weight))
            )
    header = (
        "kernel", "input", "Melem/s", "median", "of memcpy", "compressed-tensors", "ours is", "torchao", "ours is",
    )  # fmt: skip
    return Section(
        "Kernels",
        f"""Million elements per second and core of a {size}x{size} matrix of heavy-tailed weights (Student's t, 5
degrees of freedom), quantized in chunks of {CHUNK_ELEMENTS} elements as the engine does, scales included. CPU
time of the process, one thread; contenders take turns, {rounds} rounds; the first figure is the fastest round,
which the ratios use. memcpy copies the same matrix. compressed-tensors and torchao get the whole matrix at
once, as their users call them, and compute scales too; torchao leaves int4 unpacked. "packed" includes what the
file format does to the codes.""",
        (
            Table(header, rows),
            Table(
                ("input", "method", "relative squared error"),
                [(label, title, f"{error:.3g}") for label, title, error in errors],
                "Error on the same matrix",
            ),
        ),
        gates,
    )


def quantized_chunks(step: Step, weight: torch.Tensor, scratch: Scratch) -> Iterator[tuple[range, QuantizedTensor]]:
    """What the engine does with a matrix between reading and packing."""
    encoding, quantizer, spec = step.placed.held.encoding, step.quantizer, step.specs[0]
    assert encoding is not None
    assert quantizer is not None
    for rows in task_ranges(step):
        yield rows, quantizer.quantize(weight[rows.start : rows.stop], encoding, Context(spec, rows, scratch))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(folder: Path, weight: torch.Tensor, kernel: Kernel) -> Plan:
    """The plan of a checkpoint that holds the matrix as a layer of a Llama."""
    folder.mkdir(parents=True)
    save_file({NAME: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return mq.plan(folder, scheme=kernel.scheme, options=kernel.options)


def _ours(plan: Plan, weight: torch.Tensor, kernel: Kernel) -> Callable[[], object]:
    step, exporter, scratch = plan.steps[0], plan.exporter, Scratch()
    assert exporter is not None

    def run() -> None:
        with mock.patch.object(integers, "searches_for", return_value=kernel.searches):
            for rows, quantized in quantized_chunks(step, weight, scratch):
                if kernel.pack:
                    exporter.pack(quantized, step.placed.output, step.placed.held, rows.start)

    return run


def _row(kernel: Kernel, label: str, numel: int, times: Mapping[str, Timing]) -> tuple[str, ...]:
    ours, memcpy = times[kernel.title], times["memcpy"]
    cells = [kernel.title, label, _melems(numel, ours.best), _melems(numel, ours.median)]
    cells.append(f"{number(memcpy.best / ours.best)}x")
    for name in ("ct", "ao"):
        peer = times.get(f"{name} {kernel.peer}")
        cells += [_melems(numel, peer.best), f"{number(peer.best / ours.best)}x"] if peer else ["", ""]
    return tuple(cells)


def _gates(kernel: Kernel, label: str, numel: int, times: Mapping[str, Timing]) -> list[Gate]:
    ours = times[kernel.title]
    gates = []

    def against(other: str, what: str, bound: float) -> None:
        title = f"{kernel.title}, {label}: speed / {what}"
        if theirs := times.get(other):
            best, median = theirs.best / ours.best, theirs.median / ours.median
            gates.append(Gate(title, bound, "at least", "x", best, median))
        else:
            gates.append(Gate(title, bound, "at least", "x", None, reason=f"no {what}: requirements-dev.txt"))

    if kernel.memcpy:
        against("memcpy", "memcpy", kernel.memcpy[label])
    if kernel.peers:
        against(f"ct {kernel.peer}", "compressed-tensors", COMPRESSED_TENSORS_GATE)
        against(f"ao {kernel.peer}", "torchao", TORCHAO_GATE)
    if kernel.melems:
        best, median = numel / ours.best / 1e6, numel / ours.median / 1e6
        gates.append(Gate(f"{kernel.title}, {label}: speed", kernel.melems, "at least", " Melem/s", best, median))
    return gates


def _relative_error(plan: Plan, weight: torch.Tensor) -> float:
    """Sum of squared errors over the sum of squares."""
    noise = 0.0
    for rows, quantized in quantized_chunks(plan.steps[0], weight, Scratch()):
        difference = quantized.dequantize() - weight[rows.start : rows.stop].float()
        noise += float(difference.square_().sum(dtype=torch.float64))
    return noise / _energy(weight)


def _energy(weight: torch.Tensor) -> float:
    return float(weight.float().square().sum(dtype=torch.float64))


def _melems(numel: int, seconds: float) -> str:
    return number(numel / seconds / 1e6)

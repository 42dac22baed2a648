"""The compiled search against the one in torch, bit for bit, and when it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monoquant_int import kernels, search
from monoquant_int.plugin import IntOptions, W8A8Options
from monoquant_int.quantizer import WORTH_COMPILING, IntQuantizer, w8a8
from safetensors import safe_open
from safetensors.torch import save_file

from monoquant_core.encoding import INT4, INT8, Encoding, integer, per_group, per_row, per_tensor
from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor, same_bits

compiled = pytest.importorskip("monoquant_int.compiled")


def run(
    x: torch.Tensor,
    bits: int,
    options: IntOptions,
    searches: Any,
    *,
    size: int = 0,
    scale: str = "float32",
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    element = integer(bits, signed=options.symmetric)
    block = per_group(x.ndim, size) if size else per_row(x.ndim)
    encoding = Encoding(element, block, scale, zero_point=None if options.symmetric else element)
    spec = TensorSpec("w", tuple(x.shape), str(x.dtype).removeprefix("torch."))
    context = Context(spec, range(x.shape[:-1].numel()), Scratch(), None, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "searches_for", lambda spec, device: searches)
        return IntQuantizer(bits, options).quantize(x, encoding, context)


def assert_same(x: torch.Tensor, bits: int, options: IntOptions, **given: Any) -> None:
    first, second = (run(x, bits, options, searches, **given) for searches in (compiled, search))
    assert first.encoding == second.encoding
    assert torch.equal(first.codes, second.codes)
    for mine, other in ((first.scale, second.scale), (first.zero_point, second.zero_point)):
        assert (mine is None) == (other is None)
        if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
            assert same_bits(mine, other)


def heavy_tailed(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


KINDS = [
    IntOptions(rounding="search"),
    IntOptions(rounding="search", narrow_range=True),
    IntOptions(rounding="search", symmetric=False),
]
VALUES = st.floats(-4, 4, width=32) | st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 50.0, 2.0**-14, 3e-10])
#: by which blocks are multiplied: the extremes keep no scale from being held by float32
MAGNITUDES = st.sampled_from([1.0, 1.0, 0.0, 1e-45, 1e-41, 2.0**-126, 1e-30, 1e30, 1e36])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Rows of blocks of some size, as float32."""
    size, blocks, rows = draw(st.sampled_from([1, 3, 16, 24, 32, 70, 128])), draw(st.integers(1, 3)), 2
    x = draw(hnp.arrays(np.float32, (rows, blocks, size), elements=VALUES))
    by = draw(hnp.arrays(np.float32, (rows, blocks, 1), elements=MAGNITUDES))
    return torch.from_numpy((x * by).reshape(rows, -1)), size


@given(
    matrices(),
    st.integers(2, 8),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.none() | st.integers(0, 1 << 30),
)
@settings(deadline=None, max_examples=300)
def test_same_bits(
    matrix: tuple[torch.Tensor, int], bits: int, options: IntOptions, dtype: torch.dtype, seed: int | None
) -> None:
    x, size = matrix
    importance = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        importance = torch.rand(x.shape[1], generator=generator).pow(8) * torch.randint(0, 2, (x.shape[1],))
    assert_same(x.to(dtype), bits, options, size=size, importance=importance)


@pytest.mark.parametrize("options", KINDS, ids=["symmetric", "narrow", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_same_bits_of_weights(bits: int, options: IntOptions) -> None:
    """Groups, whole rows, halves and importance of what is like weights; scales of all dtypes."""
    x = heavy_tailed(6, 4096)
    importance = torch.rand(4096).pow(4)
    for size in (16, 32, 128, 0):
        for weights in (None, importance):
            assert_same(x, bits, options, size=size, importance=weights)
    for dtype in (torch.float16, torch.bfloat16):
        assert_same(x.to(dtype), bits, options, size=128)
    for scale in ("float16", "bfloat16"):
        assert_same(x, bits, options, size=128, scale=scale)
    assert_same(heavy_tailed(2, 70_001), bits, options)


def test_only_exact_sums_may_be_reordered() -> None:
    """No other operation has a flag that lets the compiler change a bit, and none is fused."""
    import numba

    assert_same(heavy_tailed(2, 256), 4, KINDS[0], size=128)  # so that there is a signature
    kernel = compiled._best_scales
    made = numba.jit(**kernel.targetoptions)(kernel.py_func)
    made.compile(next(iter(kernel.overloads)))
    (llvm,), (assembly,) = made.inspect_llvm().values(), made.inspect_asm().values()
    operations = {tuple(found.split()) for found in re.findall(r"= (f(?:add|sub|mul|div|neg) [a-z ]*)", llvm)}
    flagged = {(name, *flags) for name, *flags in operations if flags not in ([], ["float"], ["double"])}
    assert flagged <= {("fadd", "reassoc"), ("fadd", "reassoc", "double")}
    assert not re.findall(r"\bv?fn?m(?:add|sub|la|ls)\w*", assembly)


def test_same_bits_where_blocks_are_no_parts_of_rows() -> None:
    """A transposed layer, whose groups are columns, and stacked experts with an importance each."""
    for encoding, kind, x in (
        (Encoding(INT4, (32, 1), "float32"), "linear_transposed", heavy_tailed(128, 24)),
        (Encoding(INT4, (1, 1, 32), "float32"), "linear", heavy_tailed(3, 8, 64)),
    ):
        context = Context(TensorSpec("w", tuple(x.shape), "float32", kind=kind), range(x.shape[:-1].numel()), Scratch())
        context.importance = torch.rand(3, 64) if x.ndim == 3 else torch.rand(128)
        made = []
        for searches in (compiled, search):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "searches_for", lambda spec, device, which=searches: which)
                made.append(kernels.quantize(x, encoding, context, search=True).clone())
        assert made[0].equal(made[1])


def layers(folder: Path) -> Iterator[torch.Tensor]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.ndim == 2 and tensor.shape[1] % 128 == 0 and ".layer" in name:
                    yield tensor


@pytest.mark.parametrize("model", ["minilm", "tiny-llama"])
def test_same_bits_of_real_models(model: str, request: pytest.FixtureRequest) -> None:
    folder = (
        request.getfixturevalue("minilm")
        if model == "minilm"
        else request.getfixturevalue("shared") / "models" / "tiny-llama"
    )
    number = 0
    for number, x in enumerate(layers(folder), 1):  # noqa: B007
        importance = torch.linspace(0, 1, x.shape[1])
        assert_same(x, 4, KINDS[0], size=128)
        assert_same(x, 4, KINDS[2], size=32, importance=importance)
        assert_same(x, 8, KINDS[0], importance=importance)
        assert_same(x, 2, KINDS[0], size=64)
    assert number > 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_alike(value: float) -> None:
    x = heavy_tailed(4, 128)
    x[2, 7] = value
    for options in KINDS:
        said = []
        for searches in (compiled, search):
            with pytest.raises(QuantizationError, match=r"^w\[2, 7\]: (nan|inf) is not a finite number") as raised:
                run(x, 4, options, searches, size=32)
            said.append(str(raised.value))
        assert said[0] == said[1]


# When it runs -----------------------------------------------------------------------------------------------------

LARGE, SMALL = TensorSpec("w", (2048, 1024), "float32"), TensorSpec("w", (384, 1536), "float32")
CPU = torch.device("cpu")


def test_only_tensors_on_the_cpu() -> None:
    assert LARGE.numel == WORTH_COMPILING
    assert kernels.searches_for(LARGE, CPU) is compiled
    assert kernels.searches_for(LARGE, torch.device("cuda")) is search


def loaded(spec: TensorSpec, scheme: str) -> bool:
    """Whether a process that quantizes some rows of such a tensor loads numba."""
    code = f"""
import sys, torch
from monoquant_core.model import TensorSpec
from monoquant_core.options import build
from monoquant_core.plugins import load_registry
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
declared = load_registry().scheme({scheme!r})
quantizer = declared.load()(build(declared.options, {{}}, owner={scheme!r}))
spec = TensorSpec("w", {spec.shape}, "float32")
quantizer.quantize(torch.ones(2, {spec.shape[1]}), quantizer.propose(spec).encoding, Context(spec, range(2), Scratch()))
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_numba_is_loaded_for_searches_in_large_tensors() -> None:
    assert loaded(LARGE, "int4")
    assert not loaded(SMALL, "int4")
    assert not loaded(LARGE, "int8")


G128, ROWS = Encoding(INT4, (1, 128), "float32"), Encoding(INT8, per_row(2), "float32")


def test_its_memory_is_predicted_and_it_is_said() -> None:
    int4, int8 = IntQuantizer(4, IntOptions()), IntQuantizer(8, IntOptions())
    confined = Encoding(INT8, per_row(2), "float32", clip=(-63, 63))
    for quantizer, spec, encoding, expected in (
        (int4, LARGE, G128, True),
        (int4, SMALL, G128, False),
        (int4, LARGE, Encoding(INT4, per_tensor(2), "float32"), False),
        (int8, LARGE, ROWS, False),
        (IntQuantizer(8, IntOptions(rounding="search")), LARGE, ROWS, True),
        (w8a8(W8A8Options()), LARGE, confined, True),
    ):
        assert bool(quantizer.process_bytes(spec, encoding)) == expected
        assert bool(quantizer.notes([(SMALL, encoding), (spec, encoding)])) == expected


@pytest.mark.parametrize("found", [True, False])
def test_what_the_searches_run_with_is_said(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    quantizer = IntQuantizer(4, IntOptions())
    (note,) = quantizer.notes([(LARGE, G128)])
    assert ("run in numba" in note, "monoquant[fast]" in note) == (found, not found)
    assert bool(quantizer.process_bytes(LARGE, G128)) == found


def test_the_command_writes_the_same_without_numba_and_where_it_is_broken(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file({"model.layers.0.mlp.up_proj.weight": heavy_tailed(2048, 1024)}, model / "model.safetensors")
    absent, broken = tmp_path / "absent", tmp_path / "broken"
    (broken / "numba").mkdir(parents=True)
    (broken / "numba" / "__init__.py").write_text('raise ImportError("Numba needs another NumPy")\n')
    absent.mkdir()
    (absent / "sitecustomize.py").write_text('import sys\nsys.modules["numba"] = None\n')
    written = {}
    for name, first in (("numba", None), ("absent", absent), ("broken", broken)):
        path = os.pathsep.join(p for p in (str(first or ""), os.environ.get("PYTHONPATH", "")) if p)
        out = tmp_path / f"with-{name}"
        command = [sys.executable, "-m", "monoquant_core.cli", "quantize", str(model), "-o", str(out)]
        done = subprocess.run(
            [*command, "--scheme", "int4"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said = " ".join(done.stdout.split())
        assert ("integer scales run in torch: with numba" if name == "absent" else "scales run in numba") in said
        assert ("Numba needs another NumPy" in done.stderr) == (name == "broken")
        written[name] = {p.name: p.read_bytes() for p in out.iterdir()}
    assert written["numba"] == written["absent"] == written["broken"]

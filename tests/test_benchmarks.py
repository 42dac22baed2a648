"""The benchmark runs and writes its page. No timing is asserted: that is what the page is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import Timing, interleaved, run_child
from benchmarks.page import render
from benchmarks.results import Gate, Section, Table, number
from benchmarks.synthetic import Geometry, geometry, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ONNX = ("ONNX: a convolutional net", "ONNX: more than 2 GB")
GGUF = ("Types of GGUF", "From a checkpoint to Q4_K_M")


def test_quick_run_writes_every_table(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--temp", tmp_path, "--output", page]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    for title in ("Gates", "Kernels", "Error of the 4-bit search", "Pipeline", "Start-up", *GGUF, *ONNX):
        assert f"\n## {title}\n" in text
    for what in (
        "int8 per channel, f32: speed / memcpy",
        "int4 g128 nearest, packed, bf16: speed / compressed-tensors",
        "int4 g128 search, packed, f32: speed",
        "CPU beyond start-up / cp",
        "peak above start-up",
        "`monoquant plan`: wall time",
        "Q4_K, f32: speed / ggml's C",
        "all types: bytes that differ from C's",
        "Q4_K_M of a folder: CPU, start-up included / ggml's C alone",
        "Q4_K_M of a folder: peak above start-up",
        "ResNet-20 static: speed / quantize_static",
        "ONNX above 2 GB: peak above start-up",
    ):
        assert any(what in line and line.startswith("| ") for line in text.splitlines()), what
    assert "A quick run" in text
    assert list(tmp_path.iterdir()) == [page], "checkpoints are removed"


def test_a_missed_gate_says_so() -> None:
    gates = [
        Gate("fast", 2, "at least", "x", 2.5, 2.25),
        Gate("slow", 2, "at least", "x", 1.5, 1.25),
        Gate("lucky", 2, "at least", "x", 2.5, 1.75),
        Gate("small", 64, "at most", " MB", 63.2),
        Gate("large", 64, "at most", " MB", 65.0),
        Gate("absent", 64, "at most", " MB", None, reason="no such model"),
    ]
    page = render([Section("Some", "words", (Table(("a", "b"), [("x", "1")]),), gates)], "a machine")
    assert "| fast | ≥ 2.00x | 2.50x | 2.25x | pass |" in page
    assert "| slow | ≥ 2.00x | 1.50x | 1.25x | **miss** |" in page
    assert "| lucky | ≥ 2.00x | 2.50x | 1.75x | **miss** |" in page
    assert "| small | ≤ 64.0 MB | 63.2 MB |  | pass |" in page
    assert "| large | ≤ 64.0 MB | 65.0 MB |  | **miss** |" in page
    assert "| absent | ≤ 64.0 MB |  |  | not measured: no such model |" in page


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.354, "0.35"), (0.0123, "0.0123"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_contenders_take_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert all(isinstance(t, Timing) and len(t.seconds) == 2 for t in times.values())


def test_a_child_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="exit code 3\nthis went wrong"):
        run_child([sys.executable, "-c", "import sys; print('this went wrong', file=sys.stderr); sys.exit(3)"])


def test_synthetic_checkpoint_is_read_by_safetensors_and_repeats(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Geometry(hidden=64, ffn=96, layers=2)
    nbytes = write_checkpoint(tmp_path / "a", model)
    write_checkpoint(tmp_path / "b", model)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert nbytes == sum((tmp_path / "a" / name).stat().st_size for name in files)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    shapes = {
        name: tuple(t.shape) for name, t in load_file(tmp_path / "a" / "model-00001-of-00001.safetensors").items()
    }
    assert shapes == dict(model.shapes())


@pytest.mark.parametrize("gigabytes", [1.2, 8.0])
def test_sizes_are_what_they_are_called(gigabytes: float) -> None:
    elements = 0
    for _, shape in geometry(gigabytes).shapes():
        product = 1
        for extent in shape:
            product *= extent
        elements += product
    assert elements * 2e-9 == pytest.approx(gigabytes, rel=0.06)

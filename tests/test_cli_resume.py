"""Killed and run again, as a user does it: for each format the bytes and the report of a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from monoquant_core.journal import read_journal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

#: the command, on a disk that is slow to read: 20 ms for each piece of a tensor, and more once nine were read
SLOWLY = """
import itertools, sys, threading, time
from monoquant_core import checkpoints
checkpoints.SECONDS, checkpoints.SHARE = 0.05, 0.0
from monoquant_core.containers.reader import FileReader
read_into, pieces = FileReader.read_into, itertools.count(1)
def slowly(self, buffer, offset, what):
    if len(buffer) > 100000 and threading.current_thread() is not threading.main_thread():
        time.sleep(0.02 if next(pieces) <= 9 else 1.5)
    read_into(self, buffer, offset, what)
FileReader.read_into = slowly
from monoquant_core.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def save_folder(path: Path) -> Path:
    """A model folder of transformers with small layers."""
    generator = torch.Generator().manual_seed(0)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    names = [f"model.layers.{i}.{name}.weight" for i in range(6) for name in projections]
    tensors = {name: torch.randn(256, 256, generator=generator) for name in names}
    tensors |= {
        "model.embed_tokens.weight": torch.randn(600, 256, generator=generator),
        "model.norm.weight": torch.ones(256),
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "hidden_size": 256}
    (path / "config.json").write_text(json.dumps(config))
    return path


def save_graph(path: Path) -> Path:
    """A chain of products of matrices."""
    onnx = pytest.importorskip("onnx")
    rng = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(256, 256, generator=rng).numpy() for i in range(24)}
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(24)]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 256]) for name in ("x0", "x24")]
    arrays = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "chain", values[:1], values[1:], arrays)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


MEMORY = ("start", "earlier", "peak", "predicted")


def comparable(printed: str) -> Any:
    """A report without what depends on the time and the place of a run."""
    report = json.loads(printed)
    reports = report.get("outputs", [report])
    for one in reports:
        for name in ("destination", "resumed", "seconds", *(f"{what}_bytes" for what in MEMORY)):
            del one[name]
    return reports


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def ended(command: list[str], number: int, journal: Path, folder: Path, status: int) -> str:
    """What a run says on stderr that a signal ends soon after the journal has become longer."""
    before, chance = max(1, lines(journal)), random.Random(f"{number} {journal.name}")
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder)
    signal.signal(signal.SIGINT, ignored)
    deadline = time.monotonic() + 60
    while lines(journal) <= before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(chance.random() * 0.1)
    process.send_signal(number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == status, said
    assert time.monotonic() - sent < 5  # the promise itself, not a speed
    return said


CASES: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "folder of shards and a file in one pass": (
        save_folder,
        [
            *("-o", "out", "--scheme", "int4", "--max-shard-size", "500kB"),
            *("--also", "Q4_0:format=gguf,architecture=generic,tokenizer=none=out.gguf"),
        ],
        "out",
    ),
    "graph with its data beside it": (
        save_graph,
        ["-o", "out.onnx", "--scheme", "int4", "--max-inline", "0"],
        "out.onnx",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_run_that_was_killed_twice_ends_as_one_that_was_not(tmp_path: Path, run: Run, what: str) -> None:
    make, arguments, first = CASES[what]
    place, whole = tmp_path / "place", tmp_path / "whole"
    source = make(tmp_path / ("model.onnx" if make is save_graph else "model"))
    for folder in (place, whole):
        folder.mkdir()
    known = run("quantize", source, *arguments, "--json", cwd=whole)
    assert known.returncode == 0, known.stderr
    command = [sys.executable, "-c", SLOWLY, "quantize", str(source), *arguments, "--threads", "2", "--json"]
    journal = place / f".{first}.journal"
    said = ended(command, signal.SIGKILL, journal, place, -signal.SIGKILL)
    assert "resuming" not in said
    assert all(name.startswith(".") for name in os.listdir(place))  # no output has its name
    recorded = read_journal(journal)
    assert recorded is not None
    said = ended(command, signal.SIGTERM, journal, place, 143)
    assert said.startswith("resuming: "), said
    assert said.splitlines()[0].endswith(" % was done by a run that was interrupted")
    later = read_journal(journal)
    assert later is not None
    assert recorded.done["write"].items() < later.done["write"].items()
    done = run("quantize", source, *arguments, "--threads", "1", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("resuming: ")
    report = json.loads(done.stdout)
    share = report.get("outputs", [report])[0]["resumed"]
    assert 0 < share < 1
    assert done.stderr.splitlines()[0] == f"resuming: {int(100 * share)} % was done by a run that was interrupted"
    assert content(place) == content(whole)  # nothing hidden is left, too
    ours, theirs = comparable(done.stdout), comparable(known.stdout)
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("threads") == 1
        other.pop("threads")
    assert ours == theirs


def test_another_command_and_fresh_begin_anew(tmp_path: Path, run: Run) -> None:
    source = save_folder(tmp_path / "model")
    place = tmp_path / "place"
    place.mkdir()
    journal = place / ".out.journal"
    command = [sys.executable, "-c", SLOWLY, "quantize", str(source), "-o", "out", "--scheme", "int8", "--threads", "2"]
    ended(command, signal.SIGINT, journal, place, 130)
    done = run("quantize", source, "-o", "out", "--scheme", "int8", "--fresh", "--json", cwd=place)
    assert (done.returncode, "resuming" in done.stderr, json.loads(done.stdout)["resumed"]) == (0, False, 0.0)
    assert not journal.exists()
    (place / "out").rename(place / "known")
    ended(command, signal.SIGINT, journal, place, 130)
    done = run("quantize", source, "-o", "out", "--scheme", "int4", "--json", cwd=place)
    note = (
        "out: an interrupted run cannot be resumed: it wrote something else: another scheme, format, rule or option; "
        "starting anew"
    )
    assert note in done.stderr.splitlines()
    assert note in json.loads(done.stdout)["notes"]
    assert sorted(os.listdir(place)) == ["known", "out"]

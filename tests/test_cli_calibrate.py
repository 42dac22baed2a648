"""``calibrate``, ``--data``, ``--stats`` and ``pkg.mod:factory`` as a user types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from monoquant_core.cli import main

CODE = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 5))

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        colour = torch.rand(16, 3, 1, 1, generator=generator) * 4 - 2
        yield colour + torch.rand(16, 3, 6, 6, generator=generator) - 0.5

def halved(x):
    return x / 2

def number():
    return 3

def fails():
    raise RuntimeError("no such dataset")
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "userscode.py").write_text(CODE)
    return tmp_path / "work"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def do(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run in that folder, with a cache of its own; in this process: a new one would import torch most of the time."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("MONOQUANT_CACHE", str(work.parent / "cache"))
    monkeypatch.delitem(sys.modules, "userscode", raising=False)

    def call(*args: object) -> Done:
        capsys.readouterr()
        status = main([*map(str, args)])
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    return call


@pytest.fixture
def alone(run: Callable[..., Done], work: Path) -> Callable[..., Done]:
    """The same in a process of its own."""
    env = {"MONOQUANT_CACHE": str(work.parent / "cache"), "PYTHONSAFEPATH": "1"}
    return lambda *args: run(*args, cwd=work, env=env)


def test_calibrate_then_plan_and_quantize(do: Callable[..., Done], alone: Callable[..., Done], work: Path) -> None:
    command = ("calibrate", "userscode:net", "--data", "userscode:batches", "--samples", 128, "-o", "s.safetensors")
    first = do(*command)
    assert first.returncode == 0
    assert "warning" not in first.stderr
    assert "points      4" in first.stdout
    content = (work / "s.safetensors").read_bytes()
    again = do(*command)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert (work / "s.safetensors").read_bytes() == content

    other = do(*command, "--calibrator", "percentile:percentile=99")
    assert other.returncode == 2
    assert "s.safetensors: already exists, of calibrator 'mse'" in other.stderr
    assert "--force replaces it" in other.stderr
    forced = do(*command, "--calibrator", "minmax", "--force")
    assert forced.returncode == 0
    assert (work / "s.safetensors").read_bytes() != content

    made = alone("quantize", "userscode:net", "--stats", "s.safetensors", "-o", "out", "--set", "*.weight=w8a8")
    assert made.returncode == 0, made.stderr
    with (work / "out" / "monoquant.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    about = json.loads(header["__metadata__"]["monoquant"])
    assert about["tensors"]["0.weight"]["activation"]["dynamic"] is False

    torch.save(torch.nn.Linear(4, 4).state_dict(), work / "other.pt")
    stale = do("quantize", "other.pt", "--stats", "s.safetensors", "-o", "out2")
    assert stale.returncode == 2
    assert "s.safetensors: of another model than other.pt" in stale.stderr
    assert not (work / "out2").exists()

    damaged = bytearray((work / "s.safetensors").read_bytes())
    damaged[-1] ^= 1
    (work / "s.safetensors").write_bytes(damaged)
    for command in (
        ("quantize", "userscode:net", "--stats", "s.safetensors", "-o", "out2"),
        ("calibrate", "userscode:net", "--data", "userscode:batches", "-o", "s.safetensors"),
    ):
        refused = do(*command)
        assert refused.returncode == 2
        assert "s.safetensors: damaged: its checksum is another" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_quantize_with_data(do: Callable[..., Done], work: Path) -> None:
    command = ("quantize", "userscode:net", "--scheme", "w8a8", "--set", "*.weight=w8a8:activations=static")
    refused = do(*command, "-o", "out")
    assert refused.returncode == 2
    assert "w8a8 activations=static needs calibration statistics of what goes into 0.weight" in refused.stderr
    made = do(*command, "--data", "userscode:batches", "--samples", 16, "-o", "out")
    assert made.returncode == 0, made.stderr
    assert "warning: 16 samples: ranges rest on few values" in made.stderr
    (cached,) = (work.parent / "cache" / "statistics").iterdir()
    again = do(*command, "--data", "userscode:batches", "--samples", 16, "-o", "out3")
    assert f"note: statistics are those of {cached}" in again.stderr
    files = [work / out / "monoquant.safetensors" for out in ("out", "out3")]
    assert files[0].read_bytes() == files[1].read_bytes()
    cached.write_bytes(b"\0" * 64)
    anew = do(*command, "--data", "userscode:batches", "--samples", 16, "-o", "out4", "--quiet")
    assert anew.returncode == 0
    assert "warning: 16 samples" in anew.stderr  # quiet or not

    kept = do(*command, "--data", "userscode:batches", "--stats", "mine.safetensors", "-o", "out5")
    assert kept.returncode == 0
    assert (work / "mine.safetensors").exists()


def test_data_makes_the_graph_and_its_ranges(do: Callable[..., Done], work: Path) -> None:
    """From code to a static model in onnxruntime, in one command: the first batch traces, all of them calibrate."""
    ort = pytest.importorskip("onnxruntime")
    made = do(
        *("quantize", "userscode:net", "--data", "userscode:batches", "--scheme", "w8a8", "--set", "*.weight=w8a8"),
        *("-o", "net.onnx"),
    )
    assert made.returncode == 0, made.stderr
    assert "needs calibration" not in made.stderr
    from userscode import batches, net  # type: ignore[import-not-found]

    session = ort.InferenceSession(work / "net.onnx")
    x = next(iter(batches()))
    with torch.no_grad():
        expected = net().eval()(x)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = (torch.from_numpy(found) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    import onnx

    operators = {node.op_type for node in onnx.load(work / "net.onnx").graph.node}
    assert "QuantizeLinear" in operators
    assert "DynamicQuantizeLinear" not in operators


def test_weights_for_a_factory(alone: Callable[..., Done], work: Path) -> None:
    torch.manual_seed(3)
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 5))
    torch.save(other.state_dict(), work / "w.pt")
    made = alone("quantize", "userscode:net", "--weights", "w.pt", "--scheme", "float16", "-o", "out")
    assert made.returncode == 0, made.stderr
    from safetensors.torch import load_file

    assert torch.equal(load_file(work / "out" / "model.safetensors")["0.weight"], other[0].weight.half())


def test_a_factory_is_a_model_for_export_and_plan(do: Callable[..., Done], work: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), work / "w.pt")
    done = do("export", "userscode:net", "--format", "safetensors", "--data", "userscode:batches", "-o", "out")
    assert done.returncode == 0, done.stderr
    planned = do("plan", "userscode:net", "--scheme", "int8", "--json")
    assert {t["name"] for t in json.loads(planned.stdout)["tensors"]} == {"0.weight", "0.bias", "3.weight", "3.bias"}
    refused = do("export", "userscode:net", "--weights", "w.pt", "--format", "safetensors", "-o", "out2")
    assert refused.returncode == 2
    assert "w.pt: does not fit Sequential: it lacks 0.bias, 0.weight, 3.bias and 1 more" in refused.stderr


REFUSED = {
    "no module": (("nowhere:net",), "nowhere:net: there is no module 'nowhere'"),
    "no name": (("userscode:nothing",), "userscode:nothing: userscode has no 'nothing'"),
    "no module made": (("userscode:number",), "userscode:number: makes a int, and an nn.Module is wanted"),
    "it fails": (("userscode:fails",), "userscode:fails: it failed: RuntimeError: no such dataset"),
    "weights of nothing": (("w.pt", "--weights", "w.pt"), "w.pt: weights belong to a module"),
    "weights that do not fit": (("userscode:net", "--weights", "w.pt"), "does not fit Sequential: it lacks 0.bias"),
    "no data": (("userscode:net", "--data", "none.npz"), "'none.npz': no such file or folder"),
    "a calibrator": (("userscode:net", "--data", "x.npz", "--calibrator", "maxmin"), "no calibrator 'maxmin'"),
    "its option": (
        ("userscode:net", "--data", "x.npz", "--calibrator", "percentile:percent=3"),
        "--calibrator percentile has no option 'percent'",
    ),
    "its value": (
        ("userscode:net", "--data", "x.npz", "--calibrator", "percentile:percentile=3"),
        "percentile is at least 50, got 3.0",
    ),
    "nothing to run": (("w.pt", "--data", "x.npz"), "w.pt: has tensors and nothing that says how to run them"),
    "shapes": (("userscode:net", "--data", "x.npz"), "x.npz: userscode:net: it fails on a batch of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case: str, do: Callable[..., Done], work: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 4)}, work / "w.pt")
    np.savez(work / "x.npz", input=np.ones((4, 2), np.float32))
    args, message = REFUSED[case]
    with_data = args if "--data" in args else (*args, "--data", "userscode:batches")
    found = do("calibrate", *with_data, "-o", "s.safetensors")
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    assert not (work / "s.safetensors").exists()


def test_nothing_is_imported_from_a_model_folder(alone: Callable[..., Done], work: Path) -> None:
    """Not even when its config asks for it, or the command runs inside of it."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(4, 4)}, work / "model.safetensors")
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (work / "config.json").write_text(json.dumps(config))
    for name in ("modeling_evil", "tokenizers", "sitecustomize", "torch"):
        (work / f"{name}.py").write_text("open('ran', 'w')")
    np.savez(work / "x.npz", x=np.ones((4, 4), np.float32))
    found = alone("calibrate", work, "--data", "x.npz", "-o", work.parent / "s.safetensors")
    assert found.returncode == 2
    assert "config.json names 'Evil', which transformers" in found.stderr
    assert not (work / "ran").exists()


def test_json_and_the_catalog(do: Callable[..., Done], work: Path) -> None:
    found = do(
        *("calibrate", "userscode:net", "--data", "userscode:batches", "--preprocess", "userscode:halved"),
        *("--samples", 4, "-o", "s.safetensors", "--json"),
    )
    assert found.returncode == 0
    about = json.loads(found.stdout)
    assert about["samples"] == 4
    assert about["warnings"][0]["kind"] == "few"
    assert about["points"]["0:input"]["minimum"] < 0
    assert "warning: 4 samples" in found.stderr
    listed = json.loads(do("calibrators", "list", "--json").stdout)
    assert {"minmax", "percentile"} <= {entry["name"] for entry in listed}

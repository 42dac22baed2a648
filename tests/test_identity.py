"""What tells a run from another: everything that can change a byte, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import monoquant_core as mq
from monoquant_core import identity
from monoquant_core.identity import NotResumable, difference, run_key
from monoquant_core.sources import open_source
from monoquant_core.stats import TensorStats
from monoquant_core.tasks import schedule

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64}
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def make_model(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {WEIGHT: torch.randn(128, 64, generator=generator), "model.norm.weight": torch.ones(64)}
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.randn(64, 128, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def key(
    path: Any,
    scheme: str = "int8",
    format: str = "safetensors",
    *,
    destination: str = "out",
    format_options: dict[str, Any] | None = None,
    chunk: int = 1 << 19,
    nonfinite: str = "refuse",
    **how: Any,
) -> dict[str, str]:
    """Of the run that ``mq.quantize(path, ...).save(...)`` would be."""
    with mq.quantize(path, scheme=scheme, **how) as model:
        plan = model.plan(format, format_options=format_options, destination=destination)
        source = model._source_for(format, format_options)
        tasks = schedule(plan.steps, chunk)
        return run_key([plan], source, model._stats, tasks, device=torch.device("cpu"), nonfinite=nonfinite)


def statistics(low: float) -> dict[str, TensorStats]:
    ends = {"minimum": torch.tensor(-2.0), "maximum": torch.tensor(2.0), "high": torch.tensor(1.0)}
    return {"model.layers.0.mlp.up_proj:input": TensorStats(8, **ends, low=torch.tensor(low))}


def rewritten(path: Path) -> Path:
    """Other weights, with the same size and times."""
    file = path / "model.safetensors"
    status = file.stat()
    make_model(path.parent / "other", seed=1)
    shutil.copyfile(path.parent / "other" / "model.safetensors", file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    return path


def touched(path: Path) -> Path:
    os.utime(path / "model.safetensors", ns=(1, 1))
    return path


def configured(path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 2.0}))
    return path


OTHERS: dict[str, tuple[Callable[[Path], dict[str, str]], str]] = {
    "another scheme": (lambda path: key(path, "int4", options={"group_size": 32}), "plan"),
    "another option": (lambda path: key(path, options={"symmetric": False}, format_options=GENERIC), "plan"),
    "a rule": (lambda path: key(path, keep=["*up_proj*"]), "plan"),
    "another format": (lambda path: key(path, format="gguf", format_options={"architecture": "generic"}), "plan"),
    "an option of the format": (lambda path: key(path, format_options={"max_shard_size": "9kB"}), "plan"),
    "the same bytes in other tasks": (lambda path: key(path, chunk=1024), "tasks"),
    "NaN allowed": (lambda path: key(path, nonfinite="allow"), "nonfinite"),
    "statistics": (lambda path: key(path, stats=statistics(-1.0)), "statistics"),
    "other times": (lambda path: key(touched(path)), "source"),
    "other weights": (lambda path: key(rewritten(path)), "source"),
    "another configuration": (lambda path: key(configured(path)), "plan"),
}
GENERIC = {"convention": "generic"}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_changes_bytes_tells_runs_apart(model: Path, what: str) -> None:
    other, label = OTHERS[what]
    ours, theirs = key(model), other(model)
    assert label in [name for name in ours if ours[name] != theirs[name]]
    assert identity.DIFFERENCES[label] in difference(ours, theirs)


def test_statistics_of_other_values_tell_runs_apart(model: Path) -> None:
    ours, theirs = (key(model, "w8a8", stats=statistics(low)) for low in (-1.0, -1.25))
    assert difference(ours, theirs).endswith("its statistics were others")


def test_the_same_run_is_the_same(model: Path, tmp_path: Path) -> None:
    """Also when the model and the output were moved, and in another process, where hashes of texts are others."""
    first = key(model)
    assert difference(first, key(model)) == ""
    moved = tmp_path / "elsewhere" / "under another name"
    moved.parent.mkdir()
    model.rename(moved)
    code = f"from test_identity import *; print(json.dumps(key({str(moved)!r})))"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == first


def test_versions_tell_runs_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key(model)
    for package in ("monoquant-int", "monoquant_safetensors"):
        assert package.replace("-", "_") in first["versions"]
    monkeypatch.setattr(identity, "__version__", "9.9.9")
    text = "the versions of monoquant, its plugins or torch were others"
    assert difference(first, key(model)) == text
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert difference(first, key(model)) == "it ran on another kind of processor or device"


def test_an_importance_matrix_tells_runs_apart(model: Path, tmp_path: Path) -> None:
    """It is read when tensors are, by a path that stays the same."""
    path = tmp_path / "imatrix.dat"

    def write(value: float) -> None:
        name = b"blk.0.ffn_up.weight"
        data = np.full(64, value, np.float32).tobytes()
        head = np.array([1, len(name)], np.int32).tobytes() + name + np.array([1, 64], np.int32).tobytes()
        path.write_bytes(head + data)

    found = []
    for value in (1.0, 2.0, 1.0):
        write(value)
        options = {"imatrix": str(path)}
        found.append(key(model, "Q8_0", "gguf", options=options, format_options={"architecture": "generic"}))
    assert difference(found[0], found[1]) == identity.DIFFERENCES["plan"]
    assert difference(found[0], found[2]) == ""


def test_tensors_in_memory_cannot_be_told_from_others() -> None:
    with pytest.raises(NotResumable, match="Linear: its tensors are not those of files"):
        key(torch.nn.Linear(64, 64))


def test_checkpoints_of_torch_can(tmp_path: Path) -> None:
    """Also those of the old form, which are read whole; not a module that a pickle made."""
    state = {"layer.weight": torch.randn(64, 64)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(64, 64), tmp_path / "module.pt")
    for name in ("new.pt", "old.pt"):
        assert key(tmp_path / name, format_options=GENERIC)["source"]
    source = open_source(tmp_path / "module.pt", unsafe_pickle=True)
    with pytest.raises(NotResumable, match="does not say what its result depends on"):
        identity._fingerprint(source, source.info.name)


@pytest.mark.parametrize("name", ["source", "plan"])
def test_a_file_that_has_gone_is_an_error_that_names_it(model: Path, name: str) -> None:
    with mq.quantize(model) as opened:
        plan = opened.plan("safetensors", destination="out")
        (model / "model.safetensors").unlink()
        with pytest.raises(mq.MonoquantError, match=r"model\.safetensors: cannot be read: No such file"):
            run_key([plan], opened.source, None, [], device=torch.device("cpu"), nonfinite="refuse")


def plus(number: float) -> Callable[[float], float]:
    return lambda value: value + number


def test_digests_tell_values_apart() -> None:
    values = [
        *(None, True, 1, 1.0, "1", b"1", 0.0, -0.0, "", (), [[]], {}, set()),
        *(["ab", "c"], ["a", "bc"], [["a"], "b"], {"a": 1}, {"a": "1"}, {1: "a"}, {"a", "b"}),
        *(plus, plus(1.0), plus(2.0), functools.partial(plus, 1.0), functools.partial(plus, number=1.0)),
        *(torch.tensor([1.0]), torch.tensor([[1.0]]), torch.tensor([1], dtype=torch.int32), torch.tensor(1.0)),
    ]
    digests = [identity._digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert identity._digest({"a": 1, "b": 2}) == identity._digest({"b": 2, "a": 1})
    assert identity._digest(plus(1.0)) == identity._digest(plus(1.0))


def test_digests_of_what_is_not_known() -> None:
    with pytest.raises(NotResumable, match="nothing tells a object in the plan from another"):
        identity._digest([object()])

    def again(depth: int) -> object:  # it holds itself
        return again(depth - 1) if depth else object

    holding = functools.partial(plus, object())  # what it holds is not known, and its name is all that counts
    assert identity._digest(again) == identity._digest(again)
    assert identity._digest(holding) == identity._digest(functools.partial(plus, object()))

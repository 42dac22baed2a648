"""The distributions: versions in lock-step, what wheels and sdists contain, and that they work installed alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import monoquant_core

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = sorted(p.parent.name for p in ROOT.glob("plugins/*/pyproject.toml"))


def pyproject(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def bump() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bump", ROOT / "tools" / "bump.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what the projects say ---


def test_versions_are_in_lock_step(bump: ModuleType) -> None:
    version = monoquant_core.__version__
    changed = [path.name for path, text in bump.bumped(ROOT, version) if text != path.read_text()]
    assert changed == []
    assert {pyproject(ROOT / "plugins" / p)["project"]["version"] for p in PLUGINS} == {version}
    assert re.search(rf"(?m)^## \[(Unreleased|{re.escape(version)})\]", (ROOT / "CHANGELOG.md").read_text())


def test_bump_rewrites_every_version_and_pin(bump: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    for path in (*bump.pyprojects(ROOT), ROOT / "monoquant_core" / "__init__.py"):
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for path, text in bump.bumped(root, "3.4.5"):
        path.write_text(text)
    assert pyproject(root)["project"]["version"] == "3.4.5"
    pins = [r for extra in pyproject(root)["project"]["optional-dependencies"].values() for r in extra]
    own = sorted(re.sub(r"\[.*?\]", "", r) for r in pins if r.startswith("monoquant-"))
    again = [f"{p}==3.4.5" for p in ("monoquant-gguf", "monoquant-int")]  # with their own extras
    assert own == sorted([*(f"{p}==3.4.5" for p in PLUGINS), *again])
    for plugin in PLUGINS:
        project = pyproject(root / "plugins" / plugin)["project"]
        core, *others = project["dependencies"]
        assert (project["version"], core) == ("3.4.5", "monoquant>=3.4.5,<4")
        assert not [r for r in others if r.startswith("monoquant")], "plugins do not need one another"
    assert '__version__ = "3.4.5"' in (root / "monoquant_core" / "__init__.py").read_text()
    assert monoquant_core.__version__ not in "".join(p.read_text() for p in bump.pyprojects(root))


@pytest.mark.parametrize("version", ["1.2", "v1.2.3", "1.2.3.dev0", ""])
def test_bump_refuses_other_versions(bump: ModuleType, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bump.main([version]) == 2
    assert "usage" in capsys.readouterr().err


def test_extras_name_real_plugins_and_every_plugin_has_an_extra() -> None:
    extras = pyproject(ROOT)["project"]["optional-dependencies"]
    named = {re.split(r"[=<>]", r)[0] for extra in extras.values() for r in extra}
    inner = {r for r in named if r.startswith("monoquant[")}
    assert {name for r in inner for name in r[len("monoquant[") : -1].split(",")} <= set(extras)
    outer = {r.partition("[") for r in named - inner}
    assert {name for name, _, _ in outer} == set(PLUGINS)
    for name, _, wanted in outer:
        if wanted:
            assert wanted.removesuffix("]") in pyproject(ROOT / "plugins" / name)["project"]["optional-dependencies"]


def test_requirements_install_every_project_in_one_call() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    editable = sorted(line.removeprefix("-e ") for line in lines if line.startswith("-e "))
    assert editable[0] == ".[all]"
    assert [re.sub(r"\[.*\]$", "", line) for line in editable[1:]] == [f"plugins/{p}" for p in PLUGINS]
    assert "-c constraints.txt" in lines
    assert re.search(r"(?m)^torch==[\d.]+$", (ROOT / "constraints.txt").read_text())


def test_continuous_integration_runs_what_developers_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_is_packaged_like_the_others(plugin: str) -> None:
    folder = ROOT / "plugins" / plugin
    package = plugin.replace("-", "_")
    project = pyproject(folder)["project"]
    assert project["name"] == plugin
    assert project["entry-points"]["monoquant"] == {plugin.removeprefix("monoquant-"): f"{package}.plugin"}
    assert project["requires-python"] == pyproject(ROOT)["project"]["requires-python"]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (folder / "README.md").read_text().startswith(f"# {plugin}\n")
    assert (folder / "src" / package / "py.typed").exists()


def test_mypy_checks_every_package() -> None:
    files = pyproject(ROOT)["tool"]["mypy"]["files"]
    assert {"monoquant_core", *(f"plugins/{p}/src" for p in PLUGINS)} <= set(files)


# --- what is built ---


@dataclass(frozen=True)
class Dists:
    """All distributions, built as ``make dist`` does."""

    folder: Path

    def wheel(self, name: str) -> Path:
        (found,) = self.folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
        return found

    def sdist(self, name: str) -> Path:
        (found,) = self.folder.glob(f"{name.replace('-', '_')}-[0-9]*.tar.gz")
        return found


@pytest.fixture(scope="session")
def dists(tmp_path_factory: pytest.TempPathFactory) -> Dists:
    folder = tmp_path_factory.mktemp("dist")
    for project in (ROOT, *(ROOT / "plugins" / p for p in PLUGINS)):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project)
    return Dists(folder)


def run(*command: str | Path, cwd: Path | None = None, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose environment knows nothing of this checkout's."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")} | env
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=clean, check=False)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.parametrize("name", ["monoquant", *PLUGINS])
def test_wheels_hold_one_typed_package_and_the_license(dists: Dists, name: str) -> None:
    package = "monoquant_core" if name == "monoquant" else name.replace("-", "_")
    with zipfile.ZipFile(dists.wheel(name)) as wheel:
        names = wheel.namelist()
        (metadata_name,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(metadata_name).decode())
    info = metadata_name.partition("/")[0]
    assert {n.partition("/")[0] for n in names} == {package, info}
    assert f"{package}/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert not [n for n in names if "/tests/" in n or n.endswith(".pyc")]
    assert metadata["Version"] == monoquant_core.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert str(metadata.get_payload()).strip().startswith("#"), "the README is the description"


@pytest.mark.parametrize("name", ["monoquant", *PLUGINS])
def test_sdists_hold_their_own_project_only(dists: Dists, name: str) -> None:
    with tarfile.open(dists.sdist(name)) as sdist:
        names = [n.partition("/")[2] for n in sdist.getnames()]
    tops = {n.partition("/")[0] for n in names}
    own = {"monoquant_core", "CHANGELOG.md"} if name == "monoquant" else {"src", "tests"}
    always = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}
    assert tops <= own | always
    assert {"pyproject.toml", "README.md", "LICENSE"} <= tops
    assert not [n for n in names if "plugins/" in n or "__pycache__" in n]


# --- what is installed ---


@dataclass(frozen=True)
class Venv:
    """An environment with nothing of this checkout in it."""

    folder: Path

    def bin(self, name: str) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / name

    def pip(self, *arguments: str | Path) -> None:
        run(self.bin("python"), "-m", "pip", "--disable-pip-version-check", "-q", *arguments)

    def monoquant(self, *arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        return run(self.bin("monoquant"), *arguments, cwd=self.folder, status=status, NO_COLOR="1", COLUMNS="120")

    def files(self) -> str:
        code = "import monoquant_core; print(monoquant_core.__file__)"
        return run(self.bin("python"), "-c", code, cwd=self.folder).stdout.strip()


def fresh_venv(folder: Path, dists: Dists, requirement: str) -> Venv:
    if os.environ.get("MONOQUANT_OFFLINE"):
        pytest.skip("MONOQUANT_OFFLINE is set, and pip would fetch the dependencies")
    run(sys.executable, "-m", "venv", folder)
    venv = Venv(folder)
    venv.pip("install", "--find-links", dists.folder, "-c", ROOT / "constraints.txt", requirement)
    return venv


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, dists: Dists) -> Venv:
    """The core without plugins."""
    return fresh_venv(tmp_path_factory.mktemp("bare") / "venv", dists, str(dists.wheel("monoquant")))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model folder of a kind that transformers knows."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        "model.embed_tokens.weight": torch.randn(32, 64, generator=generator),
        "model.layers.0.mlp.down_proj.weight": torch.randn(64, 128, generator=generator),
        "model.norm.weight": torch.ones(64),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def test_without_plugins_every_command_starts(bare: Venv) -> None:
    assert "site-packages" in bare.files()
    assert bare.monoquant("--version").stdout == f"monoquant {monoquant_core.__version__}\n"
    listed = set(re.findall(r"(?m)^[│ ]+([a-z]+) ", bare.monoquant("--help").stdout))
    assert {"quantize", "export", "plan", "inspect", "compare", "schemes", "plugins", "doctor"} <= listed
    for command in sorted(
        listed & {"quantize", "export", "plan", "inspect", "compare", "schemes", "plugins", "doctor"}
    ):
        bare.monoquant(command, "--help")
    for arguments in (("plugins", "list"), ("schemes", "list"), ("formats", "list"), ("doctor",)):
        assert "monoquant[standard]" in bare.monoquant(*arguments).stdout, arguments


def test_without_plugins_work_is_refused_with_what_to_install(bare: Venv, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (
        ("quantize", checkpoint, "-o", out, "--scheme", "int8"),
        ("export", checkpoint, "-o", out, "--format", "safetensors"),
        ("plan", checkpoint, "--scheme", "int8"),
    ):
        refused = bare.monoquant(*arguments, status=2).stderr
        assert re.search(
            r"error: no (scheme 'int8'|format 'safetensors'); installed: none\nhint: .*monoquant\[", refused
        )
        assert "Traceback" not in refused
    assert not out.exists()


def test_without_plugins_checkpoints_can_be_inspected_and_compared(bare: Venv, checkpoint: Path) -> None:
    assert "model.layers.0.mlp.down_proj.weight" in bare.monoquant("inspect", checkpoint).stdout
    assert "exact" in bare.monoquant("compare", checkpoint, checkpoint).stdout


@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_plugin_works_alone_with_the_core(bare: Venv, dists: Dists, plugin: str) -> None:
    bare.pip("install", "--no-deps", "--no-index", dists.wheel(plugin))
    try:
        found = json.loads(bare.monoquant("plugins", "list", "--json").stdout)
        assert [p["distribution"] for p in found["plugins"]] == [plugin]
        assert found["left_out"] == []
        assert found["plugins"][0]["provides"]
        bare.monoquant("doctor", "--json")
    finally:
        bare.pip("uninstall", "-y", plugin)


def test_the_safetensors_extra_quantizes_a_checkpoint(dists: Dists, checkpoint: Path, tmp_path: Path) -> None:
    venv = fresh_venv(tmp_path / "venv", dists, f"{dists.wheel('monoquant')}[safetensors]")
    assert "site-packages" in venv.files()
    out = tmp_path / "out"
    report = json.loads(venv.monoquant("quantize", checkpoint, "-o", out, "--scheme", "int8", "--json").stdout)
    assert report["destination"] == str(out)
    written = load_file(out / "model.safetensors")
    assert written["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.int32
    code = f"""
import monoquant_core as mq
from safetensors.torch import load_file
import torch
before = load_file({str(checkpoint / "model.safetensors")!r})
with mq.load({str(out)!r}) as model:
    after = model.state_dict()
assert after.keys() == before.keys()
assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
weight, name = before["model.layers.0.mlp.down_proj.weight"], "model.layers.0.mlp.down_proj.weight"
step = weight.abs().amax(1, keepdim=True) / 127
assert ((after[name] - weight).abs() <= step * 0.5001).all() and not torch.equal(after[name], weight)
"""
    run(venv.bin("python"), "-c", code, cwd=tmp_path)


def test_the_gguf_extra_writes_a_file_that_the_gguf_package_reads(
    dists: Dists, checkpoint: Path, tmp_path: Path
) -> None:
    venv = fresh_venv(tmp_path / "venv", dists, f"{dists.wheel('monoquant')}[gguf]")
    assert "site-packages" in venv.files()
    config = {
        **{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128},
        **{"num_attention_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    options = ("--format", "gguf", "--scheme", "Q8_0", "--tokenizer", "none", "--json")
    report = json.loads(venv.monoquant("quantize", checkpoint, "-o", out, *options).stdout)
    assert report["bytes"] == out.stat().st_size
    code = f"""
import importlib.util
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file
assert importlib.util.find_spec("numba") is None, "only fast and gguf-fast bring it"
before = load_file({str(checkpoint / "model.safetensors")!r})
reader = GGUFReader({str(out)!r})
assert reader.fields["general.architecture"].contents() == "llama"
assert reader.fields["llama.embedding_length"].contents() == 64
after = {{t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}}
assert set(after) == {{"token_embd.weight", "blk.0.ffn_down.weight", "output_norm.weight"}}
weight = before["model.layers.0.mlp.down_proj.weight"]
step = np.abs(weight).reshape(-1, 32).max(1, keepdims=True) / 127
error = np.abs(after["blk.0.ffn_down.weight"] - weight).reshape(-1, 32)
assert (error <= step * 0.6).all() and error.any()
assert np.array_equal(after["output_norm.weight"], before["model.norm.weight"])
"""
    run(venv.bin("python"), "-c", code, cwd=tmp_path)


def test_the_onnx_extra_writes_a_file_that_onnxruntime_runs(dists: Dists, tmp_path: Path) -> None:
    venv = fresh_venv(tmp_path / "venv", dists, f"{dists.wheel('monoquant')}[onnx]")
    assert "site-packages" in venv.files()
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    code = f"""
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
    [numpy_helper.from_array(weight, "layer.weight")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), {str(source)!r})
"""
    run(venv.bin("python"), "-c", code, cwd=tmp_path)
    report = json.loads(venv.monoquant("quantize", source, "-o", out, "--scheme", "w8a8", "--json").stdout)
    assert report["bytes"] == out.stat().st_size
    code = f"""
import numpy as np, onnxruntime as ort
x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
before, after = (ort.InferenceSession(path).run(None, {{"x": x}})[0] for path in ({str(source)!r}, {str(out)!r}))
cosine = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
assert 0.999 < cosine < 1 - 1e-9, cosine
"""
    run(venv.bin("python"), "-c", code, cwd=tmp_path)

"""A plugin written outside the repository: one file, installed by pip, and nothing in the core knows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import monoquant_core as mq
from monoquant_core.tensor import QuantizedTensor

ROOT = Path(__file__).resolve().parent.parent

PLUGIN = '''\
"""Weights of three values, as in BitNet b1.58 (arXiv:2402.17764): -s, 0 and s, s being the mean magnitude."""
from dataclasses import dataclass

from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.encoding import Encoding, integer, per_group
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option
from monoquant_core.schemes import Proposal, Refusal


@dataclass(frozen=True)
class TernaryOptions:
    group_size: int = option(64, "Elements that share a scale.", minimum=1)


class TernaryQuantizer:
    """Rounds to the nearest of three values."""

    keeps_zero, idempotent, nearest = True, True, True

    def __init__(self, options):
        self.group_size = options.group_size

    def propose(self, spec):
        if len(spec.shape) < 2 or spec.shape[-1] % self.group_size:
            return Refusal(f"{spec.shape} has no whole groups of {self.group_size}", hint="choose another --group-size")
        return Proposal(Encoding(integer(2), per_group(len(spec.shape), self.group_size), "float32", clip=(-1, 1)))

    def accepts(self, spec, encoding):
        return self.propose(spec) == Proposal(encoding)

    def quantize(self, rows, encoding, context):
        from monoquant_core.blocks import check_finite
        from monoquant_core.tensor import QuantizedTensor

        check_finite(rows, context)
        groups = rows.float().contiguous().unflatten(-1, (rows.shape[-1] // self.group_size, self.group_size))
        scale = groups.abs().mean(-1)
        scale = scale.masked_fill(scale == 0, 1)
        codes = (groups / scale.unsqueeze(-1)).round().clamp(-1, 1).reshape(rows.shape)
        return QuantizedTensor(encoding, codes.char(), scale)


@hookimpl
def monoquant_register_schemes():
    return [SchemeDeclaration("ternary", "Three values.", "their_ternary:TernaryQuantizer", TernaryOptions, ("b1.58",))]
'''

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "their-ternary"
version = "3.1"
dependencies = ["monoquant>=0.1"]
[project.entry-points.monoquant]
ternary = "their_ternary"
[tool.hatch.build.targets.wheel]
only-include = ["their_ternary.py"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the plugin into."""
    project, target = tmp_path_factory.mktemp("their-ternary"), tmp_path_factory.mktemp("installed")
    (project / "their_ternary.py").write_text(PLUGIN)
    (project / "pyproject.toml").write_text(PYPROJECT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(project)], check=True)
    return target


def monoquant(installed: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that has the plugin."""
    env = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
    command = [sys.executable, "-m", "monoquant_core.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two layers and a norm."""
    random = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tensors = {
        "layers.0.up.weight": random.normal(0, 0.02, (48, 256)).astype(np.float32),
        "layers.0.conv.weight": random.normal(0, 0.1, (8, 4, 3, 32)).astype(np.float32),
        "layers.0.norm.weight": random.normal(1, 0.1, 256).astype(np.float32),
    }
    save_file(tensors, path)
    return path


def expected(weight: np.ndarray, group_size: int) -> np.ndarray:
    """The paper's formula, in numpy."""
    groups = weight.reshape(-1, group_size)
    scale = torch.from_numpy(groups).abs().mean(-1, keepdim=True).numpy()  # summed in torch's order
    return (np.clip(np.rint(groups / scale), -1, 1) * scale).astype(np.float32).reshape(weight.shape)


def test_it_is_an_ordinary_plugin() -> None:
    assert len([line for line in PLUGIN.splitlines() if line.strip()]) <= 42


def test_nothing_in_the_repository_knows_it() -> None:
    core = list((ROOT / "monoquant_core").rglob("*.py"))
    plugins = list((ROOT / "plugins").glob("*/src/**/*.py"))
    assert min(len(core), len(plugins)) > 20
    for path in [*core, *plugins]:
        text = path.read_text().lower()
        assert "ternary" not in text or path in plugins, path  # ggml has ternary types of its own
        assert "their-ternary" not in text, path
        assert "b1.58" not in text, path


def test_the_command_knows_it(installed: Path) -> None:
    listed = monoquant(installed, "plugins", "list")
    assert listed.returncode == 0, listed.stderr
    assert "their-ternary" in listed.stdout
    shown = monoquant(installed, "schemes", "show", "B1.58")
    assert shown.returncode == 0, shown.stderr
    assert "Elements that share a scale." in shown.stdout


@pytest.mark.parametrize("group_size", [32, 64])
def test_quantizes_and_saves_with_the_generic_convention(
    installed: Path, model: Path, tmp_path: Path, group_size: int
) -> None:
    out = tmp_path / "out"
    done = monoquant(
        installed, "quantize", model, "-o", out, "--scheme", "ternary", "--group-size", str(group_size),
        "--convention", "generic", "--keep", "*.conv.weight",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = load_file(model)
    # Read where the plugin is not installed: the file carries the encoding.
    with mq.load(out) as loaded:
        tensors = dict(loaded.tensors())
        state = loaded.state_dict()
    quantized = tensors["layers.0.up.weight"]
    assert isinstance(quantized, QuantizedTensor)
    assert str(quantized.encoding) == f"int2[1x{group_size}]*float32"
    assert set(quantized.codes.unique().tolist()) == {-1, 0, 1}
    np.testing.assert_array_equal(
        state["layers.0.up.weight"].numpy(), expected(weights["layers.0.up.weight"], group_size)
    )
    for name in ("layers.0.conv.weight", "layers.0.norm.weight"):
        np.testing.assert_array_equal(state[name].numpy(), weights[name])


def test_a_convolution_too(installed: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = monoquant(installed, "quantize", model, "-o", out, "--scheme", "b1.58", "-p", "group_size=32")
    assert done.returncode == 0, done.stderr
    with mq.load(out) as loaded:
        state = loaded.state_dict()
    for name in ("layers.0.conv.weight", "layers.0.up.weight"):
        np.testing.assert_array_equal(state[name].numpy(), expected(load_file(model)[name], 32))


def test_save_load_save_gives_the_same_bytes(installed: Path, model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = monoquant(
        installed,
        "quantize",
        model,
        "-o",
        first,
        "--scheme",
        "ternary",
        "-p",
        "group_size=32",
        "--convention",
        "generic",
    )
    assert done.returncode == 0, done.stderr
    mq.export(first, second, "safetensors", format_options={"convention": "generic"})
    files = {p.name: p.read_bytes() for p in first.iterdir()}
    assert {p.name: p.read_bytes() for p in second.iterdir()} == files


def test_what_it_refuses_is_refused_with_its_reason(installed: Path, model: Path, tmp_path: Path) -> None:
    done = monoquant(installed, "quantize", model, "-o", tmp_path / "out", "--scheme", "ternary", "--group-size", "96")
    assert done.returncode == 2
    assert "has no whole groups of 96" in done.stderr
    assert "layers.0.up.weight" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_option_is_refused(installed: Path, model: Path, tmp_path: Path) -> None:
    done = monoquant(installed, "quantize", model, "-o", tmp_path / "out", "--scheme", "ternary", "--group-size", "0")
    assert done.returncode == 2
    assert "group_size is at least 1, got 0" in done.stderr


def test_without_it_the_name_is_unknown(model: Path, tmp_path: Path) -> None:
    done = monoquant(tmp_path, "quantize", model, "-o", tmp_path / "out", "--scheme", "ternary")
    assert done.returncode == 2
    assert "no scheme 'ternary'" in done.stderr


def test_it_passes_the_conformance_kit(installed: Path, tmp_path: Path) -> None:
    """Without any code of its own, and in a folder whose conftest.py would break it."""
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not yours')")
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "monoquant_core.cli", "conformance", "ternary"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert not (tmp_path / ".pytest_cache").exists()


def test_a_version_that_breaks_its_word_fails_the_kit(installed: Path, tmp_path: Path) -> None:
    """The same file, rounding down."""
    for entry in installed.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "their_ternary.py").unlink()
    (tmp_path / "their_ternary.py").write_text(PLUGIN.replace(".round()", ".floor()"))
    done = monoquant(tmp_path, "conformance", "ternary")
    assert done.returncode == 1
    assert "TestScheme_ternary::test_error_is_at_most_half_a_step[defaults]" in done.stdout
    assert "more than half a step away" in done.stdout


def test_the_kit_skips_options_that_take_other_models_and_says_so(tmp_path: Path) -> None:
    done = monoquant(tmp_path, "conformance", "safetensors")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "takes other models than the kit's: sample: compressed-tensors is for model folders" in done.stdout


def test_the_kit_names_what_is_installed(tmp_path: Path) -> None:
    done = monoquant(tmp_path, "conformance", "nothing")
    assert done.returncode == 2
    assert "error: no plugin 'nothing'; installed: " in done.stderr


def test_its_own_tests_can_use_the_kit(installed: Path, tmp_path: Path) -> None:
    """As docs/plugins/testing.md says: a line in conftest.py, and a class."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["monoquant_core.testing.plugin"]\n')
    (tmp_path / "test_conformance.py").write_text(
        """
import pytest
from monoquant_core.testing import QuantizerConformance
from their_ternary import TernaryOptions, TernaryQuantizer

class TestTernary(QuantizerConformance):
    @pytest.fixture(params=[32, 64])
    def quantizer(self, request):
        return TernaryQuantizer(TernaryOptions(group_size=request.param))

def test_registry(monoquant_registry):
    assert "ternary" in monoquant_registry.schemes
"""
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

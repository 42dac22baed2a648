"""What every plugin module must do, whatever it declares."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest

from monoquant_core.declarations import Declaration
from monoquant_core.errors import OptionError
from monoquant_core.exporters import Exporter
from monoquant_core.hookspecs import PROJECT
from monoquant_core.model import SourceReader
from monoquant_core.options import OptionInfo, build, option_infos, parse
from monoquant_core.plugins import TABLES, Registry, load_registry
from monoquant_core.probes import Probe, ProbeResult
from monoquant_core.recipe import RecipeSource
from monoquant_core.runtimes import Runtime
from monoquant_core.schemes import Quantizer
from monoquant_core.stats import Calibrator
from monoquant_core.testing.checks import assert_satisfies

#: what registering and planning must not import
HEAVY = ("torch", "numpy", "pydantic", "rich", "typer")

#: hook -> what the target of its declarations satisfies once it is constructed with options
PROTOCOLS: dict[str, type] = {
    "monoquant_register_schemes": Quantizer,
    "monoquant_register_recipes": RecipeSource,
    "monoquant_register_calibrators": Calibrator,
    "monoquant_register_probes": Probe,
    "monoquant_register_sources": SourceReader,
    "monoquant_register_exporters": Exporter,
    "monoquant_register_runtimes": Runtime,
}


def declared_by(registry: Registry, plugin: str) -> Iterator[tuple[str, Declaration]]:
    """Every declaration of a plugin, with the hook it came by."""
    for hook, (_, _, table) in TABLES.items():
        for key, declaration in getattr(registry, table).items():
            if registry.origins[hook, key] == plugin:
                yield hook, declaration


def default(declaration: Declaration) -> Any:
    """What a declaration constructs with its default options."""
    return declaration.load()(build(declaration.options, {}, owner=declaration.name))


def variants(declaration: Declaration) -> Iterator[tuple[str, dict[str, Any]]]:
    """The default options, then each option changed alone: other choices, the other boolean, a smaller number."""
    yield "defaults", {}
    for info in option_infos(declaration.options):
        for value in _others(info):
            values = {info.name: value}
            try:
                declaration.load()(build(declaration.options, values, owner=declaration.name))
            except OptionError:
                continue  # it does not go with the defaults of the others
            yield f"{info.name}={value}", values


def _others(info: OptionInfo) -> list[Any]:
    if info.choices is not None:
        return [c for c in info.choices if c != info.default]
    if info.type is bool:
        return [not info.default]
    if info.type is int and info.default // 4 >= max(1, info.minimum or 0):
        return [info.default // 4]
    return []


class PluginConformance:
    """Subclass it and set ``plugin`` to the name of your entry point; the plugin must be installed."""

    plugin = ""

    @pytest.fixture
    def registry(self) -> Registry:
        """What is installed."""
        return load_registry()

    @pytest.fixture
    def declared(self, registry: Registry) -> list[tuple[str, Declaration]]:
        """Hook and declaration of everything that the plugin declares."""
        return list(declared_by(registry, self.plugin))

    def test_loads(self, registry: Registry) -> None:
        """It is installed and in use: no clash, a supported hook API, hooks and arguments that exist."""
        assert not [p for p in registry.problems if p.plugin == self.plugin], registry.problems
        assert self.plugin in [p.plugin for p in registry.loaded], (
            f"no entry point {self.plugin!r} in group {PROJECT!r}"
        )

    def test_registering_imports_nothing_heavy(self) -> None:
        """``monoquant --help`` stays fast: torch and numpy are imported when tensors are."""
        (point,) = (ep for ep in entry_points(group=PROJECT) if ep.name == self.plugin)
        found = _modules_after(
            f"import importlib; module = importlib.import_module({point.module!r})",
            "from monoquant_core.plugins import load_registry; registry = load_registry()",
        )
        assert not found, f"registering {self.plugin} imports {', '.join(found)}"

    def test_planning_imports_no_torch(self, declared: list[tuple[str, Declaration]]) -> None:
        """Schemes propose and formats answer without it."""
        for hook, declaration in declared:
            if hook in _RUN_HOOKS:
                lookup = f"load_registry().{TABLES[hook][2]}[{declaration.name.lower()!r}]"
                # Libraries of graphs need numpy themselves.
                only = ("torch",) if getattr(declaration, "needs", "") == "graph" else ("torch", "numpy")
                found = _modules_after(_PLANNING.format(lookup=lookup), only=only)
                assert not found, f"planning with {declaration.name} imports {', '.join(found)}"

    def test_summaries(self, declared: list[tuple[str, Declaration]]) -> None:
        """One line each, for ``--help`` and ``plugins list``."""
        for _, declaration in declared:
            assert declaration.summary.strip(), f"{declaration.name}: an empty summary"
            assert "\n" not in declaration.summary, f"{declaration.name}: a summary is one line"

    def test_targets_satisfy_their_protocol(self, declared: list[tuple[str, Declaration]]) -> None:
        """Every target imports, is constructed with its default options, and has the methods the core calls."""
        for hook, declaration in declared:
            if hook == "monoquant_register_runtimes":  # constructed on use: the program itself may be missing
                continue
            assert_satisfies(default(declaration), PROTOCOLS[hook])

    def test_fingerprints_are_the_same_in_every_process(self, declared: list[tuple[str, Declaration]]) -> None:
        """A run goes on with what another process made, if these say the same: no addresses, no hashes of texts."""
        for hook, declaration in declared:
            ask = getattr(default(declaration), "fingerprint", None) if hook in _RUN_HOOKS else None
            if ask is not None:
                found = _output_of(_FINGERPRINT.format(table=TABLES[hook][2], name=declaration.name.lower()))
                assert found == repr(ask()), (
                    f"{declaration.name}: fingerprint {ask()!r} here, {found} in another process"
                )

    def test_options(self, declared: list[tuple[str, Declaration]]) -> None:
        """Each with help in a sentence, a name that makes a flag, and a default of its type, readable as text."""
        for _, declaration in declared:
            options = declaration.options
            for info in option_infos(options):
                label = f"{options.__name__}.{info.name}"
                assert info.help.strip(), f"{label} has no help"
                assert re.fullmatch(r"[a-z][a-z0-9_]*", info.name), f"{label}: lower case and underscores"
                assert type(info.default) is info.type, f"{label}: default {info.default!r} is no {info.type.__name__}"
                assert parse(info, str(info.default), owner=declaration.name) == info.default, label
                for choice in info.choices or ():
                    assert type(choice) is info.type, f"{label}: choice {choice!r} is no {info.type.__name__}"

    def test_flags_agree_with_other_plugins(self, registry: Registry, declared: list[tuple[str, Declaration]]) -> None:
        """One flag of a command has one type; two types would leave the later plugin without a flag."""
        for hook, declaration in declared:
            others = [d for d in getattr(registry, TABLES[hook][2]).values() if d is not declaration]
            types = {info.name: (info.type, d.name) for d in others for info in option_infos(d.options)}
            for info in option_infos(declaration.options):
                kind, other = types.get(info.name, (info.type, ""))
                assert kind is info.type, (
                    f"{declaration.name}: --{info.name} is {info.type.__name__}, for {other} it is {kind.__name__}"
                )

    def test_help_renders(self, declared: list[tuple[str, Declaration]]) -> None:
        """The command shows the flags of schemes and formats."""
        done = subprocess.run(
            [sys.executable, "-m", "monoquant_core.cli", "quantize", "--help"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "300", "TERM": "dumb"},
        )
        assert done.returncode == 0, done.stderr
        for hook, declaration in declared:
            if hook in _RUN_HOOKS:
                for info in option_infos(declaration.options):
                    assert f"--{info.name.replace('_', '-')}" in done.stdout, f"no flag for {info.name} in --help"

    def test_probes_answer(self, declared: list[tuple[str, Declaration]]) -> None:
        """A probe never raises: what is missing is an answer."""
        for hook, declaration in declared:
            if hook == "monoquant_register_probes":
                result = default(declaration).probe()
                assert isinstance(result, ProbeResult), f"{declaration.name}: {result!r}"
                assert result.summary, f"{declaration.name}: says nothing"

    def test_readers_do_not_raise(self, declared: list[tuple[str, Declaration]], tmp_path: Any) -> None:
        """A reader says no to a file that is not its own, however malformed."""
        for hook, declaration in declared:
            if hook == "monoquant_register_sources":
                reader = default(declaration)
                for i, content in enumerate((b"", b"\0" * 8, b"\xff" * 64, b"{}", b"GGUF", b"PK\x03\x04")):
                    for suffix in getattr(declaration, "suffixes", ()):
                        path = tmp_path / (f"file{i}{suffix}" if suffix != "/" else f"folder{i}")
                        if suffix == "/":
                            path.mkdir(exist_ok=True)
                            (path / "config.json").write_bytes(content)
                        else:
                            path.write_bytes(content)
                        assert isinstance(reader.recognises(path), bool), f"{declaration.name}: {content!r}"
                assert reader.recognises(tmp_path / "missing") is False, f"{declaration.name}: takes a missing file"

    def test_declared_classes_have_docstrings(self, declared: list[tuple[str, Declaration]]) -> None:
        """The reference is made from them."""
        for _, declaration in declared:
            assert inspect.getdoc(declaration.load()), f"{declaration.target} has no docstring"


#: what takes part in a run
_RUN_HOOKS = ("monoquant_register_schemes", "monoquant_register_exporters")

_FINGERPRINT = """
from monoquant_core.plugins import load_registry
from monoquant_core.testing.declarations import default
print(repr(default(load_registry().{table}[{name!r}]).fingerprint()))
"""

_PLANNING = """
from monoquant_core.plugins import load_registry
from monoquant_core.options import build
from monoquant_core.encoding import INT8, Encoding, per_channel
from monoquant_core.errors import MonoquantError
from monoquant_core.exporters import Drop, FileLayout, Placed, Refuses
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Proposal
declaration = {lookup}
made = declaration.load()(build(declaration.options, {{}}, owner=declaration.name))
spec = TensorSpec("model.layers.0.mlp.up_proj.weight", (64, 256), "float32", kind="linear", module="Linear")
if hasattr(made, "propose"):
    proposal = made.propose(spec)
    made.accepts(spec, Encoding(INT8, per_channel(2), "float32"))
else:
    info = ModelInfo("sample", {{"model_type": "llama", "num_hidden_layers": 1}})
    if hasattr(made, "sample_graph"):
        info = ModelInfo("sample", info.config, graph=made.sample_graph([spec]))
    made = made.resolve([spec], info) if hasattr(made, "resolve") else made
    placed = []
    for out in made.outputs([spec], info):
        for proposal in (None, Proposal(Encoding(INT8, per_channel(2), "float32"))):
            if not isinstance(out, Drop) and not isinstance(held := made.verdict(out, proposal), Refuses):
                placed = [Placed(out, proposal, held, tuple(made.parts(out, held)))]
    try:
        list(made.files(FileLayout(tuple(placed), info, "out")))
    except MonoquantError:  # a format may want more of a model than the sample has
        pass
"""


def _modules_after(*code: str, only: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of the heavy modules a fresh process has imported after running the code."""
    script = "\n".join([*code, f"import sys; print('imported', *[m for m in {only!r} if m in sys.modules])"])
    return _output_of(script).split()[1:]


def _output_of(script: str) -> str:
    """The last line that a fresh process prints which runs a script."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]

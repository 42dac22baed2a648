"""What may import what: the layers of docs/architecture.md, checked on the source text."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "monoquant_core"
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if (p / "pyproject.toml").exists())
HEAVY = {"torch", "numpy", "numba", "pydantic", "rich", "typer", "transformers", "safetensors", "compressed_tensors"}

#: a module imports, at module level, only what stands in its own row or above it (TYPE_CHECKING aside), without cycles
LAYERS: list[set[str]] = [
    {"errors", "encoding", "options"},
    {"declarations", "hookspecs", "rows", "report", "tensor", "scratch", "compiling", "packing", "blocks"},
    {
        "model",
        "plugins",
        "stats",
        "observed",
        "histogram",
        "observers",
        "metrics",
        "probes",
        "runtimes",
        "commit",
        "journal",
        "schemes",
        "kinds",
        "recipe",
        "containers",
        "runners",
        "named_code",
        "graphs",
        "module_runner",
        "quality",
        "statistics",
        "agreement",
    },
    {
        "exporters",
        "planning",
        "selection",
        "negotiation",
        "planner",
        "reencode",
        "sources",
        "tasks",
        "memory",
        "gather",
        "check",
        "workers",
        "work",
        "store",
        "identity",
        "checkpoints",
        "passes",
        "engine",
        "calibration",
        "verification",
        "data",
    },
    {"quantized", "api"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
#: anything in the core may be imported by them, and nothing in it imports them
LEAVES = {"cli", "testing"}

TORCH_FREE = {
    *("errors", "encoding", "options", "declarations", "hookspecs", "plugins", "rows", "report", "model", "stats"),
    *("probes", "runtimes", "schemes", "kinds", "recipe", "exporters", "planning", "selection", "negotiation"),
    *(
        "planner",
        "tasks",
        "memory",
        "sources",
        "api",
        "runners",
        "named_code",
        "graphs",
        "quality",
        "statistics",
        "agreement",
        "compiling",
    ),
}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "tests" not in p.relative_to(folder).parts)


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import; what only a type checker sees is left out."""
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                yield from at_module_level(node.orelse)
            else:
                yield from at_module_level(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from at_module_level(node.body + node.orelse + node.finalbody)
            for handler in node.handlers:
                yield from at_module_level(handler.body)
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from at_module_level(node.body)
        else:
            yield node


def imported(nodes: Iterator[ast.stmt] | Iterator[ast.AST], path: Path) -> Iterator[str]:
    """Dotted names of imported modules and attributes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def on_import(path: Path) -> set[str]:
    return set(imported(at_module_level(ast.parse(path.read_text()).body), path))


def anywhere(path: Path) -> set[str]:
    return set(imported(ast.walk(ast.parse(path.read_text())), path))


def core_module(dotted: str) -> str | None:
    """First part below the core's package: ``monoquant_core.containers.reader.FileReader`` -> ``containers``."""
    parts = dotted.split(".")
    if parts[0] != "monoquant_core":
        return None
    known = len(parts) > 1 and ((CORE / parts[1]).is_dir() or (CORE / f"{parts[1]}.py").exists())
    return parts[1] if known else "__init__"


def own_module(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


CORE_FILES = files(CORE)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_core_module_has_a_layer() -> None:
    names = {own_module(p) for p in CORE_FILES} - LEAVES
    assert names <= set(LEVEL), f"give {sorted(names - set(LEVEL))} a place in LAYERS"


@pytest.mark.parametrize("path", CORE_FILES, ids=ids)
def test_imports_point_downwards(path: Path) -> None:
    own = own_module(path)
    if own in LEAVES:
        return
    for name in on_import(path):
        target = core_module(name)
        if target is None or target == own:
            continue
        if target == "__init__":  # __version__ stands there; functions of the API do not belong below it
            assert name == "monoquant_core.__version__", f"{path.name} imports {name}"
            continue
        assert target not in LEAVES, f"{path.name} imports {name}: nothing in the core imports {target}"
        assert LEVEL[target] <= LEVEL[own], f"{path.name} (layer {LEVEL[own]}) imports {name} (layer {LEVEL[target]})"


def test_imports_have_no_cycles() -> None:
    """Within a layer too; what a function imports when it runs cannot make a cycle."""
    edges: dict[str, set[str]] = {}
    for path in CORE_FILES:
        own = own_module(path)
        targets = {t for name in on_import(path) if (t := core_module(name)) is not None}
        edges.setdefault(own, set()).update(targets - {own, "__init__"})
    graphlib.TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("path", CORE_FILES, ids=ids)
def test_nothing_in_the_core_knows_the_command_or_the_kit(path: Path) -> None:
    """Not even inside a function."""
    if own_module(path) in LEAVES:
        return
    assert not {core_module(n) for n in anywhere(path)} & LEAVES


@pytest.mark.parametrize(
    "path", [p for p in CORE_FILES if own_module(p) in TORCH_FREE or own_module(p) == "cli"], ids=ids
)
def test_modules_that_a_plan_needs_import_nothing_heavy(path: Path) -> None:
    heavy = {n.split(".")[0] for n in on_import(path)} & HEAVY
    if own_module(path) == "cli":
        heavy -= {"typer", "rich"}
    assert not heavy


@pytest.mark.parametrize("path", CORE_FILES, ids=ids)
def test_the_core_imports_no_plugin(path: Path) -> None:
    names = {p.name.replace("-", "_") for p in PLUGINS}
    assert not {n.split(".")[0] for n in anywhere(path)} & names


@pytest.mark.parametrize("path", CORE_FILES, ids=ids)
def test_the_core_names_no_plugin_in_a_string(path: Path) -> None:
    """Docstrings aside: a plugin's module that is named in code would be an import in disguise."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    names = [p.name.replace("-", "_") for p in PLUGINS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            assert not any(name in node.value for name in names), f"line {node.lineno}: {node.value!r}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_plugins_do_not_import_each_other(plugin: Path) -> None:
    own = plugin.name.replace("-", "_")
    others = {p.name.replace("-", "_") for p in PLUGINS} - {own}
    sources = files(plugin / "src")
    assert sources
    for path in sources:
        names = anywhere(path)
        assert not {n.split(".")[0] for n in names} & others, path
        assert not {core_module(n) for n in names} & LEAVES, f"{path} imports the command or the kit"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_what_a_plugin_registers_is_cheap(plugin: Path) -> None:
    path = plugin / "src" / plugin.name.replace("-", "_") / "plugin.py"
    names = on_import(path)
    allowed = {"declarations", "hookspecs", "options", "encoding", "errors"}
    assert {core_module(n) for n in names} - {None} <= allowed, sorted(names)
    assert not {n.split(".")[0] for n in names} & HEAVY


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_registering_imports_nothing_heavy() -> None:
    """Every installed plugin, in a process of its own."""
    code = "from monoquant_core.plugins import load_registry; assert not load_registry().problems"
    assert not modules_after(code) & HEAVY


def test_importing_the_torch_free_modules_imports_no_torch() -> None:
    code = "\n".join(f"import monoquant_core.{name}" for name in sorted(TORCH_FREE))
    assert not modules_after(code) & (HEAVY - {"typer", "rich"})


def test_the_check_sees_what_it_looks_for(tmp_path: Path) -> None:
    """The walk finds imports in branches, and skips those for type checkers and inside functions."""
    path = tmp_path / "sample.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "else:\n    import json\n"
        "try:\n    import numpy\nexcept ImportError:\n    import rich\n"
        "class A:\n    import typer\n"
        "def f():\n    import safetensors\n"
    )
    assert on_import(path) == {"typing.TYPE_CHECKING", "json", "numpy", "rich", "typer"}
    assert "safetensors" in anywhere(path)
    assert core_module("monoquant_core.tensor.decode") == "tensor"
    assert core_module("monoquant_core.load") == "__init__"
    assert core_module("torch") is None

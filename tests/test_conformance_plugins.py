"""PluginConformance: one plugin with a fault of every kind, and what the kit says of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.options import option
from monoquant_core.testing import PluginConformance
from monoquant_core.testing.declarations import PROTOCOLS

FAULTY = '''
import numpy  # while registering
from dataclasses import dataclass
from monoquant_core.declarations import ExporterDeclaration, ProbeDeclaration, SchemeDeclaration, SourceDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option
from monoquant_core.schemes import Refusal


@dataclass(frozen=True)
class Unhelpful:
    size: int = option(3, "")


@dataclass(frozen=True)
class Unfit:
    threads: float = option(1, "An integer where a float is declared.")
    mode: str = option("slow", "One of its choices is no text.", choices=("slow", 1))


class Scheme:
    def __init__(self, options):
        pass

    def propose(self, spec):
        import torch  # a plan must be cheap
        return Refusal("no")

    def accepts(self, spec, encoding):
        return False

    def fingerprint(self):
        import os
        return str(os.getpid())


class Probe:
    """Raises where it should answer."""

    def __init__(self, options):
        pass

    def probe(self):
        raise RuntimeError("no such processor")


class Reader:
    """Raises on a malformed file."""

    def __init__(self, options):
        pass

    def recognises(self, path):
        return path.read_bytes()[0] == 1

    def open(self, path):
        pass


@hookimpl
def monoquant_register_schemes():
    return [
        SchemeDeclaration("faulty", "One.", "faulty:Scheme", Unhelpful),
        SchemeDeclaration("unfit", "", "faulty:Scheme", Unfit),
    ]


@hookimpl
def monoquant_register_probes():
    return [ProbeDeclaration("faulty", "Two\\nlines.", "faulty:Probe")]


@hookimpl
def monoquant_register_sources():
    return [SourceDeclaration("faulty", "One.", "faulty:Reader", suffixes=(".faulty",))]
'''

OTHER = """
from dataclasses import dataclass
from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option


@dataclass(frozen=True)
class Options:
    mode: int = option(1, "Another type under the same flag.")


@hookimpl
def monoquant_register_schemes():
    return [SchemeDeclaration("another", "One.", "nowhere:Scheme", Options)]
"""


def install(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[monoquant]\n{name} = {name}\n")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Failed tests of the kit, with what each says."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "faulty", FAULTY)
    install(folder, "another", OTHER)
    code = "import sys; from monoquant_core.testing.command import run; sys.exit(run('faulty'))"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    sections = re.split(r"^_+ (TestPlugin\.\w+) _+$", done.stdout.split("short test summary")[0], flags=re.M)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_registering_imports_nothing_heavy", "registering faulty imports numpy"),
        ("test_planning_imports_no_torch", "planning with faulty imports torch"),
        ("test_summaries", "unfit: an empty summary"),
        ("test_targets_satisfy_their_protocol", "Scheme has no 'keeps_zero'"),
        ("test_fingerprints_are_the_same_in_every_process", "in another process"),
        ("test_options", "Unhelpful.size has no help"),
        ("test_flags_agree_with_other_plugins", "unfit: --mode is str, for another it is int"),
        ("test_probes_answer", "no such processor"),
        ("test_readers_do_not_raise", "index out of range"),
        ("test_declared_classes_have_docstrings", "faulty:Scheme has no docstring"),
    ],
)
def test_a_faulty_plugin_is_found(report: dict[str, str], test: str, message: str) -> None:
    assert message in report[f"TestPlugin.{test}"]


def test_a_plugin_that_does_not_load_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "unloadable", "raise RuntimeError('not today')")
    suite = type("Suite", (PluginConformance,), {"plugin": "unloadable"})()
    from monoquant_core.plugins import load_registry

    with pytest.raises(AssertionError, match="not today"):
        suite.test_loads(load_registry())


def test_a_flag_that_is_missing_from_help_is_found() -> None:
    @dataclass(frozen=True)
    class Options:
        unseen: int = option(1, "Nothing registers it.")

    declared = [("monoquant_register_schemes", SchemeDeclaration("mine", "One.", "nowhere:Mine", Options))]
    with pytest.raises(AssertionError, match="no flag for unseen in --help"):
        PluginConformance().test_help_renders(declared)


def test_every_hook_that_declares_has_a_protocol() -> None:
    from monoquant_core.plugins import TABLES

    assert set(PROTOCOLS) == set(TABLES)

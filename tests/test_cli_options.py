"""Options of plugins as flags: one flag per name, whose help names every scheme that takes it."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from monoquant_core.cli.options import Typed, _listed, flag_parameters, roles, with_options
from monoquant_core.cli.selection import named_scheme
from monoquant_core.declarations import Declaration, ExporterDeclaration, SchemeDeclaration
from monoquant_core.errors import OptionError
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option
from monoquant_core.plugins import Registry, load_registry


@dataclass(frozen=True)
class IntOptions:
    group_size: int = option(128, "Elements that share a scale.", minimum=1)
    rounding: str = option("auto", "How codes are chosen.", choices=("auto", "nearest"))
    symmetric: bool = option(True, "Without a zero point.")
    level: int = option(1, "A number here.")


@dataclass(frozen=True)
class HqqOptions:
    group_size: int = option(64, "Columns [in, out] per scale.", minimum=8)
    rounding: str = option("solve", "What minimizes the error.", choices=("solve", "nearest"))
    level: str = option("low", "A word here.")
    threads: int = option(4, "A name that the command has itself.")


@dataclass(frozen=True)
class FileOptions:
    alignment: int = option(32, "Bytes.", minimum=8)
    level: int = option(9, "Of compression.")
    padded: bool = option(False, "Fill up.")


def registry() -> Registry:
    module = types.ModuleType("sample")

    @hookimpl
    def monoquant_register_schemes() -> Iterable[SchemeDeclaration]:
        return [SchemeDeclaration("int4", "", "x:Y", IntOptions), SchemeDeclaration("hqq", "", "x:Y", HqqOptions)]

    @hookimpl
    def monoquant_register_exporters() -> Iterable[ExporterDeclaration]:
        return [ExporterDeclaration("zip", "", "x:Y", FileOptions)]

    module.monoquant_register_schemes = monoquant_register_schemes  # type: ignore[attr-defined]
    module.monoquant_register_exporters = monoquant_register_exporters  # type: ignore[attr-defined]
    return load_registry((module,), found=())


def call(*args: str, scheme: str = "int4", format: str = "zip") -> dict[str, dict[str, object]]:
    """What a command with these flags hands to the scheme and the format."""
    found = registry()
    app = typer.Typer()
    result: dict[str, dict[str, object]] = {}

    @app.command()
    @with_options(roles(found, "scheme", "format"))
    def command(typed: Typed, param: Annotated[list[str] | None, typer.Option("-p")] = None, threads: int = 0) -> None:
        result.update(typed.options(scheme=named_scheme(found, scheme), format=found.exporter(format)))

    outcome = CliRunner().invoke(app, list(args))
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return result


@pytest.mark.parametrize(
    ("args", "scheme", "expected"),
    [
        ([], "int4", {"scheme": {}, "format": {}}),
        (["--group-size", "64"], "int4", {"scheme": {"group_size": 64}, "format": {}}),
        (["--no-symmetric"], "int4", {"scheme": {"symmetric": False}, "format": {}}),
        (["--symmetric"], "int4", {"scheme": {"symmetric": True}, "format": {}}),
        (["--padded", "--alignment", "64"], "int4", {"scheme": {}, "format": {"padded": True, "alignment": 64}}),
        (["--rounding", "solve"], "hqq", {"scheme": {"rounding": "solve"}, "format": {}}),
        (["--level", "3"], "int4", {"scheme": {"level": 3}, "format": {"level": 3}}),
        (["-p", "level=high", "-p", "format.level=2"], "hqq", None),
        (["-p", "scheme.level=high"], "hqq", {"scheme": {"level": "high"}, "format": {}}),
        (["-p", "threads=8"], "hqq", {"scheme": {"threads": 8}, "format": {}}),
        (
            ["-p", "group-size=32", "-p", "symmetric=no"],
            "int4",
            {"scheme": {"group_size": 32, "symmetric": False}, "format": {}},
        ),
    ],
)
def test_options_reach_what_was_chosen(args: list[str], scheme: str, expected: dict[str, object] | None) -> None:
    if expected is None:  # a word for the scheme is no number for the format
        with pytest.raises(OptionError, match="--format zip: level wants int, got 'high'"):
            call(*args, scheme=scheme)
    else:
        assert call(*args, scheme=scheme) == expected


@pytest.mark.parametrize(
    ("args", "scheme", "message", "hint"),
    [
        (
            ["--no-symmetric"],
            "hqq",
            "--scheme hqq and --format zip: no option 'symmetric'",
            "it belongs to --scheme int4",
        ),
        (["--group-size", "0"], "int4", "--scheme int4: group_size is at least 1, got 0", ""),
        (["--rounding", "solve"], "int4", "--scheme int4: rounding is one of auto, nearest, got 'solve'", ""),
        (["--level", "3"], "hqq", "--scheme hqq: level wants str, got 3", "-p level=VALUE"),
        (["-p", "nothing=1"], "int4", "--scheme int4 and --format zip: no option 'nothing'", "they take: group_size"),
        (["-p", "nothing"], "int4", "-p 'nothing' is not name=value", ""),
        (["-p", "level=high"], "int4", "--scheme int4: level wants int, got 'high'", ""),
    ],
)
def test_options_are_refused(args: list[str], scheme: str, message: str, hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        call(*args, scheme=scheme)
    assert str(caught.value) == message
    assert hint in caught.value.hint


def test_a_shared_flag_tells_whose_choices_are_whose() -> None:
    found = registry()
    parameters = flag_parameters(roles(found, "scheme", "format"), taken={"threads"})
    flags = {name: p.annotation.__metadata__[0] for name, p in parameters.items()}
    assert flags["rounding"].help.replace("\\", "") == (
        "int4: How codes are chosen. [one of auto, nearest; default auto] | "
        "hqq: What minimizes the error. [one of solve, nearest; default solve]"
    )
    assert flags["rounding"].metavar == "auto|nearest|solve"
    assert "(for hqq: -p level=VALUE)" in flags["level"].help
    assert flags["level"].rich_help_panel == "Options that depend on --scheme and --format"
    assert flags["symmetric"].help.replace("\\", "") == "Without a zero point. [default yes] (int4)"
    assert "threads" not in flags, "the command's own flag stays its own"


def test_help_shows_what_the_declarations_say() -> None:
    found = registry()
    app = typer.Typer(rich_markup_mode="rich")

    @app.command()
    @with_options(roles(found, "scheme", "format"))
    def command(typed: Typed, threads: int = 0) -> None:
        """Do it."""

    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    words = re.sub(r"[\s│]+", " ", text)
    assert "Columns [in, out] per scale." in words, "brackets are not markup"
    assert "--no-symmetric" in words
    assert "--typed" not in words


def test_declared_names_need_no_plugin_modules() -> None:
    """Flags come from declarations alone: the targets above do not exist."""
    declared: Declaration = registry().scheme("int4")
    with pytest.raises(Exception, match="cannot be imported"):
        declared.load()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["int2", "int3", "int4", "w8a8"], "int2-int4, w8a8"),
        (["int2", "int4", "int5"], "int2, int4, int5"),
        (["fp8", "nf4"], "fp8, nf4"),
        (["Q4_0", "Q8_0", "Q4_0"], "Q4_0, Q8_0"),  # schemes, and a recipe that is called as one
        (["q9", "q10", "q11"], "q9-q11"),
        ([], ""),
    ],
)
def test_series_of_names_are_shortened(names: list[str], text: str) -> None:
    assert _listed(names) == text

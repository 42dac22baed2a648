"""The command from outside: exit status, stdout and stderr, signals, plugins, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monoquant_core.cli.app import build_app
from monoquant_core.plugins import load_registry

Install = Callable[[str, str], dict[str, str]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

COMMANDS = ("quantize", "export", "plan", "inspect", "compare", "doctor", "schemes", "formats", "recipes", "plugins")
COMMANDS += ("conformance",)
BARE = {"MONOQUANT_DISABLED_PLUGINS": "int,float,safetensors,probes,onnx,gguf,calibration"}

TERNARY = """
    from dataclasses import dataclass
    from monoquant_core.declarations import SchemeDeclaration
    from monoquant_core.hookspecs import hookimpl
    from monoquant_core.options import option

    @dataclass(frozen=True)
    class Options:
        threshold: float = option(0.7, "Share of the mean magnitude below which a weight is zero [0, 1].", minimum=0)
        sparse: bool = option(True, "Whether zeros are kept.")

    @hookimpl
    def monoquant_register_schemes():
        summary = "Minus one, zero and one"
        return [SchemeDeclaration("ternary", summary, "ternary_plugin:Nothing", Options, aliases=("t3",))]
"""

WAITING = """
    import sys, time
    from monoquant_core.hookspecs import hookimpl

    @hookimpl
    def monoquant_register_commands(app):
        @app.command()
        def nap():
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                print("cleaned up", flush=True)

        @app.command()
        def heavy():
            print("ready", flush=True)
            import torch

        @app.command()
        def stubborn():
            class Lost:
                def __del__(self):
                    print("ready", flush=True)
                    time.sleep(1)  # what is raised here, Python prints and forgets

            Lost()
            time.sleep(60)

        @app.command()
        def crash():
            raise RuntimeError("a fault of the plugin")
"""


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert [name for name in COMMANDS if f"│ {name}" not in result.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(build_app(load_registry()), [command, "-h"], prog_name="monoquant")
    assert result.exit_code == 0
    assert f"monoquant {command}" in result.stdout


def test_version_is_the_distribution_s(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"monoquant {version('monoquant')}\n"


@pytest.mark.parametrize(
    "args", [["--help"], ["quantize", "--help"], ["plugins", "list"], ["schemes", "list", "--json"], ["nonsense"]]
)
def test_cheap_commands_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from monoquant_core.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_usage_errors_are_status_2(run: Run) -> None:
    for args in (
        ["nonsense"],
        ["plan"],
        ["plan", "x", "--threads", "many"],
        ["quantize", "x"],
        ["plan", "x", "--frobnicate"],
    ):
        result = run(*args)
        assert (result.returncode, result.stdout) == (2, ""), args
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["schemes", "show", "ternry"], "error: no scheme 'ternry'; installed: ", "hint: did you mean 'ternary'?"),
        (["formats", "show", "zip"], "error: no format 'zip'; installed: ", "hint: "),
        (["plan", "x", "--scheme", "ternry"], "error: no scheme 'ternry'", "hint: did you mean 'ternary'?"),
    ],
)
def test_refusals_are_one_line_and_a_hint(run: Run, install: Install, args: list[str], message: str, hint: str) -> None:
    result = run(*args, env=install("ternary", TERNARY))
    first, second = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "")
    assert first.startswith(message)
    assert second.startswith(hint)


def test_plugins_list_names_what_works_and_what_was_left_out(run: Run, install: Install) -> None:
    env = install("ternary", TERNARY) | install("broken", "import no_such_module")
    result = run("plugins", "list", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "schemes ternary" in result.stdout
    assert "broken (monoquant-broken): failed to import: ModuleNotFoundError" in result.stdout
    listed = json.loads(run("plugins", "list", "--json", env=env).stdout)
    mine = [p for p in listed["plugins"] if p["plugin"] == "ternary"]
    assert mine == [
        {
            "plugin": "ternary",
            "distribution": "monoquant-ternary",
            "version": "1.0",
            "provides": {"schemes": ["ternary"]},
        }
    ]
    assert [p["plugin"] for p in listed["left_out"]] == ["broken"]


def test_schemes_show_is_the_declaration(run: Run, install: Install) -> None:
    env = install("ternary", TERNARY)
    shown = json.loads(run("schemes", "show", "T3", "--json", env=env).stdout)
    assert shown == {
        "name": "ternary",
        "summary": "Minus one, zero and one",
        "plugin": "ternary",
        "aliases": ["t3"],
        "options": [
            {
                "name": "threshold",
                "flag": "--threshold",
                "type": "float",
                "default": 0.7,
                "choices": None,
                "minimum": 0,
                "help": "Share of the mean magnitude below which a weight is zero [0, 1].",
            },
            {
                "name": "sparse",
                "flag": "--no-sparse",
                "type": "bool",
                "default": True,
                "choices": None,
                "minimum": None,
                "help": "Whether zeros are kept.",
            },
        ],
    }
    text = run("schemes", "show", "ternary", env=env).stdout
    assert "below which a weight is zero [0, 1]. (at least 0)" in text
    assert re.search(r"^sparse +--no-sparse +bool +yes ", text, re.MULTILINE)
    assert "ternary" in run("schemes", "list", env=env).stdout


@pytest.mark.parametrize("name", ["default", "none"])
def test_recipes_of_the_core_are_shown(run: Run, name: str) -> None:
    assert json.loads(run("recipes", "show", name, "--json").stdout)["name"] == name
    assert name in run("recipes", "list").stdout


PROBES = """
from monoquant_core.declarations import ProbeDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.probes import Finding, ProbeResult

ANSWERS = {
    "fails": lambda: 1 / 0,
    "nothing": lambda: None,
    "swift": lambda: ProbeResult("swift", True, "here", findings={"scheme:int8": Finding("swift", "why not")}),
    "text": lambda: ProbeResult("text", True, "here", findings={"scheme:int8": "fast"}),
    "mute": lambda: ProbeResult("mute", True, None),
}


@hookimpl
def monoquant_register_probes():
    return [ProbeDeclaration(name, "one", f"probing_plugin:{name}") for name in ANSWERS]


def __getattr__(name):
    if name not in ANSWERS:
        raise AttributeError(name)
    return lambda options: type("Probe", (), {"probe": staticmethod(ANSWERS[name])})()
"""


def test_probes_that_answer_wrongly_are_named_and_the_rest_is_told(run: Run, install: Install) -> None:
    done = run("doctor", "--json", env=install("probing", PROBES))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["probes"]
    said = {name: found[name]["summary"] for name in ("fails", "nothing", "swift", "text", "mute")}
    assert all(text.startswith("the probe failed: ") for text in said.values()), said
    assert "got 'swift'" in said["swift"]
    assert "scheme:int8" in said["text"]
    assert found["cpu"]["present"]


def test_doctor_knows_this_machine_and_says_what_it_does_not_know(run: Run, install: Install) -> None:
    env = install("ternary", TERNARY)
    found = json.loads(run("doctor", "--json", env=env).stdout)
    assert found["probes"]["cpu"]["present"] is True
    assert found["probes"]["cpu"]["facts"]["usable_cores"] >= 1
    assert found["schemes"]["ternary"] == []
    text = run("doctor", env=env).stdout
    row = next(line for line in text.splitlines() if line.startswith("ternary "))
    assert row.split(maxsplit=1)[1].strip().endswith("not known to the probes")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["schemes", "list"], "no schemes installed; extras that bring plugins: "),
        (["formats", "list"], "no formats installed; extras that bring plugins: "),
        (["plugins", "list"], "no plugins installed; try: pip install 'monoquant[standard]'"),
        (["doctor"], "no probes installed"),
        (["recipes", "list"], "default"),
    ],
)
def test_without_plugins_commands_work_and_say_what_to_install(run: Run, args: list[str], expected: str) -> None:
    result = run(*args, env=BARE)
    assert (result.returncode, result.stderr) == (0, "")
    assert expected in result.stdout


def test_without_plugins_quantize_says_what_to_install(run: Run, tmp_path: Path) -> None:
    result = run("quantize", tmp_path, "-o", tmp_path / "out", env=BARE)
    assert result.returncode == 2
    assert "error: no scheme 'int8'; installed: none\nhint: extras that bring plugins: monoquant[" in result.stderr


def test_a_plugin_adds_commands_but_replaces_none(run: Run, install: Install) -> None:
    env = install(
        "greedy",
        """
        from monoquant_core.hookspecs import hookimpl

        @hookimpl
        def monoquant_register_commands(app):
            @app.command()
            def unheard():
                print("not reached")

            @app.command()
            def plan():
                print("not monoquant's plan")
        """,
    )
    env |= install("waiting", WAITING)
    assert run("unheard", env=env).returncode == 2
    assert "not monoquant's plan" not in run("plan", env=env).stdout
    assert "greedy (monoquant-greedy): its command 'plan' exists already" in run("plugins", "list", env=env).stdout
    assert "nap" in run("--help", env=env).stdout


def test_a_plugin_whose_commands_fail_is_left_out(run: Run, install: Install) -> None:
    env = install(
        "failing",
        """
        from monoquant_core.hookspecs import hookimpl

        @hookimpl
        def monoquant_register_commands(app):
            raise RuntimeError("no")
        """,
    )
    result = run("plugins", "list", env=env)
    assert result.returncode == 0
    assert "failing (monoquant-failing): its commands failed to register: RuntimeError('no')" in result.stdout
    strict = run("plugins", "list", env={**env, "MONOQUANT_STRICT_PLUGINS": "1"})
    assert strict.returncode == 2
    assert "error: plugin 'failing': its commands failed to register: RuntimeError('no')" in strict.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("@app.command()\ndef odd(x: list[list[int]]): ...", "its commands failed to register: AssertionError("),
        ("@app.callback()\ndef root(loud: bool = False): ...", "it replaces the callback of the application"),
    ],
)
def test_a_plugin_whose_commands_would_break_the_others_is_left_out(
    run: Run, install: Install, code: str, reason: str
) -> None:
    body = textwrap.indent(textwrap.dedent(code), "    ")
    env = install(
        "breaking",
        "from monoquant_core.hookspecs import hookimpl\n@hookimpl\n"
        f"def monoquant_register_commands(app):\n{body}\n"
        "@hookimpl\ndef monoquant_decide(proposed): ...\n",
    )
    result = run("plugins", "list", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"breaking (monoquant-breaking): {reason}" in result.stdout
    assert "hooks monoquant_decide, monoquant_register_commands" in result.stdout
    assert run("--version", env=env).stdout.startswith("monoquant ")


def test_a_bug_is_a_traceback_and_status_3(run: Run, install: Install) -> None:
    result = run("crash", env=install("waiting", WAITING))
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("Traceback")
    assert "RuntimeError: a fault of the plugin" in result.stderr
    assert "please report it" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
@pytest.mark.parametrize(
    ("command", "number", "status", "rest"),
    [
        ("nap", signal.SIGINT, 130, "cleaned up\n"),
        ("nap", signal.SIGTERM, 143, "cleaned up\n"),
        ("heavy", signal.SIGINT, 130, ""),
        ("heavy", signal.SIGTERM, 143, ""),
    ],
)
def test_signals_end_it_quietly(install: Install, command: str, number: int, status: int, rest: str) -> None:
    process = start(command, install("waiting", WAITING))
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (status, rest, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
def test_a_signal_that_python_loses_ends_it_in_time(install: Install) -> None:
    process = start("stubborn", install("waiting", WAITING))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=6)
    assert process.returncode == 143


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
def test_a_second_signal_ends_it_at_once(install: Install) -> None:
    process = start("stubborn", install("waiting", WAITING))
    process.send_signal(signal.SIGINT)
    assert "Exception ignored" in process.stderr.readline()  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=3)
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "monoquant_core.cli", "plugins", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # type: ignore[union-attr]
    assert process.stderr.read() == b""  # type: ignore[union-attr]
    assert process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "monoquant_core.cli", "recipes", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert result.stderr == "error: standard output: No space left on device\n"


def start(command: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """The command, once it has said that it is ready."""
    # A test run in the background ignores SIGINT, which its children inherit; so they are started as from a terminal.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "monoquant_core.cli", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    signal.signal(signal.SIGINT, ignored)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process

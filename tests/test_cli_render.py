"""What the commands print, piece by piece: sizes, tables, JSON, progress and the summary of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monoquant_core.cli import progress, render
from monoquant_core.cli.progress import reporter
from monoquant_core.cli.render import Column
from monoquant_core.cli.summary import report_dict, show_reports, shown_files
from monoquant_core.report import Progress, Report, TensorReport

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


@given(st.integers(0, 10**17))
def test_sizes_are_right_to_three_digits(nbytes: int) -> None:
    number, unit = render.size(nbytes).split()
    assert float(number) * UNITS[unit] == pytest.approx(nbytes, rel=0.006, abs=0.5)
    assert len(number) <= 4 or unit == "PB"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (90_946_720, "90.9 MB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert render.size(nbytes) == text


def test_exact_sizes_have_every_digit() -> None:
    assert render.exact(12) == "12 B"
    assert render.exact(59_201_234) == "59.2 MB (59,201,234 bytes)"


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1:01 min"), (7260, "2:01 h")])
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(math.inf, "exact"), (-math.inf, "no signal"), (math.nan, "no signal"), (31.25, "31.2 dB")]
)
def test_decibels(value: float, text: str) -> None:
    assert render.decibels(value) == text


@given(st.text())
def test_nothing_printed_steers_the_terminal(text: str) -> None:
    shown = render.printable(text)
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert shown == text or not all(c == "\n" or c.isprintable() for c in text)


def test_names_with_escape_sequences_are_shown_as_text() -> None:
    assert render.printable("\x1b[2Jweight\r") == "\\x1b[2Jweight\\r"
    assert render.printable("gewicht.größe") == "gewicht.größe"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_is_json_whatever_the_numbers(value: object) -> None:
    text = json.dumps(render._jsonable(value), allow_nan=False)
    assert json.loads(text) == render._jsonable(value)


def test_tables_away_from_a_terminal_have_a_line_per_row_and_cut_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("tensor", fold=True), Column("bytes", right=True)]
    name = "layer." * 60 + "weight"
    render.table(columns, [[name, "1 kB"], ["a\nb[1x*]", "20 kB"]], footer=["total", "21 kB"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == [
        ["tensor", "bytes"],
        [name, "1", "kB"],
        ["a", "b[1x*]", "20", "kB"],
        ["total", "21", "kB"],
    ]
    assert len({line.rindex("kB") for line in lines if "kB" in line}) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_tables_on_a_terminal_fold_long_cells_and_read_no_markup() -> None:
    code = (
        "from monoquant_core.cli.render import Column, table\n"
        "table([Column('tensor', fold=True), Column('to')], [['layer.' * 20, '[bold]int8[1x*]']])"
    )
    shown = on_terminal(code, columns=60)
    assert "[bold]int8[1x*]" in shown
    assert max(len(line) for line in shown.splitlines()) <= 60
    assert "layer." * 20 in re.sub(r"[\s─]|\[bold\]int8\[1x\*\]", "", shown)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_sections_replace_a_table_that_is_too_wide() -> None:
    code = (
        "from monoquant_core.cli.render import Column, fits, sections\n"
        "columns = [Column('tensor'), Column('bytes', right=True)]\n"
        "print(fits(columns, [['x' * 70, '1']]), fits(columns, [['x' * 30, '1']]))\n"
        "sections(columns, {'float32 -> kept': [['a', '1 B'], ['bb', '10 B']]})"
    )
    shown = on_terminal(code, columns=60).splitlines()
    assert shown[0].split() == ["False", "True"]
    assert shown[1:4] == ["float32 -> kept", "  a    1 B", "  bb  10 B"]


def on_terminal(code: str, columns: int) -> str:
    """What a program prints on a terminal that wide, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent_to_terminal(code, columns)).replace("\r\n", "\n")


def sent_to_terminal(code: str, columns: int, status: int = 0) -> str:
    """What a program that ends with this status sends to a terminal, by stdout and stderr."""
    import pty

    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, env=env)
    os.close(child)
    shown = b""
    while True:
        try:
            read = os.read(parent, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not read:
            break
        shown += read
    os.close(parent)
    assert process.wait() == status, shown.decode()
    return shown.decode()


def events(stage: str = "write") -> list[Progress]:
    return [Progress(stage, f"t{i}", i * 1_000_000, 4_000_000) for i in range(1, 5)]  # type: ignore[arg-type]


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
BAR = """
from monoquant_core.cli.progress import reporter
from monoquant_core.report import Progress
with reporter(quiet=False) as show:
    print("planned")
    for stage in ("scan", "write", "sync", "done"):
        show(Progress(stage, "t", 3_000_000, 4_000_000))
        if stage == END:
            break
    AND
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_progress_is_a_bar_on_a_terminal_from_the_first_event_on() -> None:
    sent = sent_to_terminal(BAR.replace("END", "'done'").replace("AND", ""), columns=100)
    assert sent.index("planned") < sent.index(HIDE) < sent.index("first pass") < sent.index("writing")
    assert "3.0/4.0 MB" in sent
    assert sent.index("to disk") < sent.rindex(SHOW)
    assert HIDE not in sent_to_terminal(BAR.split("    for", maxsplit=1)[0], columns=100)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_leaving_at_once_shows_the_cursor_again() -> None:
    """As Ctrl-C during an import does, while the bar hides it."""
    leave = "from monoquant_core.cli import signals; signals._exit(130)"
    sent = sent_to_terminal(BAR.replace("END", "'write'").replace("AND", leave), columns=100, status=130)
    assert HIDE in sent
    assert sent.rindex(SHOW) > sent.rindex(HIDE)


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with reporter(quiet=False) as callback:
        assert callback is not None
        for event in events():
            callback(event)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r", .*/s, .* left", "", line) for line in lines] == [f"writing: {i} MB of 4 MB" for i in range(1, 5)]
    assert re.search(r"/s, 0\.0 s left$", lines[-1])


def test_what_was_done_before_says_nothing_about_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    times = iter([100.0, 100.0, 101.0, 102.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with reporter(quiet=False) as callback:
        assert callback is not None
        callback(Progress("write", "", 6_000_000, 9_000_000, 6_000_000, "resuming: 66 %\x1b[31m"))
        callback(Progress("scan", "t", 1_000_000, 1_000_000))
        callback(Progress("write", "t", 7_000_000, 9_000_000, 6_000_000))
        callback(Progress("write", "t", 8_000_000, 9_000_000, 6_000_000))
    note, _, first, second = capsys.readouterr().err.splitlines()
    assert note == "resuming: 66 %\\x1b[31m"  # at once, and no escape code gets through
    assert first.startswith("writing: 7 MB of 9 MB, 1 MB/s, 2.0 s left")
    assert second.startswith("writing: 8 MB of 9 MB, 1 MB/s, 1.0 s left")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_notes_stay_on_a_terminal_above_the_bar() -> None:
    note = 'show(Progress("write", "", 0, 4_000_000, 0, "resuming: [bold]66 %"))'
    sent = sent_to_terminal(
        BAR.replace("END", "'done'").replace("AND", "").replace("    for", f"    {note}\n    for"), columns=100
    )
    assert "resuming: [bold]66 %" in sent  # as it is, without markup
    assert sent.index("resuming") < sent.index("first pass")


def test_progress_is_quiet_for_short_runs_and_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter(quiet=False) as callback:
        for event in events():
            callback(event)  # type: ignore[misc]
    with reporter(quiet=True) as callback:
        assert callback is None
    assert capsys.readouterr() == ("", "")


def report() -> Report:
    tensors = (
        TensorReport("a.weight", "quantize", "pack-quantized", 100, signal=1e3, noise=1.0, max_error=0.5, nbytes=60),
        TensorReport("b.weight", "quantize", "pack-quantized", 100, signal=1e3, noise=10.0, max_error=0.7, nbytes=60),
        TensorReport("b.bias", "keep", "float32", 10, signal=1.0, noise=0.0, nbytes=40),
    )
    return Report(
        destination=Path("out"),
        files={"model.safetensors": 250_000, "config.json": 1000},
        source_bytes=1_004_000,
        tensors=tensors,
        seconds=2.0,
        start_bytes=200_000_000,
        peak_bytes=230_000_000,
        earlier_bytes=201_000_000,
        predicted_bytes=40_000_000,
        threads=2,
        device="cpu",
        notes=("transformers decompresses it",),
    )


def test_summary_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show_reports([report()], json=False)
    text = capsys.readouterr().out
    assert text.startswith("wrote out\n")
    for expected in (
        "1 MB -> 251 kB (251,000 bytes), 4.00x smaller",
        "model.safetensors  250 kB",
        "6.10 bits each, scales included: 2 pack-quantized, 1 float32",
        "22.6 dB over 2 changed tensors",  # 10 log10(2000 / 11)
        "20.0 dB  b.weight  (pack-quantized, largest error 0.7)",
        "2.0 s, 502 kB/s, 2 threads",
        "30 MB at its peak above the start's 200 MB; 40 MB predicted",
        "- transformers decompresses it",
    ):
        assert expected in text
    assert text.index("b.weight") < text.index("a.weight"), "the worst comes first"


def test_a_summary_says_what_an_interrupted_run_had_done(capsys: pytest.CaptureFixture[str]) -> None:
    resumed = dataclasses.replace(report(), resumed=0.755)
    show_reports([resumed], json=False)
    text = capsys.readouterr().out
    assert "resumed  75 % was done by a run that was interrupted" in text
    assert "2.0 s, 123 kB/s, 2 threads" in text  # of what this one did
    show_reports([report(), resumed], json=True)
    assert [one["resumed"] for one in json.loads(capsys.readouterr().out)["outputs"]] == [0.0, 0.755]


def test_a_peak_of_what_ran_before_is_only_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    show_reports([dataclasses.replace(report(), earlier_bytes=230_000_000)], json=False)
    assert "at most 30 MB at its peak above the start's 200 MB; 40 MB predicted" in capsys.readouterr().out


def test_summary_as_json_has_the_same_numbers() -> None:
    found = report_dict(report())
    assert found["bytes"] == 251_000
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(2000 / 11))
    assert [t["name"] for t in found["tensors"]] == ["a.weight", "b.weight", "b.bias"]
    assert found["tensors"][2]["sqnr_db"] == math.inf


def test_many_files_are_summed_up() -> None:
    files = {f"model-{i:05}.safetensors": 1000 + i for i in range(20)}
    shown = shown_files(files)
    assert len(shown) == 6
    assert shown[0] == ("model-00019.safetensors", 1019)
    assert shown[-1][0] == "and 15 more"
    assert sum(n for _, n in shown) == sum(files.values())

"""What the commands print: the result on stdout, everything else on stderr.

On a terminal tables are rich's; elsewhere a row is a line, aligned and never cut, so that ``grep`` and ``awk`` work.
"""

import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monoquant_core.cli.signals import BROKEN_PIPE, Quit
from monoquant_core.encoding import ActivationQuant
from monoquant_core.errors import OutputError

GAP = "  "
RICH_ROWS = 2000  #: above, rich's layout would take longer than the plan itself


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False  #: numbers
    fold: bool = False  #: may take several lines on a narrow terminal


def out(text: str = "") -> None:
    """A line, or lines, of the result.

    :raises OutputError: when stdout takes no more, as on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:  # typer would make it status 1
        raise Quit(BROKEN_PIPE) from None
    except OSError as exc:
        raise OutputError(f"standard output: {exc.strerror or exc}") from exc


def note(text: str, *, quiet: bool = False) -> None:
    """A line for the reader that is not part of the result."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)


def out_json(data: Any) -> None:
    """One JSON document; numbers that JSON does not have are strings, as in ``Encoding.to_dict``."""
    out(json.dumps(_jsonable(data), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def printable(text: str) -> str:
    """``text`` with control characters escaped: a tensor's name must not be able to steer the terminal."""
    return "".join(c if c == "\n" or (c.isprintable() or c == " ") else _escape(c) for c in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def fits(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> bool:
    """Whether every row has a line of its own: always, except on a terminal that is too narrow."""
    if sys.stdout is None or not sys.stdout.isatty():
        return True
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    return sum(widths) + (len(GAP) + 1) * len(widths) <= shutil.get_terminal_size().columns


def sections(columns: Sequence[Column], groups: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Rows under headings, with the same columns throughout; for what would not fit as one table."""
    cells = {title: [[printable(c) for c in row] for row in rows] for title, rows in groups.items()}
    widths = [max(len(row[i]) for rows in cells.values() for row in rows) for i in range(len(columns))]
    for title, rows in cells.items():
        heading(printable(title))
        out("\n".join(GAP + _aligned(columns, widths, row) for row in rows))
        out()


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, footer: Sequence[str] | None = None) -> None:
    """Print rows under their titles.

    :param footer: a last row, set apart.
    """
    body = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    if len(body) <= RICH_ROWS and sys.stdout is not None and sys.stdout.isatty():
        _rich_table(columns, body, footer)
        return
    titles = [c.title for c in columns]
    lines = [titles, *body, *([list(footer)] if footer else [])]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(columns))]
    rule = GAP.join("-" * width for width in widths)
    text = [_aligned(columns, widths, line) for line in lines]
    text.insert(1, rule)
    if footer:
        text.insert(len(text) - 1, rule)
    out("\n".join(text))


def _aligned(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    fitted = (
        cell.rjust(width) if column.right else cell.ljust(width)
        for column, width, cell in zip(columns, widths, cells, strict=True)
    )
    return GAP.join(fitted).rstrip()


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], footer: Sequence[str] | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, show_footer=footer is not None, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(
            column.title,
            footer=Text(footer[index]) if footer else "",
            justify="right" if column.right else "left",
            no_wrap=not column.fold,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))  # Text: brackets of an encoding are not markup
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(grid)
    out("\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n"))


def heading(text: str) -> None:
    """A title over what follows."""
    bold = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    out(f"\033[1m{text}\033[0m" if bold else text)


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, aligned; a value may have several lines."""
    found = [(name, printable(value)) for name, value in pairs]
    width = max((len(name) for name, _ in found), default=0)
    indent = " " * (2 + width + len(GAP))
    for name, value in found:
        out(f"  {name.ljust(width)}{GAP}{value}".rstrip().replace("\n", f"\n{indent}"))


def notes(lines: Iterable[str], title: str = "notes") -> None:
    """A list of remarks, if there are any."""
    found = list(dict.fromkeys(lines))
    if found:
        out()
        heading(title)
        for line in found:
            out(f"  - {printable(line)}".replace("\n", "\n    "))


def size(nbytes: float) -> str:
    """Bytes for people: decimal units, as disks and downloads are sold."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(nbytes) >= 999.5 and len(units) > 1:
        nbytes /= 1000
        del units[0]
    return f"{nbytes:.0f} {units[0]}" if units[0] == "B" or abs(nbytes) >= 99.5 else f"{nbytes:.3g} {units[0]}"


def exact(nbytes: int) -> str:
    """Bytes for people and, from one kB on, to the byte."""
    return size(nbytes) if nbytes < 1000 else f"{size(nbytes)} ({nbytes:,} bytes)"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def shape(dims: Sequence[int]) -> str:
    """``3x4``; a scalar is ``scalar``."""
    return "x".join(map(str, dims)) or "scalar"


def decibels(value: float) -> str:
    """An SQNR; without a difference it is infinite."""
    return "exact" if value == math.inf else f"{value:.1f} dB" if math.isfinite(value) else "no signal"


def layer_inputs(activations: Iterable[ActivationQuant | None]) -> list[tuple[str, str]]:
    """A field on how inputs of layers are quantized when the model runs, where some are."""
    counted = Counter(str(activation) for activation in activations if activation is not None)
    said = ", ".join(f"{text}: {plural(count, 'layer')}" for text, count in counted.items())
    return [("inputs", said)] if said else []


def plural(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

"""What a benchmark finds: gates, tables and the sections they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Gate:
    """A figure and the bound it is held to."""

    what: str
    bound: float
    sense: Literal["at least", "at most"]
    unit: str  #: written after the number: "x", " s"
    best: float | None  #: None where it could not be measured
    median: float | None = None  #: what is judged, where a figure has several runs
    reason: str = ""  #: why it could not be measured

    @property
    def passed(self) -> bool | None:
        """Whether the figure keeps the bound; None where there is no figure."""
        judged = self.best if self.median is None else self.median
        if judged is None:
            return None
        return judged >= self.bound if self.sense == "at least" else judged <= self.bound

    def row(self) -> tuple[str, ...]:
        """Cells of the table of gates."""
        verdict = {True: "pass", False: "**miss**", None: f"not measured: {self.reason}"}[self.passed]
        bound = f"{'≥' if self.sense == 'at least' else '≤'} {number(self.bound)}{self.unit}"
        return self.what, bound, self._show(self.best), self._show(self.median), verdict

    def _show(self, value: float | None) -> str:
        return "" if value is None else f"{number(value)}{self.unit}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """One subject of the page."""

    title: str
    text: str
    tables: Sequence[Table]
    gates: Sequence[Gate] = field(default_factory=tuple)


def number(value: float) -> str:
    """About three significant digits, without an exponent for what occurs here."""
    if value == 0:
        return "0"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"

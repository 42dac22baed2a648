"""``compare``: how the tensors of two models differ."""

import math
from collections.abc import Sequence
from typing import Annotated

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.render import Column, decibels, fields, out, out_json, shape, table
from monoquant_core.plugins import Registry
from monoquant_core.report import Comparison


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    def compare(
        a: Annotated[str, typer.Argument(metavar="A", help="The reference. " + flags.SRC_HELP, show_default=False)],
        b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
        limit: Annotated[int, typer.Option("--limit", min=0, help="Show so many rows; 0 is all.")] = 20,
        json: flags.Json = False,
    ) -> None:
        """Compare two models tensor by tensor, the worst first; quantized tensors are dequantized."""
        from monoquant_core import api

        found = api.compare(a, b, registry=registry)
        shown = found[:limit] if limit else found
        if json:
            out_json({"counts": _counts(found), "tensors": [_as_dict(c) for c in shown]})
            return
        columns = [
            Column("tensor", fold=True),
            Column("shape"),
            Column("SQNR", right=True),
            Column("largest error", right=True),
            Column("cosine", right=True),
        ]
        table(columns, [_row(c) for c in shown])
        out()
        fields([(key, f"{count:,}") for key, count in _counts(found).items() if count or key == "compared"])
        if len(shown) < len(found):
            out(f"  {len(found) - len(shown):,} more; --limit 0 shows all")


def _row(c: Comparison) -> list[str]:
    dims = [shape(s) for s in c.shapes if s is not None]
    dims = list(dict.fromkeys(dims))
    if c.status != "compared":
        return [c.name, " / ".join(dims), c.status, "", ""]
    return [c.name, " / ".join(dims), decibels(c.sqnr_db), f"{c.max_error:.3g}", f"{c.cosine:.6f}"]


def _counts(found: Sequence[Comparison]) -> dict[str, int]:
    counts = {"compared": 0, "identical": 0}
    for c in found:
        counts[c.status] = counts.get(c.status, 0) + 1
        counts["identical"] += c.status == "compared" and c.sqnr_db == math.inf
    return counts


def _as_dict(c: Comparison) -> dict[str, object]:
    measured = {"sqnr_db": c.sqnr_db, "max_error": c.max_error, "cosine": c.cosine} if c.status == "compared" else {}
    return {"name": c.name, "status": c.status, "shapes": [s and list(s) for s in c.shapes], **measured}

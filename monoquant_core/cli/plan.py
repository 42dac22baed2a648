"""``plan``: what a run would do, from headers alone. ``quantize --dry-run`` and ``export --dry-run`` print the same."""

from pathlib import Path
from typing import Annotated, Any

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.options import Typed, roles, with_options
from monoquant_core.cli.render import (
    Column,
    exact,
    fields,
    fits,
    note,
    notes,
    out,
    out_json,
    plural,
    sections,
    shape,
    size,
    table,
)
from monoquant_core.cli.selection import select
from monoquant_core.planning import Decision, Plan, Step, describe
from monoquant_core.plugins import Registry


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    @with_options(roles(registry, "scheme", "format"))
    def plan(
        src: flags.Src,
        typed: Typed,
        scheme: flags.Scheme = "",
        format: flags.Format = "safetensors",
        recipe: flags.Recipe = None,
        set_: flags.Set = None,
        keep: flags.Keep = None,
        param: flags.Param = None,
        save: Annotated[
            Path | None,
            typer.Option("--save", metavar="RECIPE.toml", help="Write a recipe that repeats this.", show_default=False),
        ] = None,
        threads: flags.Threads = 0,
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
    ) -> None:
        """Show what quantize would do to every tensor, the exact size of the result and the memory it takes.

        Reads headers only: a checkpoint of any size takes a moment.
        """
        from monoquant_core import api

        chosen = select(
            registry,
            scheme=scheme,
            format=format,
            recipe=recipe,
            set_=set_,
            keep=keep,
            unsafe_pickle=unsafe_pickle,
            typed=typed,
            quiet=json,
        )
        with api.quantize(src, **chosen.quantizing) as model:
            made = model.plan(**chosen.saving)
        show_plan(made, threads=threads, json=json)
        if save is not None:
            api.save_recipe(made, save)
            note(f"wrote {save}")


def show_plan(plan: Plan, *, threads: int, json: bool) -> None:
    """Print a plan: a row for every tensor with its reason, then totals and notes."""
    from monoquant_core.memory import usable_cores, working_bytes

    memory = working_bytes([plan], threads or usable_cores())
    if json:
        out_json({**plan.to_dict(), "working_memory_bytes": memory})
        return
    steps = plan.steps_of()
    rows = [_row(decision, steps[decision.spec.name]) for decision in plan.decisions]
    rows += [_derived(step) for step in plan.steps if not step.specs]
    total = ["total", "", "", "", size(plan.bytes_before), size(sum(step.nbytes for step in plan.steps)), ""]
    if fits(COLUMNS, rows):
        table(COLUMNS, rows, footer=total)
        out()
    else:
        groups: dict[str, list[list[str]]] = {}
        for name, dims, before, after, nbytes, left, reason in rows:
            groups.setdefault(f"{before} -> {after}  {reason}", []).append([name, dims, nbytes, left])
        sections([COLUMNS[0], COLUMNS[1], COLUMNS[4], COLUMNS[5]], groups)
    fields(totals(plan, memory))
    notes(plan.notes)


def totals(plan: Plan, memory: int) -> list[tuple[str, str]]:
    """What a plan comes to."""
    counted: dict[str, Any] = {}
    for decision in plan.decisions:
        counted[_ACTIONS[decision.action]] = counted.get(_ACTIONS[decision.action], 0) + 1
    ratio = f", {plan.bytes_before / plan.bytes_after:.2f}x smaller" if 0 < plan.bytes_after < plan.bytes_before else ""
    return [
        ("tensors", ", ".join(f"{count:,} {action}" for action, count in counted.items())),
        ("before", exact(plan.bytes_before)),
        ("after", f"{exact(plan.bytes_after)} in {plural(len(plan.files), 'file')}{ratio}"),
        ("weights", f"{plan.bits_per_weight:.2f} bits each, scales included"),
        ("memory", f"{size(memory)} while it runs, beside Python and torch"),
    ]


COLUMNS = (
    Column("tensor", fold=True),
    Column("shape"),
    Column("from"),
    Column("to", fold=True),
    Column("before", right=True),
    Column("after", right=True),
    Column("reason", fold=True),
)

_ACTIONS = {
    "quantize": "quantized",
    "cast": "cast",
    "keep": "kept",
    "dequantize": "dequantized",
    "drop": "left out",
    "derive": "derived",
}


def _row(decision: Decision, steps: list[Step]) -> list[str]:
    spec = decision.spec
    before = str(spec.encoding) if spec.encoding is not None else spec.dtype
    stored = " + ".join(dict.fromkeys(describe(step) for step in steps))
    if not steps:
        after, nbytes = "left out", "0 B"
    else:
        after = "kept" if stored == before else stored
        nbytes = size(sum(step.nbytes // max(1, len(step.specs)) for step in steps))
    stored_bytes = "-" if spec.tied_to is not None else size(spec.nbytes)  # a tied name is the same bytes
    return [spec.name, shape(spec.shape), before, after, stored_bytes, nbytes, decision.reason]


def _derived(step: Step) -> list[str]:
    output = step.placed.output
    return [output.name, shape(output.shape), "-", describe(step), "-", size(step.nbytes), step.reason]

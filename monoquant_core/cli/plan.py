"""``plan``: what a run would do, from headers alone. ``quantize --dry-run`` and ``export --dry-run`` print the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from monoquant_core.cli import calibration, flags
from monoquant_core.cli.options import Typed, roles, with_options
from monoquant_core.cli.render import (
    Column,
    exact,
    fields,
    fits,
    heading,
    layer_inputs,
    note,
    notes,
    out,
    out_json,
    plural,
    printable,
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
        format: flags.Format = "",
        also: flags.Also = None,
        recipe: flags.Recipe = None,
        set_: flags.Set = None,
        keep: flags.Keep = None,
        param: flags.Param = None,
        save: Annotated[
            Path | None,
            typer.Option("--save", metavar="RECIPE.toml", help="Write a recipe that repeats this.", show_default=False),
        ] = None,
        threads: flags.Threads = 0,
        weights: flags.Weights = None,
        data: flags.Data = "",
        stats: flags.Stats = None,
        calibrator: flags.Calibrator = calibration.DEFAULT,
        samples: flags.Samples = 256,
        batch_size: flags.BatchSize = 32,
        seed: flags.Seed = 0,
        preprocess: flags.Preprocess = "",
        data_tokenizer: flags.Tokenizer = "",
        length: flags.Length = 0,
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
    ) -> None:
        """Show what quantize would do to every tensor, the exact size of the result and the memory it takes.

        Reads headers only, unless --data has to be run: a checkpoint of any size takes a moment.
        """
        from monoquant_core import api

        chosen = select(
            registry,
            output=None,
            also=also,
            scheme=scheme,
            format=format,
            recipe=recipe,
            set_=set_,
            keep=keep,
            unsafe_pickle=unsafe_pickle,
            typed=typed,
            quiet=json,
        )
        taken = calibration.Samples(data, calibrator, samples, batch_size, seed, preprocess, data_tokenizer, length)
        known = None if data else stats
        with api.quantize(src, weights=weights, stats=known, **chosen.quantizing) as model:
            calibration.use(model, taken, stats, registry, device="cpu", quiet=json, **chosen.saving)
            plans = [(chosen.saving["format"], model.plan(**chosen.saving))]
            for a in chosen.also:
                made = model.variant(a.scheme, a.options).plan(**a.saving, destination=a.path.name)
                plans.append((str(a.path), made))
        show_plans(plans, threads=threads, json=json)
        if save is not None:
            api.save_recipe(plans[0][1], save)
            note(f"wrote {save}")


def show_plans(plans: Sequence[tuple[str, Plan]], *, threads: int, json: bool) -> None:
    """Print the plans of one run: for each a row for every tensor with its reason, then totals and notes.

    :param plans: with the names of their outputs, which are shown where there are several.
    """
    from monoquant_core.memory import working_bytes

    memory = working_bytes([plan for _, plan in plans], threads)
    if json:
        found = [plan.to_dict() for _, plan in plans]
        several = {"outputs": [{"output": name, **data} for (name, _), data in zip(plans, found, strict=True)]}
        out_json({**(found[0] if len(found) == 1 else several), "working_memory_bytes": memory})
        return
    for number, (name, plan) in enumerate(plans):
        if len(plans) > 1:
            if number:
                out()
            heading(printable(f"{name}, output {number + 1} of {len(plans)}"))
            out()
        _show_plan(plan, memory if number == len(plans) - 1 else None)


def _show_plan(plan: Plan, memory: int | None) -> None:
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


def totals(plan: Plan, memory: int | None) -> list[tuple[str, str]]:
    """What a plan comes to.

    :param memory: of the whole run; None where that is said elsewhere.
    """
    counted: dict[str, Any] = {}
    for decision in plan.decisions:
        counted[_ACTIONS[decision.action]] = counted.get(_ACTIONS[decision.action], 0) + 1
    ratio = f", {plan.bytes_before / plan.bytes_after:.2f}x smaller" if 0 < plan.bytes_after < plan.bytes_before else ""
    found = [
        ("tensors", ", ".join(f"{count:,} {action}" for action, count in counted.items())),
        ("before", exact(plan.bytes_before)),
        ("after", f"{exact(plan.bytes_after)} in {plural(len(plan.files), 'file')}{ratio}"),
        ("weights", f"{plan.bits_per_weight:.2f} bits each, scales included"),
    ]
    found += layer_inputs(step.activation for step in plan.steps)
    if memory is not None:
        found.append(("memory", f"{size(memory)} while it runs, beside Python and torch"))
    return found


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

"""What ``quantize`` and ``export`` share: write a model, or only show the plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.cli import flags
from monoquant_core.cli.plan import show_plans
from monoquant_core.cli.progress import reporter
from monoquant_core.cli.summary import show_reports

if TYPE_CHECKING:
    from monoquant_core.quantized import QuantizedModel


def save_or_plan(
    outputs: Sequence[tuple["QuantizedModel", Path | None, Mapping[str, Any]]],
    *,
    dry_run: bool,
    threads: int,
    device: str,
    force: bool,
    fresh: bool,
    nonfinite: flags.NonfiniteChoice,
    json: bool,
    quiet: bool,
) -> None:
    """Write the outputs in one pass and print the summaries, or print what would be done.

    :param outputs: models, where they go, and the format with its options, as ``QuantizedModel.plan`` takes them.
    """
    from monoquant_core.quantized import Target, plan_all, save_all

    targets = [Target(model, path, **choice) for model, path, choice in outputs if path is not None]
    if dry_run and len(targets) == len(outputs):
        show_plans([(str(path), plan) for plan, path in plan_all(targets)], threads=threads, json=json)
        return
    if dry_run:  # of an output without a name
        plans = [
            (str(path or f["format"]), model.plan(**f, destination=flags.name_of(path))) for model, path, f in outputs
        ]
        show_plans(plans, threads=threads, json=json)
        return
    how: dict[str, Any] = {"threads": threads, "device": device, "force": force, "fresh": fresh}
    with reporter(quiet=quiet) as progress:
        reports = save_all(targets, **how, nonfinite=nonfinite.value, progress=progress)
    if json or not quiet:
        show_reports(reports, json=json)

"""What ``quantize`` and ``export`` share: write a model, or only show the plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.cli import flags
from monoquant_core.cli.plan import show_plan
from monoquant_core.cli.progress import reporter
from monoquant_core.cli.summary import show_report

if TYPE_CHECKING:
    from monoquant_core.api import QuantizedModel


def save_or_plan(
    model: "QuantizedModel",
    output: Path | None,
    choice: Mapping[str, Any],
    *,
    dry_run: bool,
    threads: int,
    device: str,
    force: bool,
    nonfinite: flags.NonfiniteChoice,
    json: bool,
    quiet: bool,
) -> None:
    """Write the model and print the summary, or print what would be done.

    :param choice: the format and its options, as ``QuantizedModel.plan`` and ``save`` take them.
    """
    if output is None or dry_run:
        show_plan(model.plan(**choice, destination=flags.name_of(output)), threads=threads, json=json)
        return
    how: dict[str, Any] = {"threads": threads, "device": device, "force": force, "nonfinite": nonfinite.value}
    with reporter(quiet=quiet) as progress:
        report = model.save(output, **choice, **how, progress=progress)
    if not quiet:
        show_report(report, json=json)

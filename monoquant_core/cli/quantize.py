"""``quantize``: from a checkpoint to a finished file."""

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.options import Typed, roles, with_options
from monoquant_core.cli.plan import show_plan
from monoquant_core.cli.progress import reporter
from monoquant_core.cli.selection import select
from monoquant_core.cli.summary import show_report
from monoquant_core.plugins import Registry


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    @with_options(roles(registry, "scheme", "format"))
    def quantize(
        src: flags.Src,
        typed: Typed,
        output: flags.Output = None,
        scheme: flags.Scheme = "",
        format: flags.Format = "safetensors",
        recipe: flags.Recipe = None,
        set_: flags.Set = None,
        keep: flags.Keep = None,
        param: flags.Param = None,
        dry_run: flags.DryRun = False,
        threads: flags.Threads = 0,
        device: flags.Device = "cpu",
        force: flags.Force = False,
        nonfinite: flags.Nonfinite = flags.NonfiniteChoice.refuse,
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
        quiet: flags.Quiet = False,
    ) -> None:
        """Quantize a model and write it as a file that its runtime loads.

        The output holds nothing, what it held before, or the complete new file, whatever happens.
        """
        from monoquant_core import api

        if output is None and not dry_run:
            raise flags.missing_output()
        chosen = select(
            registry,
            scheme=scheme,
            format=format,
            recipe=recipe,
            set_=set_,
            keep=keep,
            unsafe_pickle=unsafe_pickle,
            typed=typed,
            quiet=quiet or json,
        )
        with api.quantize(src, **chosen.quantizing) as model:
            if output is None or dry_run:
                made = model.plan(**chosen.saving, destination=flags.name_of(output))
                show_plan(made, threads=threads, json=json)
                return
            with reporter(quiet=quiet) as progress:
                report = model.save(
                    output,
                    **chosen.saving,
                    threads=threads,
                    device=device,
                    force=force,
                    nonfinite=nonfinite.value,
                    progress=progress,
                )
        if not quiet:
            show_report(report, json=json)

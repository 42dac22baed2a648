"""``quantize``: from a checkpoint to a finished file."""

import typer

from monoquant_core.cli import calibration, flags
from monoquant_core.cli.options import Typed, roles, with_options
from monoquant_core.cli.saving import save_or_plan
from monoquant_core.cli.selection import select
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
        format: flags.Format = "",
        also: flags.Also = None,
        recipe: flags.Recipe = None,
        set_: flags.Set = None,
        keep: flags.Keep = None,
        param: flags.Param = None,
        dry_run: flags.DryRun = False,
        threads: flags.Threads = 0,
        device: flags.Device = "cpu",
        force: flags.Force = False,
        fresh: flags.Fresh = False,
        nonfinite: flags.Nonfinite = flags.NonfiniteChoice.refuse,
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
            output=output,
            also=also,
            scheme=scheme,
            format=format,
            recipe=recipe,
            set_=set_,
            keep=keep,
            unsafe_pickle=unsafe_pickle,
            typed=typed,
            quiet=quiet or json,
        )
        taken = calibration.Samples(data, calibrator, samples, batch_size, seed, preprocess, data_tokenizer, length)
        known = None if data else stats
        with api.quantize(src, weights=weights, stats=known, **chosen.quantizing) as model:
            calibration.use(model, taken, stats, registry, device=device, quiet=quiet or json, **chosen.saving)
            others = [(model.variant(a.scheme, a.options), a.path, a.saving) for a in chosen.also]
            save_or_plan(
                [(model, output, chosen.saving), *others],
                dry_run=dry_run,
                threads=threads,
                device=device,
                force=force,
                fresh=fresh,
                nonfinite=nonfinite,
                json=json,
                quiet=quiet,
            )

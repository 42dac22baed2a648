"""``export``: the same values in another file format."""

from typing import Annotated, Any

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.options import Typed, roles, with_options
from monoquant_core.cli.saving import save_or_plan
from monoquant_core.plugins import Registry

Requantize = Annotated[
    str,
    typer.Option("--scheme", metavar="NAME", help="Scheme for --on-unsupported requantize.", show_default=False),
]
ExampleData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Samples as calibrate takes them: examples of the inputs, for a format that traces the model.",
        show_default=False,
    ),
]


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    @with_options(roles(registry, "scheme", "format"))
    def export(
        src: flags.Src,
        typed: Typed,
        output: flags.Output = None,
        format: flags.Format = "",
        on_unsupported: flags.OnUnsupported = flags.UnsupportedChoice.error,
        scheme: Requantize = "",
        param: flags.Param = None,
        dry_run: flags.DryRun = False,
        threads: flags.Threads = 0,
        device: flags.Device = "cpu",
        force: flags.Force = False,
        fresh: flags.Fresh = False,
        nonfinite: flags.Nonfinite = flags.NonfiniteChoice.refuse,
        weights: flags.Weights = None,
        data: ExampleData = "",
        preprocess: flags.Preprocess = "",
        data_tokenizer: flags.Tokenizer = "",
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
        quiet: flags.Quiet = False,
    ) -> None:
        """Write a model in another format: finished files are repacked, floats stay floats.

        Nothing is quantized again unless --on-unsupported asks for it.
        """
        from monoquant_core import api
        from monoquant_core.quantized import QuantizedModel, format_for

        if output is None and not dry_run:
            raise flags.missing_output()
        api.check_exported(scheme, on_unsupported.value)
        format = format or format_for(output or "", registry)
        chosen = registry.scheme(scheme) if scheme else None  # not a recipe
        options = typed.options(scheme=chosen, format=registry.exporter(format))
        saving: dict[str, Any] = {
            "format": format,
            "format_options": options["format"],
            "on_unsupported": on_unsupported.value,
        }
        source = api.open_source(src, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
        with QuantizedModel(source, registry, scheme, options["scheme"], quantizing=False) as model:
            if data:
                model.calibration(data, samples=2, preprocess=preprocess, tokenizer=data_tokenizer)
            save_or_plan(
                [(model, output, saving)],
                dry_run=dry_run,
                threads=threads,
                device=device,
                force=force,
                fresh=fresh,
                nonfinite=nonfinite,
                json=json,
                quiet=quiet,
            )

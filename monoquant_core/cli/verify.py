"""``verify``: a finished file in its runtime, against what it holds and what it was made from."""

import contextlib
import io
from typing import Annotated, Any

import typer

from monoquant_core.agreement import Agreement, Quality, Verification
from monoquant_core.cli import flags
from monoquant_core.cli.render import Column, notes, out, out_json, table
from monoquant_core.plugins import Registry

FAILED = 1


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    def verify(
        path: Annotated[str, typer.Argument(metavar="OUT", help="The finished file or folder.", show_default=False)],
        against: Annotated[
            str,
            typer.Option("--against", metavar="SRC", help="What was quantized. " + flags.SRC_HELP, show_default=False),
        ],
        runtime: Annotated[
            str, typer.Option("--runtime", metavar="NAME", help="Which one, where several run it.", show_default=False)
        ] = "",
        tolerance: Annotated[
            float | None,
            typer.Option(
                "--tolerance",
                metavar="NUMBER",
                min=0.0,
                help="Largest relative error against the file's own values; without it, what the runtime's arithmetic "
                "explains.",
                show_default=False,
            ),
        ] = None,
        weights: flags.Weights = None,
        data: flags.Data = "",
        samples: flags.Samples = 256,
        batch_size: flags.BatchSize = 32,
        seed: flags.Seed = 0,
        preprocess: flags.Preprocess = "",
        data_tokenizer: flags.Tokenizer = "",
        length: flags.Length = 0,
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
    ) -> None:
        """Run a finished file in its runtime and compare outputs: with its own dequantized values, and the original's.

        Exit status 1 when it is out of tolerance. Without --data the inputs are made up, and no quality is measured; an
        array 'labels' in the data is the right classes.
        """
        from monoquant_core import api

        with contextlib.redirect_stderr(io.StringIO()):  # bars of the libraries that load models
            found = api.verify(
                path,
                against,
                data or None,
                runtime=runtime,
                tolerance=tolerance,
                weights=weights,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
                preprocess=preprocess,
                tokenizer=data_tokenizer,
                length=length,
                unsafe_pickle=unsafe_pickle,
                registry=registry,
            )
        if json:
            out_json(_as_dict(found))
        else:
            _show(found)
        if not found.passed:
            raise typer.Exit(FAILED)


def _show(found: Verification) -> None:
    columns = [
        Column("output"),
        Column("against"),
        Column("cosine", right=True),
        Column("worst", right=True),
        Column("relative error", right=True),
        Column("allowed", right=True),
        Column("largest", right=True),
        Column("same top", right=True),
        Column("result"),
    ]
    out(f"{found.path} in {found.runtime}, {found.samples} samples{'' if found.scored else ', made up'}")
    out()
    table(columns, [_row(agreement) for agreement in found.agreements])
    for quality in found.qualities:
        out()
        out(_sentence(quality))
    notes(found.notes)


def _row(a: Agreement) -> list[str]:
    allowed = "" if a.bound is None else f"{a.bound:.2g}"
    top = "" if a.same_top is None else f"{a.same_top:.1%}"
    result = "" if a.bound is None else "within" if a.passed else "OUT OF TOLERANCE"
    errors = [f"{a.cosine:.6f}", f"{a.worst_cosine:.6f}", f"{a.relative_error:.3g}", allowed, f"{a.max_error:.3g}"]
    return [a.output, a.against, *errors, top, result]


def _sentence(quality: Quality) -> str:
    change = f"{abs(quality.degradation):.2%} {'worse' if quality.degradation > 0 else 'better'}"
    values = f"{quality.before:.4g} before, {quality.after:.4g} after"
    return f"{quality.metric}: {values} ({change}; {quality.count:,} predictions)"


def _as_dict(found: Verification) -> dict[str, Any]:
    fields = (
        "output",
        "against",
        "cosine",
        "worst_cosine",
        "relative_error",
        "max_error",
        "same_top",
        "bound",
        "passed",
    )
    return {
        "path": str(found.path),
        "runtime": found.runtime,
        "samples": found.samples,
        "made_up": not found.scored,
        "passed": found.passed,
        "agreements": [{name: getattr(a, name) for name in fields} for a in found.agreements],
        "qualities": [
            {
                "metric": q.metric,
                "count": q.count,
                "before": q.before,
                "after": q.after,
                "degradation": q.degradation,
            }
            for q in found.qualities
        ],
        "notes": list(found.notes),
    }

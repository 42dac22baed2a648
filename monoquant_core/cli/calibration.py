"""``calibrate``, and what other commands do with ``--data`` and ``--stats``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.progress import sample_reporter
from monoquant_core.cli.render import exact, fields, out, out_json, printable
from monoquant_core.errors import OptionError, OutputError
from monoquant_core.plugins import Registry

if TYPE_CHECKING:
    from monoquant_core.quantized import QuantizedModel
    from monoquant_core.statistics import Statistics

DEFAULT = "mse"

StatsFile = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="File of statistics to write.", show_default=False),
]
GraphFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="A format that needs a graph, such as onnx: values that only its graph has are learned, too.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the flags say of calibration data."""

    data: str
    calibrator: str = DEFAULT
    samples: int = 256
    batch_size: int = 32
    seed: int = 0
    preprocess: str = ""
    tokenizer: str = ""
    length: int = 0

    def arguments(self, registry: Registry) -> dict[str, Any]:
        """Keyword arguments of ``QuantizedModel.calibrate``, but for the data.

        :raises MonoquantError: for an unknown calibrator, or an option that it does not take.
        """
        name, options = parse_calibrator(self.calibrator, registry)
        taken = ("samples", "batch_size", "seed", "preprocess", "tokenizer", "length")
        return {"calibrator": name, "options": options, **{key: getattr(self, key) for key in taken}}


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    def calibrate(
        src: flags.Src,
        data: flags.Data,
        output: StatsFile,
        weights: flags.Weights = None,
        calibrator: flags.Calibrator = DEFAULT,
        samples: flags.Samples = 256,
        batch_size: flags.BatchSize = 32,
        seed: flags.Seed = 0,
        preprocess: flags.Preprocess = "",
        data_tokenizer: flags.Tokenizer = "",
        length: flags.Length = 0,
        format: GraphFormat = "",
        device: flags.Device = "cpu",
        force: flags.Force = False,
        unsafe_pickle: flags.UnsafePickle = False,
        json: flags.Json = False,
        quiet: flags.Quiet = False,
    ) -> None:
        """Run a model on samples, and write what was learned for static quantization and for weighted searches.

        Statistics of the same model, samples and calibrator are left as they are. Whatever speaks against the data is
        said as a warning.
        """
        from monoquant_core import api
        from monoquant_core.quantized import QuantizedModel

        chosen = Samples(data, calibrator, samples, batch_size, seed, preprocess, data_tokenizer, length)
        arguments = chosen.arguments(registry)
        source = api.open_source(src, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
        with QuantizedModel(source, registry, quantizing=False) as model:
            job = model.calibration(data, **arguments, format=format, device=device)
            stats = _kept(output, job, force)
            if stats is None:
                with sample_reporter(samples, quiet=quiet or json) as progress:
                    stats = job.run(progress)
                stats.save(output, force=force)
        if json:
            out_json(summary(stats, output))
        elif not quiet:
            _show(stats, output)
        warn(stats, quiet=False)


def use(
    model: "QuantizedModel",
    chosen: Samples,
    stats: Path | None,
    registry: Registry,
    *,
    device: str,
    quiet: bool,
    format: str,
    format_options: dict[str, Any],
) -> None:
    """Calibrate a model before it is planned, if the flags say so, and say what speaks against the data.

    :param stats: a file of statistics that is used if it is of this model and data; None keeps one in the user's cache.
    """
    if not chosen.data:
        return
    arguments = chosen.arguments(registry)
    with sample_reporter(chosen.samples, quiet=quiet) as progress:
        found = model.calibrate(
            chosen.data,
            **arguments,
            format=format,
            format_options=format_options,
            device=device,
            cache=stats,
            keep=stats is None,
            progress=progress,
        )
    warn(found, quiet=quiet)


def warn(stats: "Statistics", *, quiet: bool) -> None:
    """Say what speaks against the data, on stderr, always; and what else is to be said."""
    for finding in stats.findings:
        typer.echo(f"warning: {printable(finding.text)}", err=True)
    for text in () if quiet else stats.notes:
        typer.echo(f"note: {printable(text)}", err=True)


def parse_calibrator(text: str, registry: Registry) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME:key=value,key=value``.

    :raises MonoquantError: for an unknown name or option, or a value that is not allowed.
    """
    from monoquant_core.options import build, option_infos, parse

    name, _, rest = text.partition(":")
    declared = registry.calibrator(name)
    infos = {info.name: info for info in option_infos(declared.options)}
    values: dict[str, Any] = {}
    owner = f"--calibrator {declared.name}"
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise OptionError(f"{owner}: {pair!r} is not key=value")
        values[key] = parse(infos[key], value, owner=owner) if key in infos else value
    build(declared.options, values, owner=owner)
    return declared.name, values


def _kept(output: Path, job: Any, force: bool) -> "Statistics | None":
    """The statistics that the output holds already, if they are the ones to be made.

    :raises OutputError: when it holds others, and may not be replaced.
    """
    from monoquant_core.errors import CalibrationError
    from monoquant_core.statistics import Statistics

    if not output.exists():
        return None
    try:
        found = Statistics.load(output)
        difference = found.differs(job.key())
    except CalibrationError as exc:
        if force:
            return None
        raise OutputError(f"{exc}; it is not replaced", hint="--force replaces it") from exc
    if not difference:
        return found
    if not force:
        raise OutputError(f"{output}: already exists, of {difference}", hint="--force replaces it")
    return None


def _show(stats: "Statistics", output: Path) -> None:
    out(f"statistics in {output}")
    moved = [s.moved for s in stats.values() if s.moved is not None]
    pairs = [
        ("points", f"{len(stats):,}"),
        ("samples", f"{stats.samples:,}"),
        ("calibrator", stats.calibrator),
        ("size", exact(output.stat().st_size)),
    ]
    if moved:
        pairs.append(("ranges", f"moved by at most {max(moved):.2f} widths from the earlier to the later samples"))
    fields(pairs)


def summary(stats: "Statistics", output: Path) -> dict[str, Any]:
    """JSON form of what was learned."""
    points = {}
    for point, found in stats.items():
        low, high = found.low, found.high
        points[point] = {
            "count": found.count,
            "minimum": float(found.minimum.min()),
            "maximum": float(found.maximum.max()),
            "low": None if low is None else float(low.min()),
            "high": None if high is None else float(high.max()),
            "clipped": found.clipped,
            "outlier": found.outlier,
            "moved": found.moved,
            "dead": found.dead,
            "constant": found.constant,
        }
    return {
        "destination": str(output),
        "calibrator": stats.calibrator,
        "samples": stats.samples,
        "points": points,
        "warnings": [{"kind": f.kind, "text": f.text, "points": list(f.points)} for f in stats.findings],
        "notes": list(stats.notes),
    }

"""Arguments and flags that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SRC_HELP = (
    "A model folder, .safetensors, .pt/.pth/.bin/.ckpt (a state dict), .pt2, or a finished file that a plugin reads."
)

Src = Annotated[str, typer.Argument(metavar="SRC", help=SRC_HELP, show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.", show_default=False),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        show_default=False,
        help="File format; see 'formats list'. Without it: what the suffix of OUT says, or safetensors.",
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="OUTPUT",
        show_default=False,
        help="Another output, written in the same pass: SCHEME=PATH, or SCHEME:key=value,...=PATH with options of the "
        "scheme and the format. Its format is what the suffix of PATH says, the key format, or that of OUT, with the "
        "same options. --recipe, --set and --keep hold for all. Repeatable.",
    ),
]
Scheme = Annotated[
    str,
    typer.Option(
        "--scheme",
        metavar="NAME",
        show_default=False,
        help="Scheme or named recipe for what no rule takes; see 'schemes list'. Without it, --recipe and --set: int8.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Rules in a TOML file.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="RULE",
        help="PATTERN=SCHEME or PATTERN=SCHEME:key=value,... for tensors or modules that match; the first rule that "
        "matches decides. Repeatable.",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", metavar="PATTERN", help="Leave tensors that match as they are. Repeatable.", show_default=False
    ),
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=0, help="Worker threads; 0 is one per usable core. They never change a byte."),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps, xpu.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on success.")]
UnsafePickle = Annotated[
    bool,
    typer.Option("--unsafe-pickle", help="Read a pickle that may run code. Only for files you would run as a program."),
]
Param = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        metavar="NAME=VALUE",
        help="An option of the scheme or the format by name, where it has no flag of its own; 'scheme.NAME' or "
        "'format.NAME' where both have one. Repeatable.",
        show_default=False,
    ),
]


class NonfiniteChoice(StrEnum):
    """What to do about NaN and infinity in the weights."""

    refuse = "refuse"
    allow = "allow"


class UnsupportedChoice(StrEnum):
    """What to do with quantized tensors that a format cannot hold."""

    error = "error"
    requantize = "requantize"
    dequantize = "dequantize"


Nonfinite = Annotated[
    NonfiniteChoice,
    typer.Option("--nonfinite", help="NaN and infinity in tensors that are kept: refuse them, or allow them."),
]
OnUnsupported = Annotated[
    UnsupportedChoice,
    typer.Option("--on-unsupported", help="Quantized tensors that the format cannot hold as they are."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be done, as plan does.")]


def missing_output() -> typer.BadParameter:
    """The usage error of a command that needs ``-o`` unless it only plans."""
    return typer.BadParameter("say where to write: -o OUT (or --dry-run)", param_hint="--output")


def name_of(output: Path | None) -> str:
    """The name of a destination, for a plan."""
    return output.name if output is not None else ""

"""Arguments and flags that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SRC_HELP = (
    "A model folder, .safetensors, .pt/.pth/.bin/.ckpt (a state dict), .pt2, pkg.mod:factory, or a finished file that "
    "a plugin reads."
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
    typer.Option(
        "--threads",
        min=0,
        help="Worker threads; 0 is one per usable core, at most 8, or 4 for an accelerator. They never change a byte.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps, xpu.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin anew, whatever an interrupted run had done; without it that is resumed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on success but what --json asks for.")]
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


Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="Checkpoint for the module that pkg.mod:factory makes.", show_default=False
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Samples to run the model on: .npz, .npy, .safetensors or .pt (or FILE:KEY), .txt or .jsonl, a folder of "
        "images, or pkg.mod:function that yields batches.",
        show_default=False,
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="FILE",
        help="Statistics that calibrate wrote. With --data: used if they are of this model and data, made if there is "
        "no such file.",
        show_default=False,
    ),
]
Calibrator = Annotated[
    str,
    typer.Option(
        "--calibrator",
        metavar="NAME[:key=value,...]",
        help="How ranges are found, with its options; see 'calibrators list'.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Samples to take of --data.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples that run at once.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides which samples are taken, and in which order.")]
Preprocess = Annotated[
    str,
    typer.Option(
        "--preprocess",
        metavar="pkg.mod:function",
        help="Makes what the model takes of each image, or of each batch of arrays.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    str,
    typer.Option(
        "--data-tokenizer", metavar="FILE", help="A tokenizer.json for text, if the model has none.", show_default=False
    ),
]
Length = Annotated[
    int, typer.Option("--length", min=0, help="Tokens of a sample of text; 0 is what the model takes, at most 512.")
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

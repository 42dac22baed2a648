"""``python -m benchmarks``: measure, then write docs/performance.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.page import machine, render
from benchmarks.results import Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
SIZES, QUICK_SIZES, DEVICE_SIZES = (1.2, 8.0), (0.004, 0.02), (1.2, 4.0)  # gigabytes

QUICK = "A quick run: sizes are so small that figures and gates mean nothing."


def main() -> None:
    """Measure what is asked for."""
    args = _arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    described = machine()
    with tempfile.TemporaryDirectory(prefix="monoquant-bench-", dir=args.temp) as folder:
        sections = [section for name in args.only for section in _measure(name, Path(folder), args)]
    complete = set(args.only) == set(AREAS)
    page = render(sections, described, QUICK if args.quick else "", only=() if complete else args.only)
    complete = complete and not args.quick
    if output := args.output or (PAGE if complete else None):
        output.write_text(page, encoding="utf-8")
        print(f"wrote {output}", file=sys.stderr)
    else:
        print(page)
    missed = [gate.what for section in sections for gate in section.gates if gate.passed is False]
    print(f"{len(missed)} gates missed" + "".join(f"\n  {what}" for what in missed), file=sys.stderr)


def _startup(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import startup

    return [startup.measure(temp, rounds=1 if args.quick else 9)]


def _kernels(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import accuracy, kernels

    size, rounds = (512, 2) if args.quick else (4096, 15)
    return [kernels.measure(temp, size=size, rounds=rounds), accuracy.measure()]


def _pipeline(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import pipeline

    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    return [pipeline.measure(temp, sizes=sizes, rounds=1 if args.quick else args.rounds)]


def _gguf(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import gguf

    rows, rounds = (16, 1) if args.quick else (1024, 9)
    size, runs = (QUICK_SIZES[0], 1) if args.quick else (None, max(1, args.rounds // 2))
    return [gguf.measure_types(rows=rows, rounds=rounds), gguf.measure_pipeline(temp, size=size, rounds=runs)]


def _onnx(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import onnx_files

    large = onnx_files.measure_large(temp, gigabytes=QUICK_SIZES[0] if args.quick else onnx_files.LARGE_GB)
    if args.quick:
        return [onnx_files.measure_cnn(temp, rounds=1, images=250, rules=["minmax"]), large]
    return [onnx_files.measure_cnn(temp, rounds=60), onnx_files.measure_encoder(temp, rounds=40), large]


def _device(temp: Path, args: argparse.Namespace) -> list[Section]:
    from benchmarks import device

    sizes = args.sizes or (QUICK_SIZES[:1] if args.quick else DEVICE_SIZES)
    size, rounds, runs = (512, 1, 1) if args.quick else (4096, 9, max(1, args.rounds // 3))
    return device.measure(temp, size=size, rounds=rounds, sizes=sizes, runs=runs)


AREAS: dict[str, Callable[[Path, argparse.Namespace], list[Section]]] = {
    "kernels": _kernels,
    "gguf": _gguf,
    "onnx": _onnx,
    "pipeline": _pipeline,
    "startup": _startup,
    "device": _device,
}


def _measure(name: str, temp: Path, args: argparse.Namespace) -> list[Section]:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    return AREAS[name](temp, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=AREAS, help="measure a part; prints the page")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; prints the page")
    parser.add_argument("--output", type=Path, help=f"where to write the page (a complete run: {PAGE.name})")
    parser.add_argument(
        "--sizes", type=lambda text: tuple(map(float, text.split(","))), help="checkpoints, in GB: 1.2,8"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of the pipeline; a third of them for 4 GB and more")
    parser.add_argument("--temp", type=Path, help="folder for checkpoints: room for twice the largest, not in memory")
    args = parser.parse_args()
    args.only = args.only or list(AREAS)
    return args


if __name__ == "__main__":
    main()

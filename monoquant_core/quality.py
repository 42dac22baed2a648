"""Whether calibration data can be trusted: what speaks against it, with the number and what to do. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monoquant_core.stats import TensorStats

#: fewer samples than this are too few for ranges that hold on other data
SAMPLES = 100
#: share of a tensor's values outside of its range
CLIPPED = 0.01
#: a range that reaches further than so many times the 99.9th percentile of the magnitudes is one of outliers
OUTLIER = 20.0
#: distance of the ranges of earlier and later samples, in widths
MOVED = 0.25
#: share of columns that have one value only
CONSTANT = 0.5
#: least share of what a model answers that may differ between samples; photographs give a classifier 0.97, noise 0.07
VARIETY = 0.1

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that speaks against the data."""

    kind: str  #: few, duplicates, clipped, outlier, constant, unreached, moved, alike
    text: str  #: what was found, with its number, and what to do
    points: tuple[str, ...] = ()  #: the points concerned, the worst first


def judge(
    stats: Mapping[str, TensorStats],
    *,
    samples: int,
    duplicates: int,
    unreached: Sequence[str],
    variety: float | None = None,
) -> list[Finding]:
    """Everything that speaks against statistics.

    :param samples: how many were seen.
    :param duplicates: how many of them equal an earlier one.
    :param unreached: points that no batch reached.
    :param variety: share of the energy of the model's answers that differs between samples; None where it is unknown.
    """
    found = []
    if samples < SAMPLES:
        text = (
            f"{_count(samples, 'sample')}: ranges rest on few values; give at least {SAMPLES}, better 256 (--samples)"
        )
        found.append(Finding("few", text))
    if duplicates:
        text = f"{duplicates} of {samples} samples equal another one: they add nothing; give different ones"
        found.append(Finding("duplicates", text))
    if variety is not None and variety < VARIETY and samples > 1:
        text = (
            f"the model answers nearly the same to all samples: {variety:.0%} of its answers differ; they are noise "
            "to it, perhaps: give real data, prepared as in training"
        )
        found.append(Finding("alike", text))
    if unreached:
        text = (
            "no batch reached {points}: no range is known of them; give data that uses them, or keep them as they are"
        )
        found.append(_about("unreached", text, [(point, "") for point in unreached]))
    clipped = {p: s.clipped for p, s in stats.items() if s.clipped is not None and s.clipped > CLIPPED}
    outlier = {p: v for p, s in stats.items() if (v := _reach(s)) > OUTLIER}
    constant = {p: v for p, s in stats.items() if (v := _constant_share(s)) > CONSTANT}
    moved = {p: s.moved for p, s in stats.items() if s.moved is not None and s.moved > MOVED}
    numbers: dict[str, tuple[Mapping[str, float], str, str]] = {
        "clipped": (
            clipped,
            "{:.1%}",
            "values are clipped at {points}: if accuracy suffers, choose a wider range, such as --calibrator minmax",
        ),
        "outlier": (
            outlier,
            "{:.0f}x the 99.9th percentile",
            "a few outliers make the range at {points}: steps are coarse for all other values; look for broken "
            "samples, and if there are none, take dynamic activations there or --keep the weights",
        ),
        "constant": (
            constant,
            "{:.0%}",
            "columns have one value in all rows at {points}: dead units, or data that does not vary; give data that is "
            "more diverse",
        ),
        "moved": (
            moved,
            "{:.2f} of their width",
            "ranges still move at {points} from the earlier to the later samples: give more samples, shuffled",
        ),
    }
    for kind, (values, form, text) in numbers.items():
        if values:
            worst = sorted(values.items(), key=lambda item: (-item[1], item[0]))
            found.append(_about(kind, text, [(point, form.format(value)) for point, value in worst]))
    return found


def _reach(stats: TensorStats) -> float:
    """How far the range reaches, in 99.9th percentiles of the magnitudes."""
    if stats.outlier is None or stats.low is None or stats.high is None:
        return 0.0
    largest = max(abs(float(stats.minimum.min())), abs(float(stats.maximum.max())))
    reach = max(abs(float(stats.low.min())), abs(float(stats.high.max())))
    return stats.outlier * reach / largest if largest else 0.0


def _constant_share(stats: TensorStats) -> float:
    return (stats.dead + stats.constant) / max(1, stats.minimum.numel()) if stats.count > 1 else 0.0


def _about(kind: str, text: str, points: Sequence[tuple[str, str]]) -> Finding:
    shown = ", ".join(f"{point} ({value})" if value else point for point, value in points[:_SHOWN])
    if len(points) > _SHOWN:
        shown += f" and {len(points) - _SHOWN} more"
    return Finding(kind, text.replace("{points}", shown), tuple(point for point, _ in points))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

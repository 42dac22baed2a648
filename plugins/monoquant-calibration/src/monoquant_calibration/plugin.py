"""What monoquant-calibration registers."""

from __future__ import annotations

from dataclasses import dataclass

from monoquant_core.declarations import CalibratorDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option


@dataclass(frozen=True)
class MinMaxOptions:
    """Options of ``minmax``, and of every other calibrator."""

    granularity: str = option("tensor", "What has a range of its own.", choices=("tensor", "channel"))


@dataclass(frozen=True)
class MovingAverageOptions(MinMaxOptions):
    """Options of ``moving-average``."""

    rate: float = option(0.01, "How much of the range the newest batch decides, above 0 and up to 1.")


@dataclass(frozen=True)
class PercentileOptions(MinMaxOptions):
    """Options of ``percentile``."""

    percentile: float = option(
        99.99, "The range ends at this percentile and starts at 100 minus it; 100 cuts nothing off.", minimum=50
    )


@dataclass(frozen=True)
class EntropyOptions(MinMaxOptions):
    """Options of ``entropy``."""

    bits: int = option(8, "Bits of the integers that the range is for, 2 to 16.", minimum=2)


@dataclass(frozen=True)
class MseOptions(EntropyOptions):
    """Options of ``mse``."""

    symmetric: bool = option(False, "For integers without a zero point: the range reaches as far below zero as above.")


@hookimpl
def monoquant_register_calibrators() -> list[CalibratorDeclaration]:
    """``minmax``, ``moving-average``, ``percentile``, ``entropy`` and ``mse``."""
    return [
        CalibratorDeclaration(
            "minmax",
            "From the smallest to the largest value: nothing is clipped, and one outlier makes all steps coarse",
            "monoquant_calibration.extremes:MinMax",
            MinMaxOptions,
        ),
        CalibratorDeclaration(
            "moving-average",
            "A moving average of the smallest and the largest value of each batch; the order of batches matters",
            "monoquant_calibration.extremes:MovingAverage",
            MovingAverageOptions,
        ),
        CalibratorDeclaration(
            "percentile",
            "Cuts off the outermost values by their share, at both ends",
            "monoquant_calibration.percentile:Percentile",
            PercentileOptions,
        ),
        CalibratorDeclaration(
            "entropy",
            "The range whose quantized values are distributed most like the observed ones (Kullback-Leibler)",
            "monoquant_calibration.entropy:Entropy",
            EntropyOptions,
        ),
        CalibratorDeclaration(
            "mse",
            "The range with the least mean squared error of quantizing the observed values",
            "monoquant_calibration.mse:Mse",
            MseOptions,
        ),
    ]

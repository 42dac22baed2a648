"""What was measured of a finished file in its runtime. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one output of the finished file agrees with the same output of something else."""

    output: str
    against: str  #: "IR"; "original"; "unoptimized": without the runtime's optimizations; "unoptimized, alone"
    samples: int
    cosine: float  #: mean over the samples
    worst_cosine: float
    relative_error: float  #: root of the summed squared difference over the summed squared reference
    max_error: float  #: largest absolute difference
    same_top: float | None = None  #: share of positions with the same largest entry, for logits
    bound: float | None = None  #: largest relative error allowed; None where nothing is promised

    @property
    def passed(self) -> bool:
        """Whether it is within its bound."""
        return self.bound is None or self.relative_error <= self.bound


@dataclass(frozen=True, slots=True)
class Quality:
    """A quality of the model on the given data, measured before and after."""

    metric: str  #: "perplexity" (lower is better), "accuracy" (higher is better)
    count: int  #: predictions that were scored
    before: float
    after: float

    @property
    def degradation(self) -> float:
        """Relative loss: 0.02 is 2 % worse; negative where it became better."""
        if self.metric == "perplexity":
            return self.after / self.before - 1 if self.before else math.inf
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True)
class Verification:
    """What was measured of a finished file in its runtime."""

    path: Path
    runtime: str
    samples: int
    scored: bool  #: whether the inputs were data
    agreements: tuple[Agreement, ...]
    qualities: tuple[Quality, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison with a bound is within it."""
        return all(agreement.passed for agreement in self.agreements)

"""Runs a finished file in its runtime and holds the outputs against the IR and against the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from monoquant_core.errors import ExecutionError
from monoquant_core.model import Source
from monoquant_core.runners import Runner
from monoquant_core.runtimes import LOG_PROBABILITIES, LOGITS, Runtime

MAX_DEGRADATION = 0.02  #: of a measured quality, beyond which a warning is due
IR = "IR"  #: an agreement with the dequantized values
LABELS = "labels"  #: name of the classes of the samples among the data


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one output of the finished file agrees with the same output of something else."""

    output: str
    against: str  #: "IR"; "original"; "unoptimized": the same runtime without its optimizations
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
    agreements: tuple[Agreement, ...]
    qualities: tuple[Quality, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison with a bound is within it."""
        return all(agreement.passed for agreement in self.agreements)


class Subject(NamedTuple):
    """What is verified: a finished file, opened for reading, and its runtime."""

    path: Path
    finished: Source
    name: str  #: of the runtime
    runtime: Runtime


def verify_with(
    subject: Subject,
    original: Source,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    tolerance: float | None = None,
    scored: bool = True,
) -> Verification:
    """Run the same batches in the runtime, and without it from the IR and from the original.

    :param batches: inputs by name; ``labels`` are the right classes and are given to no model.
    :param tolerance: largest relative error against the IR; None takes what the runtime's arithmetic explains.
    :param scored: whether the inputs are real data, on which a quality means something.
    :raises MonoquantError: when one of the three cannot be run.
    """
    path, finished, name, runtime = subject
    bound = runtime.tolerance(finished) if tolerance is None else tolerance
    found = _run(runtime.open(path), batches)
    open_exact: Callable[[Path], Runner] | None = getattr(runtime, "open_exact", None)
    exact = _run(open_exact(path), batches) if open_exact is not None else found
    notes: list[str] = []
    agreements = [*_agreements(_run(runtime.reference(original, finished), batches), exact, IR, bound)]
    if exact is not found:
        agreements += _agreements(exact, found, "unoptimized", getattr(runtime, "optimized_bound", None))
        if not all(agreement.passed for agreement in agreements) and batches:
            first = runtime.diverging(path, batches[0], bound)  # type: ignore[attr-defined]  # comes with open_exact
            notes += [f"the first value that the optimizations of {name} change by more is {first}"] if first else []
    from_original = _run(runtime.reference(original, None), batches)
    agreements += _agreements(from_original, found, "original", None)
    if not agreements:
        raise ExecutionError(
            f"{path}: {name} gives {', '.join(found) or 'no outputs'}, and the original {', '.join(from_original)}: "
            "nothing to compare"
        )
    qualities = _qualities(batches, from_original, found) if scored else []
    return Verification(path, name, tuple(agreements), tuple(qualities), (*notes, *_notes(qualities)))


def compare(
    output: str, against: str, expected: Iterable[torch.Tensor], found: Iterable[torch.Tensor], bound: float | None
) -> Agreement:
    """Two outputs, batch by batch.

    Positions (axis 1) that only one side has are left out: a runtime may give the last ones alone.
    """
    total = _Sums(output in (LOGITS, LOG_PROBABILITIES))
    for reference, value in zip(expected, found, strict=True):
        total.add(*_common(reference, value))
    return total.agreement(output, against, bound)


def perplexity(outputs: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor]) -> tuple[float, int]:
    """exp of the mean negative log likelihood of every token that follows a position of the outputs; and their count.

    :param outputs: logits or log probabilities ``[samples, positions, vocabulary]``, of the last positions.
    :param tokens: ``[samples, length]``.
    """
    total, count = 0.0, 0
    for logits, ids in zip(outputs, tokens, strict=True):
        targets = ids[:, ids.shape[1] - logits.shape[1] + 1 :].long()
        scores = torch.log_softmax(logits[:, :-1].double(), dim=-1)
        total -= float(scores.gather(-1, targets.unsqueeze(-1)).sum())
        count += targets.numel()
    return (math.exp(total / count) if count else math.nan), count


def accuracy(outputs: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> tuple[float, int]:
    """Share of samples whose largest entry is the label's, ``[samples, classes]`` against ``[samples]``; and their count."""
    right = sum(int((out.argmax(-1) == truth.reshape(-1)).sum()) for out, truth in zip(outputs, labels, strict=True))
    count = sum(truth.numel() for truth in labels)
    return (right / count if count else math.nan), count


class _Sums:
    """Running sums of one output."""

    def __init__(self, logits: bool) -> None:
        self.logits = logits
        self.cosines: list[torch.Tensor] = []
        self.noise = self.signal = self.max_error = 0.0
        self.same = self.positions = 0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        a, b = (t.detach().double().reshape(max(1, len(t)), -1) for t in (reference, value))
        self.cosines.append(_cosine(a, b))
        difference = b - a
        self.noise += float(difference.square().sum())
        self.signal += float(a.square().sum())
        self.max_error = max(self.max_error, float(difference.abs().amax()) if difference.numel() else 0.0)
        if self.logits:
            self.same += int((reference.argmax(-1) == value.argmax(-1)).sum())
            self.positions += reference[..., 0].numel()

    def agreement(self, output: str, against: str, bound: float | None) -> Agreement:
        cosines = torch.cat(self.cosines) if self.cosines else torch.ones(1)
        relative = math.sqrt(self.noise / self.signal) if self.signal else (0.0 if self.noise == 0 else math.inf)
        same = self.same / self.positions if self.positions else None
        count = sum(len(c) for c in self.cosines)
        mean, worst = float(cosines.mean()), float(cosines.min())
        return Agreement(output, against, count, mean, worst, relative, self.max_error, same, bound)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    norms = a.norm(dim=1) * b.norm(dim=1)
    products = (a * b).sum(1)
    return torch.where(norms > 0, products / norms.clamp(min=1e-300), (a == b).all(1).double()).clamp(-1, 1)


def _common(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both from the first position that both have."""
    if a.shape != b.shape and a.ndim == b.ndim == 3:
        last = min(a.shape[1], b.shape[1])
        a, b = a[:, a.shape[1] - last :], b[:, b.shape[1] - last :]
    return a, b


def _run(runner: Runner, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    outputs: dict[str, list[torch.Tensor]] = {}
    with runner, torch.no_grad():
        for batch in batches:
            for name, value in runner.run({k: v for k, v in batch.items() if k != LABELS}).items():
                outputs.setdefault(name, []).append(value)
    return outputs


def _agreements(
    expected: Mapping[str, list[torch.Tensor]],
    found: Mapping[str, list[torch.Tensor]],
    against: str,
    bound: float | None,
) -> Iterable[Agreement]:
    for name in expected:
        if name in found:
            yield compare(name, against, expected[name], found[name], bound)


def _qualities(
    batches: Sequence[Mapping[str, torch.Tensor]],
    before: Mapping[str, list[torch.Tensor]],
    after: Mapping[str, list[torch.Tensor]],
) -> list[Quality]:
    """What can be measured on these data without being told more."""
    qualities = []
    labels = [batch[LABELS] for batch in batches if LABELS in batch]
    name = next((n for n in (LOGITS, LOG_PROBABILITIES) if n in after), next(iter(after), ""))
    if not name or name not in before:
        return []
    if len(labels) == len(batches) and all(out.ndim == 2 for out in after[name]):
        (first, count), (second, _) = accuracy(before[name], labels), accuracy(after[name], labels)
        qualities.append(Quality("accuracy", count, first, second))
    tokens = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    if len(tokens) == len(batches) and name in (LOGITS, LOG_PROBABILITIES) and all(o.ndim == 3 for o in after[name]):
        last = min(out.shape[1] for out in after[name])
        same = [out[:, out.shape[1] - last :] for out in before[name]]
        (first, count), (second, _) = perplexity(same, tokens), perplexity(after[name], tokens)
        if count:
            qualities.append(Quality("perplexity", count, first, second))
    return qualities


def _notes(qualities: Iterable[Quality]) -> Iterable[str]:
    for quality in qualities:
        if quality.degradation > MAX_DEGRADATION:
            yield (
                f"{quality.metric} is {quality.degradation:.1%} worse than the original's: more bits (--set), a smaller "
                "--group-size, or calibration data (--data) bring it back; compare shows the tensors that changed most"
            )

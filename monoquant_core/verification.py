"""Runs a finished file in its runtime and holds the outputs against the IR and against the original."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monoquant_core.agreement import Agreement, Quality, Verification
from monoquant_core.calibration import batch_size
from monoquant_core.errors import CalibrationError, ExecutionError
from monoquant_core.graphs import load_weights, module_of
from monoquant_core.model import Source
from monoquant_core.module_runner import ModuleGraph
from monoquant_core.runners import Batch, Input, Runner
from monoquant_core.runtimes import LOG_PROBABILITIES, LOGITS, Runtime

MAX_DEGRADATION = 0.02  #: of a measured quality, beyond which a warning is due
IR = "IR"  #: an agreement with the dequantized values
UNOPTIMIZED = "unoptimized"  #: an agreement with the same runtime without its optimizations
ALONE = "unoptimized, alone"  #: the same of one stretch of the graph, with the same inputs: the worst of all stretches
LABELS = "labels"  #: name of the classes of the samples among the data


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
    samples = sum(map(batch_size, batches))
    if not samples:
        raise CalibrationError("there are no samples: the data is empty")
    bound = runtime.tolerance(finished) if tolerance is None else tolerance
    found = _run(runtime.open(path), batches)
    open_exact: Callable[[Path], Runner] | None = getattr(runtime, "open_exact", None)
    exact = _run(open_exact(path), batches) if open_exact is not None else found
    expected = runtime.reference(original, finished)
    agreements = [*_agreements(_run(expected, batches), exact, IR, bound)]
    notes = list(expected.notes)
    if exact is not found:
        changed, note = _optimizations(subject, batches, exact, found)
        agreements += changed
        notes += [note] if note else []
    from_original = _run(runtime.reference(original, None), batches)
    agreements += _agreements(from_original, found, "original", None)
    if not agreements:
        raise ExecutionError(
            f"{path}: {name} gives {', '.join(found) or 'no outputs'}, and the original {', '.join(from_original)}: "
            "nothing to compare"
        )
    qualities = _qualities(batches, from_original, found) if scored else []
    every = (*notes, *_notes(qualities))
    return Verification(path, name, samples, scored, tuple(agreements), tuple(qualities), every)


def _optimizations(
    subject: Subject,
    batches: Sequence[Mapping[str, torch.Tensor]],
    exact: Mapping[str, list[torch.Tensor]],
    found: Mapping[str, list[torch.Tensor]],
) -> tuple[list[Agreement], str]:
    """What a runtime's optimizations change; and which value first, where it is more than they may."""
    path, _, name, runtime = subject
    extra: Any = runtime  # what a runtime has that opens a file in two ways
    allowed: float | None = getattr(runtime, "optimized_bound", None)
    given = [{k: v for k, v in batch.items() if k != LABELS} for batch in batches]
    alone: Sequence[Agreement] = extra.alone(path, given) if hasattr(runtime, "alone") else ()
    changed = [*_agreements(exact, found, UNOPTIMIZED, None if alone else allowed)]
    changed += [max(alone, key=lambda a: (a.relative_error != a.relative_error, a.relative_error))] if alone else []
    if all(agreement.passed for agreement in changed):
        return changed, ""
    first = next((a.output for a in alone if not a.passed), "") or extra.diverging(path, given[0], allowed)
    return changed, f"the first value that the optimizations of {name} change by more is {first}" if first else ""


def named(batch: Batch, inputs: Sequence[Input]) -> dict[str, torch.Tensor]:
    """A batch by input name.

    :raises ExecutionError: when it has more inputs than the model.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    values = batch if isinstance(batch, tuple) else (batch,)
    names = [i.name for i in inputs]
    if len(values) > len(names):
        raise ExecutionError(f"a batch of {len(values)} inputs, and the model takes {', '.join(names) or 'none'}")
    return dict(zip(names, values, strict=False))


def reference(original: Source, finished: Source | None) -> Runner:
    """The original as a module of torch, with the dequantized values of a finished file in their places.

    The original's own module is not changed.

    :raises CalibrationError: when the original is no model that can be run.
    :raises SourceError: when the finished file holds quantized tensors that the module does not have.
    """
    module = module_of(original)
    if finished is not None:
        view: Callable[[], Source | None] | None = getattr(finished, "checkpoint", None)
        finished = (view() if view is not None else None) or finished  # under the original's names
        module = copy.deepcopy(module) if module is original.info.graph else module
        load_weights(module, finished, [spec.name for spec in finished.specs() if spec.encoding is not None])
    return ModuleGraph(module, original.info.name).runner(())


def compare(
    output: str, against: str, expected: Iterable[torch.Tensor], found: Iterable[torch.Tensor], bound: float | None
) -> Agreement:
    """Two outputs, batch by batch.

    Positions (axis 1) that only one side has are left out: a runtime may give the last ones alone.
    """
    total = Sums(output in (LOGITS, LOG_PROBABILITIES))
    for reference, value in zip(expected, found, strict=True):
        total.add(*_common(reference, value))
    return total.agreement(output, against, bound)


def perplexity(outputs: Sequence[torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[float, int]:
    """exp of the mean negative log likelihood of every token that follows a position of the outputs; and their count.

    :param outputs: logits or log probabilities ``[samples, positions, vocabulary]``, of the last positions.
    :param batches: ``input_ids`` ``[samples, length]``; tokens whose ``attention_mask`` is 0 are not scored.
    """
    total, count = 0.0, 0
    for logits, batch in zip(outputs, batches, strict=True):
        ids = batch["input_ids"]
        first = ids.shape[1] - logits.shape[1] + 1
        scored = batch.get("attention_mask", torch.ones_like(ids))[:, first:].bool()
        scores = torch.log_softmax(logits[:, :-1].double(), dim=-1)
        total -= float(scores.gather(-1, ids[:, first:].long().unsqueeze(-1)).squeeze(-1)[scored].sum())
        count += int(scored.sum())
    return (math.exp(total / count) if count else math.nan), count


def accuracy(outputs: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> tuple[float, int]:
    """Share of samples ``[samples, classes]`` whose largest entry is the label's ``[samples]``; and their count."""
    right = sum(int((out.argmax(-1) == truth.reshape(-1)).sum()) for out, truth in zip(outputs, labels, strict=True))
    count = sum(truth.numel() for truth in labels)
    return (right / count if count else math.nan), count


class Sums:
    """Running sums of one output, over batches.

    :param logits: whether its largest entries are counted.
    """

    def __init__(self, logits: bool = False) -> None:
        self.logits = logits
        self.cosines: list[torch.Tensor] = []
        self.noise = self.signal = self.max_error = 0.0
        self.same = self.positions = 0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Take a batch in, samples along the first axis."""
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
        """What they say about the output of that name."""
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
    text = name in (LOGITS, LOG_PROBABILITIES) and all("input_ids" in batch for batch in batches)
    if text and all(out.ndim == 3 for out in after[name]):
        same = [_common(*pair)[0] for pair in zip(before[name], after[name], strict=True)]
        (first, count), (second, _) = perplexity(same, batches), perplexity(after[name], batches)
        if count:
            qualities.append(Quality("perplexity", count, first, second))
    return qualities


def _notes(qualities: Iterable[Quality]) -> Iterable[str]:
    for quality in qualities:
        if quality.degradation > MAX_DEGRADATION:
            yield (
                f"{quality.metric} is {quality.degradation:.1%} worse than the original's: more bits (--set), "
                "a smaller --group-size, or calibration data (--data) bring it back; "
                "'monoquant compare' shows the tensors that changed most"
            )

"""What will happen to every tensor: decisions, steps and the plan they make. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from monoquant_core.encoding import ActivationQuant
from monoquant_core.exporters import Exporter, FilePlan, Placed
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Proposal, Quantizer

Action: TypeAlias = Literal["quantize", "cast", "keep", "dequantize", "drop", "derive"]
OnUnsupported: TypeAlias = Literal["error", "requantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one source tensor, and why."""

    spec: TensorSpec
    action: Action  #: "keep" of a tensor that is already quantized keeps its codes
    reason: str
    proposal: Proposal | None = None  #: for "quantize" and "cast"
    scheme: str = ""  #: the scheme as declared, with its options where they are not the defaults: "int4 group_size=64"
    quantizer: Quantizer | None = field(default=None, compare=False, repr=False)
    chosen: Literal["rule", "default"] = "default"  #: by a rule of the user's, or by the default recipe and scheme


@dataclass(frozen=True, slots=True)
class Step:
    """How one output comes about."""

    placed: Placed  #: output, final proposal, what the format holds, parts
    specs: tuple[TensorSpec, ...]  #: its inputs, in order
    action: Action
    reason: str
    scheme: str = ""
    quantizer: Quantizer | None = field(default=None, compare=False, repr=False)

    @property
    def spec(self) -> TensorSpec:
        """The tensor that is quantized, as its scheme sees it: the input, or what several inputs become."""
        out, first = self.placed.output, self.specs[0]
        if len(self.specs) == 1 and first.shape == out.shape:
            return first
        return dataclasses.replace(
            first, name=out.name, shape=out.shape, dtype=out.dtype, encoding=None, nbytes_stored=None
        )

    @property
    def activation(self) -> ActivationQuant | None:
        """How the layer's input is quantized when the model runs."""
        return self.placed.proposal.activation if self.placed.proposal is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file; without a format, what its encoding takes."""
        if self.placed.parts:
            return sum(part.nbytes for part in self.placed.parts)
        out, encoding = self.placed.output, self.placed.held.encoding
        return TensorSpec(out.name, out.shape, out.dtype, encoding).nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run will do. Equal plans of equal sources give equal bytes."""

    info: ModelInfo
    decisions: tuple[Decision, ...]  #: one per source tensor, in the source's order
    steps: tuple[Step, ...]  #: one per output, in the exporter's order
    files: tuple[FilePlan, ...]  #: empty without a format
    format: str  #: "" for a plan that stays in memory
    exporter: Exporter | None = field(default=None, compare=False, repr=False)
    notes: tuple[str, ...] = ()  #: what the user should know, once each
    recipe: Mapping[str, Any] = field(default_factory=dict)  #: TOML-ready: repeats this plan on the same model

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(d.spec.nbytes for d in self.decisions if d.spec.tied_to is None)

    @property
    def bytes_after(self) -> int:
        """Bytes of all files to be written, exactly; without a format, of the tensors."""
        return sum(f.nbytes for f in self.files) if self.files else sum(s.nbytes for s in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, over all tensors that are written."""
        return bits_per_weight(self.steps)

    def count(self, action: Action) -> int:
        """How many source tensors that happens to."""
        return sum(d.action == action for d in self.decisions)

    def steps_of(self) -> dict[str, list[Step]]:
        """The steps that each source tensor goes into, by its name."""
        found: dict[str, list[Step]] = {d.spec.name: [] for d in self.decisions}
        for step in self.steps:
            for spec in step.specs:
                found[spec.name].append(step)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON form: what ``monoquant plan --json`` prints."""
        by_name = self.steps_of()
        tensors = []
        for decision in self.decisions:
            spec, steps = decision.spec, by_name[decision.spec.name]
            tensors.append(
                {
                    "name": spec.name,
                    "shape": list(spec.shape),
                    "kind": spec.kind,
                    "action": decision.action,
                    "scheme": decision.scheme,
                    "from": str(spec.encoding or spec.dtype),
                    "to": " + ".join(describe(step) for step in steps),
                    "activation": next((str(found) for step in steps if (found := step.activation) is not None), None),
                    "outputs": [step.placed.output.name for step in steps],
                    "bytes_before": spec.nbytes,
                    "bytes_after": sum(step.nbytes // max(1, len(step.specs)) for step in steps),
                    "reason": decision.reason,
                }
            )
        return {
            "source": self.info.name,
            "format": self.format,
            "tensors": tensors,
            "derived": [
                {
                    "name": step.placed.output.name,
                    "shape": list(step.placed.output.shape),
                    "to": describe(step),
                    "bytes": step.nbytes,
                    "reason": step.reason,
                }
                for step in self.steps
                if not step.specs
            ],
            "files": [{"path": f.path, "bytes": f.nbytes} for f in self.files],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "notes": list(self.notes),
        }


def bits_per_weight(steps: Sequence[Step]) -> float:
    """Stored bits per element, over all tensors that are written."""
    elements = sum(s.placed.output.numel for s in steps)
    return 8 * sum(s.nbytes for s in steps) / elements if elements else 0.0


def describe(step: Step) -> str:
    """What an output is stored as."""
    encoding = step.placed.held.encoding
    return str(encoding) if encoding is not None else step.placed.output.dtype


def collapsed(names: Sequence[str]) -> list[str]:
    """Names that differ only in their first number as one: ``layers.{0-3,7}.up``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    found: list[str | tuple[str, str]] = []
    for name in names:
        number = re.search(r"\d+", name)
        if number is None:
            found.append(name)
            continue
        key = name[: number.start()], name[number.end() :]
        if key not in numbers:
            found.append(key)
        numbers.setdefault(key, []).append(int(number[0]))
    return [key if isinstance(key, str) else f"{key[0]}{_ranges(numbers[key])}{key[1]}" for key in found]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def alike(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Names and what is said of them, as lines: names that differ only in a number share one."""
    said: dict[str, list[str]] = {}
    for name, text in lines:
        said.setdefault(text, []).append(name)
    return [f"{name}{text}" for text, names in said.items() for name in collapsed(names)]


def listing(title: str, lines: Sequence[str]) -> str:
    """A title, in which ``{count}`` is how many there are, and one line per tensor; long lists are cut and say so."""
    title = title.replace("{count}", str(len(lines)))
    if len(lines) == 1:
        return f"{title}: {lines[0]}"
    shown = [f"  {line}" for line in lines[:20]]
    if len(lines) > 20:
        shown.append(f"  ... and {len(lines) - 20} more")
    return "\n".join([f"{title}:", *shown])

"""What will happen to every tensor, decided before anything is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from monoquant_core.exporters import Exporter, FilePlan, Placed
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Proposal, Quantizer

Action: TypeAlias = Literal["quantize", "cast", "keep", "dequantize", "drop", "derive"]


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
    recipe: dict[str, Any] = field(default_factory=dict)  #: TOML-ready: repeats this plan on the same model

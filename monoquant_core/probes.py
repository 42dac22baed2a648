"""What a hardware probe is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Finding:
    """How well one scheme or format runs here."""

    speed: Literal["fast", "slow", "no"]  #: fast; works but slow; not here
    reason: str
    install: str = ""  #: what to install to change that


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found. Everything in it was asked of the machine, nothing assumed."""

    device: str  #: "cpu", "cuda:0", "onnxruntime": what was probed
    present: bool
    summary: str  #: one line for ``monoquant doctor``
    fast_elements: tuple[str, ...] = ()  #: element types with instructions of their own: "int8"
    memory_bytes: int | None = None  #: memory a model may use there
    facts: Mapping[str, Any] = field(default_factory=dict)  #: JSON values: instruction sets, versions, providers
    findings: Mapping[str, Finding] = field(default_factory=dict)  #: "scheme:int8" or "format:gguf" -> how it runs
    notes: tuple[str, ...] = ()


class Probe(Protocol):
    """Looks at the machine."""

    def probe(self) -> ProbeResult:
        """Ask it. Never raises: what is missing is a result with ``present=False`` and the reason in its summary."""
        ...

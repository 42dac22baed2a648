"""What a hardware probe is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, get_args

Speed: TypeAlias = Literal["fast", "slow", "no"]  #: fast; works but slow; not here


@dataclass(frozen=True, slots=True)
class Finding:
    """How well one scheme or format runs here.

    :raises ValueError: for another speed.
    """

    speed: Speed
    reason: str
    install: str = ""  #: what to install to change that

    def __post_init__(self) -> None:
        if self.speed not in (speeds := get_args(Speed)):
            raise ValueError(f"speed is one of {', '.join(speeds)}, got {self.speed!r}")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found. Everything in it was asked of the machine, nothing assumed.

    :raises ValueError: for a summary that is no text, or findings that are none.
    """

    device: str  #: "cpu", "cuda:0", "onnxruntime": what was probed
    present: bool
    summary: str  #: one line for ``monoquant doctor``
    fast_elements: tuple[str, ...] = ()  #: element types with instructions of their own: "int8"
    memory_bytes: int | None = None  #: memory a model may use there
    facts: Mapping[str, Any] = field(default_factory=dict)  #: JSON values: instruction sets, versions, providers
    findings: Mapping[str, Finding] = field(default_factory=dict)  #: "scheme:int8" or "format:gguf" -> how it runs
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not isinstance(self.summary, str):
            raise ValueError(f"device and summary are texts, got {self.device!r} and {self.summary!r}")
        for key, finding in self.findings.items():
            if not isinstance(finding, Finding):
                raise ValueError(f"{key}: a Finding is wanted, got {finding!r}")


class Probe(Protocol):
    """Looks at the machine."""

    def probe(self) -> ProbeResult:
        """Ask it. Never raises: what is missing is a result with ``present=False`` and the reason in its summary."""
        ...

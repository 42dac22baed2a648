"""The architectures that llama.cpp knows and monoquant writes: a module each, and those of other plugins."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from monoquant_core.errors import PlanError
from monoquant_core.model import ModelInfo
from monoquant_core.plugins import Registry
from monoquant_gguf.architectures.base import Architecture
from monoquant_gguf.architectures.bert import Bert
from monoquant_gguf.architectures.gemma import Gemma2, Gemma3
from monoquant_gguf.architectures.gpt2 import Gpt2
from monoquant_gguf.architectures.llama import Llama, Mixtral
from monoquant_gguf.architectures.phi3 import Phi3
from monoquant_gguf.architectures.qwen import Qwen2, Qwen3, Qwen3Moe

BUILT_IN: tuple[type[Architecture], ...] = (Llama, Mixtral, Qwen2, Qwen3, Qwen3Moe, Gemma2, Gemma3, Phi3, Gpt2, Bert)

GENERIC = "generic"


def find(info: ModelInfo, wanted: str = "auto", registry: Registry | None = None) -> Architecture:
    """The architecture of a model.

    :param wanted: its name, or "auto" for what config.json says.
    :param registry: whose plugins are asked for others; by default those that are installed.
    :raises PlanError: naming those there are.
    """
    kind = info.model_type if wanted == "auto" else wanted
    found = _matching(BUILT_IN, kind) or _matching(others := of_plugins(registry), kind)
    if found is not None:
        return found()
    known = sorted({t for a in (*BUILT_IN, *others) for t in (a.model_types if wanted == "auto" else (a.name,))})
    what = (
        f"model_type {kind!r}" if wanted == "auto" and kind else f"--architecture {kind}" if kind else "no model_type"
    )
    close = difflib.get_close_matches(str(kind), known, n=1)
    hints = [f"did you mean {close[0]!r}?"] if close and wanted != "auto" else []
    hints.append("--architecture generic writes the tensors under their own names, for other readers than llama.cpp")
    raise PlanError(f"{info.name}: {what}: GGUF is written for {', '.join(known)}", hint="; ".join(hints))


def _matching(architectures: Iterable[type[Architecture]], kind: str | None) -> type[Architecture] | None:
    if kind is None:
        return None
    found = list(architectures)
    return next((a for a in found if kind in a.model_types), None) or next((a for a in found if a.name == kind), None)


def of_plugins(registry: Registry | None = None) -> tuple[type[Architecture], ...]:
    """Those that plugins bring: asked only for models that none of our own is for."""
    if registry is None:
        from monoquant_core.api import installed

        registry = installed()
    hook = getattr(registry.manager.hook, "monoquant_gguf_architectures", None)
    return tuple(a for items in (hook() if hook is not None else ()) for a in items)

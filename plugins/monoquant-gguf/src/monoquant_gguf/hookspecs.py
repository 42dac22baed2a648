"""Hooks of this plugin. Others implement them beside the core's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from monoquant_core.hookspecs import hookspec

if TYPE_CHECKING:
    from monoquant_gguf.architectures.base import Architecture


@hookspec
def monoquant_gguf_architectures() -> Iterable[type[Architecture]]:  # type: ignore[empty-body]
    """Bring architectures that this plugin does not have.

    Called in planning, only for a model whose ``model_type`` none of the built-in ones takes, so that no plugin can
    stand in for another's.

    :return: subclasses of :class:`monoquant_gguf.architectures.base.Architecture`.
    """

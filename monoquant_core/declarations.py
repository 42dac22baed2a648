"""What a plugin declares about itself. Cheap to import: no torch, no codecs."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from monoquant_core.errors import PluginError

NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+")


@dataclass(frozen=True)
class NoOptions:
    """For plugins that take no options."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """A name the user can type, and where its implementation lives."""

    name: str  #: ``[A-Za-z0-9_.-]+``, compared case-insensitively; what the user types
    summary: str  #: one line, shown in ``--help`` and ``plugins list``
    target: str  #: ``package.module:Attribute``, imported on first use
    options: type = NoOptions  #: frozen dataclass of ``option(...)`` fields

    def __post_init__(self) -> None:
        for label in ("aliases", "suffixes", "formats"):
            texts = getattr(self, label, ())
            if not isinstance(texts, tuple) or not all(isinstance(t, str) for t in texts):  # a text has characters
                raise PluginError(str(self.name), f"{self.name}: {label} are a tuple of texts, got {texts!r}")
        for name in (self.name, *getattr(self, "aliases", ())):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise PluginError(
                    str(self.name), f"a declared name is made of letters, digits, '_', '.' and '-', got {name!r}"
                )
        if not isinstance(self.summary, str):
            raise PluginError(self.name, f"{self.name}: the summary is a text, got {self.summary!r}")
        if not isinstance(self.target, str) or not _TARGET.fullmatch(self.target):
            raise PluginError(self.name, f"{self.name}: the target is 'package.module:Attribute', got {self.target!r}")

    def load(self) -> Any:
        """Import the implementation.

        :raises PluginError: when it cannot be imported.
        """
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as exc:  # a plugin may fail in any way while importing
            raise PluginError(self.name, f"{self.target} cannot be imported: {exc!r}") from exc


@dataclass(frozen=True, slots=True)
class SchemeDeclaration(Declaration):
    """A quantizer: ``target(options)`` is a :class:`~monoquant_core.schemes.Quantizer`."""

    aliases: tuple[str, ...] = ()  #: other spellings: "i8", "W8A16"


@dataclass(frozen=True, slots=True)
class RecipeDeclaration(Declaration):
    """A named recipe: ``target(options)`` is a :class:`~monoquant_core.recipe.RecipeSource`."""


@dataclass(frozen=True, slots=True)
class CalibratorDeclaration(Declaration):
    """A range estimator: ``target(options)`` is a :class:`~monoquant_core.stats.Calibrator`."""


@dataclass(frozen=True, slots=True)
class ProbeDeclaration(Declaration):
    """A hardware probe: ``target(options)`` is a :class:`~monoquant_core.probes.Probe`."""


@dataclass(frozen=True, slots=True)
class SourceDeclaration(Declaration):
    """A reader of finished files: ``target(options)`` is a :class:`~monoquant_core.model.SourceReader`."""

    suffixes: tuple[str, ...] = ()  #: file suffixes it may open; "/" is a folder


@dataclass(frozen=True, slots=True)
class ExporterDeclaration(Declaration):
    """A file format: ``target(options)`` is an :class:`~monoquant_core.exporters.Exporter`."""

    recipe: str = ""  #: default recipe; "" is the core's
    suffix: str = ""  #: appended to a destination without one; "" for folders
    needs: Literal["tensors", "graph"] = "tensors"  #: "graph": the source must also give a module or an ONNX graph


@dataclass(frozen=True, slots=True)
class RuntimeDeclaration(Declaration):
    """A program that runs finished files: ``target(options)`` is a :class:`~monoquant_core.runtimes.Runtime`."""

    formats: tuple[str, ...] = ()  #: formats it opens
    distribution: str = ""  #: what to install to have it

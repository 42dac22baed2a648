"""What a run is to do, as the flags say it: the same for ``plan``, ``quantize`` and ``export``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monoquant_core.cli.options import Typed
from monoquant_core.cli.render import note
from monoquant_core.declarations import Declaration
from monoquant_core.errors import OptionError, UnknownNameError
from monoquant_core.plugins import Registry


@dataclass(frozen=True, slots=True)
class Also:
    """Another output of the same pass, as ``--also`` says it."""

    scheme: str
    options: dict[str, Any]  #: of the scheme
    path: Path
    saving: dict[str, Any]  #: keyword arguments of ``QuantizedModel.plan`` and ``.save``


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of schemes and of a format, checked."""

    quantizing: dict[str, Any]  #: keyword arguments of ``api.quantize``
    saving: dict[str, Any]  #: keyword arguments of ``QuantizedModel.plan`` and ``.save``
    also: Sequence[Also]


def select(
    registry: Registry,
    *,
    output: Path | None,
    also: Sequence[str] | None,
    scheme: str,
    format: str,
    recipe: Path | None,
    set_: list[str] | None,
    keep: list[str] | None,
    unsafe_pickle: bool,
    typed: Typed,
    quiet: bool,
) -> Selection:
    """Read the flags.

    :raises MonoquantError: for an unknown name, or an option that what was chosen does not take.
    """
    from monoquant_core.api import DEFAULT_SCHEME
    from monoquant_core.quantized import format_for
    from monoquant_core.recipe import Recipe, load_recipe

    loaded = Recipe() if recipe is None else load_recipe(recipe)
    name = scheme or loaded.scheme
    if not (name or loaded.base or loaded.rules or set_):
        name = scheme = DEFAULT_SCHEME
        note(f"no --scheme given: {DEFAULT_SCHEME}", quiet=quiet)
    format = format or format_for(output or "", registry)
    options = typed.options(scheme=named_scheme(registry, name), format=registry.exporter(format))
    quantizing = {
        "scheme": scheme,
        "options": options["scheme"],
        "recipe": loaded,
        "set": set_ or (),
        "keep": keep or (),
        "unsafe_pickle": unsafe_pickle,
        "registry": registry,
    }
    saving = {"format": format, "format_options": options["format"]}
    return Selection(quantizing, saving, [_also(text, registry, typed, saving) for text in also or ()])


def _also(text: str, registry: Registry, typed: Typed, first: Mapping[str, Any]) -> Also:
    from monoquant_core.quantized import format_for

    found = re.fullmatch(r"([^:=]+)(?::([^:=,]+=[^=,]*(?:,[^=,]+=[^=,]*)*))?=(.+)", text, re.DOTALL)
    if found is None:
        raise OptionError(f"--also {text!r}", hint="write SCHEME=PATH or SCHEME:key=value,key=value=PATH")
    scheme, path = found[1], Path(found[3])
    pairs = [pair.partition("=") for pair in (found[2] or "").split(",") if pair]
    named = [value for key, _, value in pairs if key.strip() == "format"]
    rest = ["".join(pair) for pair in pairs if pair[0].strip() != "format"]
    try:
        format = registry.exporter(named[-1] if named else format_for(path, registry, first["format"]))
        options = Typed({}, rest, typed.roles).options(scheme=named_scheme(registry, scheme), format=format)
    except (OptionError, UnknownNameError) as exc:
        raise type(exc)(f"--also {text!r}: {exc}", hint=exc.hint) from None
    same = first["format_options"] if format is registry.exporter(first["format"]) else {}
    saving = {"format": format.name, "format_options": {**same, **options["format"]}}
    return Also(scheme, options["scheme"], path, saving)


def named_scheme(registry: Registry, name: str) -> Declaration | None:
    """What ``--scheme`` names: a recipe, else a scheme.

    :raises MonoquantError: naming the nearest one, or what to install.
    """
    from monoquant_core.recipe import refuse_base

    if not name:
        return None
    refuse_base(name)
    return registry.recipes.get(name.lower()) or registry.scheme(name)

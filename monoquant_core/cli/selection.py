"""What a run is to do, as the flags say it: the same for ``plan``, ``quantize`` and ``export``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monoquant_core.cli.options import Typed
from monoquant_core.cli.render import note
from monoquant_core.declarations import Declaration
from monoquant_core.plugins import Registry


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of schemes and of a format, checked."""

    quantizing: dict[str, Any]  #: keyword arguments of ``api.quantize``
    saving: dict[str, Any]  #: keyword arguments of ``QuantizedModel.plan`` and ``.save``


def select(
    registry: Registry,
    *,
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
    from monoquant_core.recipe import Recipe, load_recipe

    loaded = Recipe() if recipe is None else load_recipe(recipe)
    name = scheme or loaded.scheme
    if not (name or loaded.base or loaded.rules or set_):
        name = scheme = DEFAULT_SCHEME
        note(f"no --scheme given: {DEFAULT_SCHEME}", quiet=quiet)
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
    return Selection(quantizing, {"format": format, "format_options": options["format"]})


def named_scheme(registry: Registry, name: str) -> Declaration | None:
    """What ``--scheme`` names: a recipe, else a scheme.

    :raises UnknownNameError: naming the nearest one, or what to install.
    """
    if not name:
        return None
    return registry.recipes.get(name.lower()) or registry.scheme(name)

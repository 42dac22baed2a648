"""Options a plugin takes, declared once and used for flags, recipes and docs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from monoquant_core.errors import OptionError

T = TypeVar("T")

SCALARS = (bool, int, float, str)  #: the types an option may have


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """What the CLI, the recipe loader and the docs need to know of one option."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    minimum: int | float | None

    @property
    def flag(self) -> str:
        """The command-line flag; a boolean that defaults to True is shown in the form that changes it."""
        words = self.name.replace("_", "-")
        return f"--no-{words}" if self.default is True else f"--{words}"


def option(default: Any, help: str, *, choices: tuple[Any, ...] | None = None, minimum: float | None = None) -> Any:
    """A dataclass field that is also a command-line flag and a recipe key."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


def option_infos(options: type) -> list[OptionInfo]:
    """The declared options of a frozen dataclass, in order.

    :raises OptionError: for anything but a frozen dataclass of fields made with :func:`option`, whose types are scalars
        and whose defaults are values that a user may give.
    """
    parameters = getattr(options, "__dataclass_params__", None)
    if not isinstance(options, type) or parameters is None or not parameters.frozen:
        raise OptionError(f"{options!r}: options are declared in a frozen dataclass")
    try:
        hints = get_type_hints(options)
    except NameError as exc:
        raise OptionError(f"{options.__name__}: {exc}") from None
    infos = []
    for f in dataclasses.fields(options):
        if "help" not in f.metadata or f.default is dataclasses.MISSING:
            raise OptionError(f"{options.__name__}.{f.name}: declare it with option(default, help)")
        if hints[f.name] not in SCALARS:
            raise OptionError(f"{options.__name__}.{f.name}: bool, int, float or str expected, got {hints[f.name]}")
        meta = f.metadata
        infos.append(OptionInfo(f.name, hints[f.name], f.default, meta["help"], meta["choices"], meta["minimum"]))
        _check(infos[-1], f.default, f"default of {options.__name__}")
    return infos


def build(options: type[T], values: Mapping[str, Any], *, owner: str) -> T:
    """Check ``values`` against the declaration and construct it.

    :raises OptionError: naming the owner, the option, the value and what is allowed.
    """
    infos = {info.name: info for info in option_infos(options)}
    for name, value in values.items():
        if name not in infos:
            close = difflib.get_close_matches(name, infos, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(infos) or 'no options'}"
            raise OptionError(f"{owner} has no option {name!r}", hint=hint)
        _check(infos[name], value, owner)
    return options(**values)


def parse(info: OptionInfo, text: str, *, owner: str) -> Any:
    """The value that ``text`` spells for an option, as ``--set`` and ``-p`` write it.

    :raises OptionError: when the text is not of the option's type.
    """
    try:
        if info.type is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return info.type(text)
    except (KeyError, ValueError):
        raise OptionError(f"{owner}: {info.name} wants {info.type.__name__}, got {text!r}") from None


def _check(info: OptionInfo, value: Any, owner: str) -> None:
    if type(value) not in ((float, int) if info.type is float else (info.type,)):
        raise OptionError(f"{owner}: {info.name} wants {info.type.__name__}, got {value!r}")
    if info.choices is not None and value not in info.choices:
        raise OptionError(f"{owner}: {info.name} is one of {', '.join(map(str, info.choices))}, got {value!r}")
    if info.minimum is not None and not value >= info.minimum:
        raise OptionError(f"{owner}: {info.name} is at least {info.minimum}, got {value!r}")

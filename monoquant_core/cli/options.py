"""Options that plugins declare, as flags of a command."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from monoquant_core.declarations import Declaration
from monoquant_core.errors import OptionError
from monoquant_core.options import OptionInfo, build, option_infos, parse
from monoquant_core.plugins import Registry

Roles = dict[str, list[Declaration]]


@dataclass(frozen=True, slots=True)
class Typed:
    """Plugin options as the user typed them."""

    flags: Mapping[str, Any]  #: only those that were given
    pairs: Sequence[str]  #: ``-p name=value``
    roles: Mapping[str, Sequence[Declaration]]  #: what the command may choose from, by flag: "scheme", "format"

    def options(self, **chosen: Declaration | None) -> dict[str, dict[str, Any]]:
        """The options of each chosen declaration, checked; its own defaults apply to the rest.

        :param chosen: what was chosen, by role; None where nothing was.
        :raises OptionError: for an option that none of them takes, or a value that is not allowed.
        """
        result: dict[str, dict[str, Any]] = {role: {} for role in chosen}
        takers = {
            role: {info.name: info for info in option_infos(declaration.options)}
            for role, declaration in chosen.items()
            if declaration is not None
        }
        for name, value in self.flags.items():
            self._assign(result, takers, chosen, name, value)
        for pair in self.pairs:
            name, equals, text = pair.partition("=")
            if not equals:
                raise OptionError(f"-p {pair!r} is not name=value")
            self._assign(result, takers, chosen, name.strip().replace("-", "_"), _Unparsed(text))
        for role, declaration in chosen.items():
            if declaration is not None:
                build(declaration.options, result[role], owner=f"--{role} {declaration.name}")
        return result

    def _assign(
        self,
        result: dict[str, dict[str, Any]],
        takers: Mapping[str, Mapping[str, OptionInfo]],
        chosen: Mapping[str, Declaration | None],
        name: str,
        value: Any,
    ) -> None:
        role, dot, bare = name.rpartition(".")  # "format.name" where a scheme has an option of that name too
        taken = [r for r in takers if bare in takers[r] and (not dot or role == r)]
        if not taken:
            owners = " and ".join(f"--{r} {d.name}" for r, d in chosen.items() if d is not None)
            raise OptionError(f"{owners or 'no scheme'}: no option {name!r}", hint=self._whose(bare, takers))
        for r in taken:
            info, declared = takers[r][bare], chosen[r]
            owner = f"--{r} {declared.name if declared else ''}"
            if isinstance(value, _Unparsed):
                result[r][bare] = parse(info, value, owner=owner)
            elif type(value) is info.type or (info.type is float and type(value) is int):
                result[r][bare] = value
            else:  # another plugin's declaration made the flag, with another type
                raise OptionError(f"{owner}: {bare} wants {info.type.__name__}, got {value!r}", hint=f"-p {bare}=VALUE")

    def _whose(self, name: str, takers: Mapping[str, Mapping[str, OptionInfo]]) -> str:
        owners = [
            f"--{role} {declaration.name}"
            for role, declarations in self.roles.items()
            for declaration in declarations
            if any(info.name == name for info in option_infos(declaration.options))
        ]
        if owners:
            return f"it belongs to {', '.join(owners)}"
        known = dict.fromkeys(name for infos in takers.values() for name in infos)
        return f"they take: {', '.join(known) or 'no options'}"


class _Unparsed(str):
    """A value of ``-p``, whose type is known once its owner is."""

    __slots__ = ()


def roles(registry: Registry, *names: str) -> Roles:
    """What a command may choose from: ``scheme`` (recipes are named by the same flag) and ``format``."""
    tables: dict[str, list[Declaration]] = {
        "scheme": [*registry.schemes.values(), *registry.recipes.values()],
        "format": [*registry.exporters.values()],
    }
    return {name: tables[name] for name in names}


def with_options(choices: Roles) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the declared options of every plugin it may choose.

    Typer reads a command's signature, so the flags are added there. The command takes ``param`` (the values of ``-p``)
    and ``typed``, which it is given as a :class:`Typed` in place of the single options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        fixed = [p for p in signature.parameters.values() if p.name != "typed"]
        added = flag_parameters(choices, taken={"help", *(p.name.rstrip("_") for p in fixed)})

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            flags = {name: values.pop(name) for name in added}
            given = {name: value for name, value in flags.items() if value is not None}
            command(**values, typed=Typed(given, values.get("param") or (), choices))

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*fixed, *added.values())]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def flag_parameters(choices: Roles, taken: set[str]) -> dict[str, inspect.Parameter]:
    """One optional flag per option name, its help naming whose it is.

    :param taken: names that the command has itself; options of these names are reached by ``-p`` only.
    """
    users: dict[str, list[tuple[str, Declaration, OptionInfo]]] = {}
    for role, declarations in choices.items():
        for declaration in declarations:
            for info in option_infos(declaration.options):
                users.setdefault(info.name, []).append((role, declaration, info))
    parameters = {}
    for name, found in users.items():
        kind = found[0][2].type  # conflicting types: the first keeps the flag
        words = {name, f"no_{name}"} if kind is bool else {name}
        if words & taken:
            continue
        taken = taken | words
        parameters[name] = _parameter(name, kind, found)
    return parameters


def _parameter(name: str, kind: type, found: Sequence[tuple[str, Declaration, OptionInfo]]) -> inspect.Parameter:
    same = [(role, declaration, info) for role, declaration, info in found if info.type is kind]
    other = [declaration.name for _, declaration, info in found if info.type is not kind]
    variants: dict[tuple[str, str], list[str]] = {}
    for _, declaration, info in same:
        variants.setdefault((info.help, _limits(info)), []).append(declaration.name)
    if len(variants) == 1:
        text, limits = next(iter(variants))
        help_text = f"{text}{limits} ({_listed(d.name for _, d, _ in same)})"
    else:
        help_text = " | ".join(f"{_listed(names)}: {text}{limits}" for (text, limits), names in variants.items())
    if other:
        help_text += f" (for {', '.join(other)}: -p {name}=VALUE)"
    chosen_by = " and ".join(dict.fromkeys(f"--{role}" for role, _, _ in same))
    allowed = dict.fromkeys(str(c) for _, _, info in same for c in info.choices or ())
    words = name.replace("_", "-")
    flag = typer.Option(
        f"--{words}/--no-{words}" if kind is bool else f"--{words}",
        help=escape(help_text),
        show_default=False,
        rich_help_panel=f"Options that depend on {chosen_by}",
        metavar="|".join(allowed) or None,
    )
    annotation = Annotated[kind | None, flag]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _limits(info: OptionInfo) -> str:
    limits = [f"one of {', '.join(map(str, info.choices))}"] if info.choices else []
    limits += [f"at least {info.minimum}"] if info.minimum is not None else []
    shown = ("yes" if info.default else "no") if info.type is bool else info.default
    limits += [f"default {shown}"] if shown != "" else []
    return f" [{'; '.join(limits)}]" if limits else ""


def _listed(names: Iterable[str]) -> str:
    """Names in one line; ``int2, int3, int4`` is ``int2-int4``."""
    runs: list[list[str]] = []
    for name in dict.fromkeys(names):  # a recipe may be called as a scheme is
        stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
        follows = number and runs and runs[-1][-1] == f"{stem}{int(number) - 1}"
        if follows:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def escape(text: str) -> str:
    """``text`` as it is, where rich would read markup. Without importing rich, which only ``--help`` needs."""
    return text.replace("[", r"\[")

"""The user's rules: which tensors get which scheme. Imports no torch.

A recipe is TOML (docs/recipes.md)::

    scheme = "int4"             # for whatever no rule takes; may be left out
    base = "default"            # rules that follow the recipe's own: "default", "none", or a plugin's recipe

    [options]                   # of that scheme
    group_size = 64

    [[rules]]                   # the first rule that matches decides
    match = "*.down_proj"       # glob, or "re:" and a regular expression; or a list of them
    kind = "linear"             # and/or the kind, and/or
    module = "Linear"           # the class of the module that owns it
    scheme = "int8"             # "keep" leaves the tensor as it is
    options = { granularity = "channel" }
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from monoquant_core.errors import RecipeError
from monoquant_core.kinds import KEPT_KINDS
from monoquant_core.model import ModelInfo, TensorSpec

KEEP = "keep"
DEFAULT = "default"
NONE = "none"


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors that match all given conditions get a scheme, or stay as they are.

    :raises RecipeError: for a rule without conditions, or a regular expression that does not compile.
    """

    scheme: str  #: a scheme's name, or "keep"
    match: tuple[str, ...] = ()  #: any of these patterns, on the tensor's name or its module's
    kind: str = ""
    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""  #: shown in the plan; made from the conditions when empty
    origin: str = ""  #: where the user wrote it: "--keep '*.bias'"; empty for rules of a base recipe

    def __post_init__(self) -> None:
        if not (self.match or self.kind or self.module):
            raise RecipeError(f"rule {self.origin or self.scheme}: give match, kind or module")
        if self.scheme == KEEP and self.options:
            raise RecipeError(f"rule {self.label}: 'keep' takes no options")
        for pattern in self.match:
            _compile(pattern)

    @property
    def label(self) -> str:
        """How messages name the rule."""
        conditions = [*self.match]
        conditions += [f"kind {self.kind}"] if self.kind else []
        conditions += [f"module {self.module}"] if self.module else []
        return self.origin or " and ".join(conditions)

    def matches(self, spec: TensorSpec) -> bool:
        """Whether it takes this tensor. A scheme's pattern that names a module takes its tensors of rank 2 and up."""
        if self.kind and spec.kind != self.kind:
            return False
        if self.module and spec.module != self.module:
            return False
        if not self.match:
            return True
        patterns = [_compile(p) for p in self.match]
        if any(p.search(spec.name) for p in patterns):
            return True
        owner, _, _ = spec.name.rpartition(".")
        return (self.scheme == KEEP or len(spec.shape) > 1) and any(p.search(owner) for p in patterns if owner)

    def to_dict(self) -> dict[str, Any]:
        """TOML form."""
        data: dict[str, Any] = {"match": list(self.match)} if self.match else {}
        data |= {key: getattr(self, key) for key in ("kind", "module") if getattr(self, key)}
        data["scheme"] = self.scheme
        data |= {"options": dict(self.options)} if self.options else {}
        return data | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme for everything, and the rules that override it."""

    scheme: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""  #: "" is the format's own default
    rules: tuple[Rule, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """TOML form; :func:`load_recipe` reads it back."""
        data: dict[str, Any] = {k: getattr(self, k) for k in ("scheme", "base") if getattr(self, k)}
        if self.options:
            data["options"] = dict(self.options)
        if self.rules:
            data["rules"] = [rule.to_dict() for rule in self.rules]
        return data


class RecipeSource(Protocol):
    """Computes the rules of a named recipe: what a RecipeDeclaration names."""

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """Rules in order; tensors that none takes get the user's scheme, or stay as they are without one."""
        ...


class DefaultRecipe:
    """Keeps what is small or sensitive; leaves the weight matrices and kernels to the scheme."""

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """One rule per kept kind."""
        return [Rule(KEEP, kind=kind, reason=reason) for kind, reason in KEPT_KINDS.items()]


class NoRecipe:
    """Keeps nothing by itself."""

    def rules(self, info: ModelInfo, specs: Sequence[TensorSpec]) -> Sequence[Rule]:
        """No rules."""
        return []


def load_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from a TOML file, from the same as a dict, or as it is.

    :raises RecipeError: naming the file, the key and what is expected.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _recipe(source, "recipe")
    path = Path(source)
    try:
        if path.stat().st_size > 10_000_000:
            raise RecipeError(f"{path}: larger than 10 MB, not a recipe")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"{path}: {exc.strerror or exc}", hint="--recipe takes a TOML file") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise RecipeError(f"{path}: not TOML: {exc}") from exc
    return _recipe(data, str(path))


def keep_rule(pattern: str) -> Rule:
    """The rule of ``--keep PATTERN``."""
    return Rule(KEEP, (pattern,), origin=f"--keep {pattern!r}")


def parse_set(text: str) -> Rule:
    """The rule of ``--set 'PATTERN=SCHEME:key=value,key=value'``; option values stay text until the scheme is known.

    The pattern ends at the last ``=`` before the first ``:key=``, so that it may hold ``=`` itself.

    :raises RecipeError: when the text has no ``=``.
    """
    start = len("re:") if text.startswith("re:") else 0
    options_at = re.compile(r":[A-Za-z_][\w-]*=").search(text, start)
    head = text[: options_at.start()] if options_at else text
    pattern, equals, scheme = head.rpartition("=")
    if not equals or not pattern or not scheme:
        raise RecipeError(f"--set {text!r}", hint="write PATTERN=SCHEME or PATTERN=SCHEME:key=value,key=value")
    options: dict[str, Any] = {}
    for item in text[options_at.start() + 1 :].split(",") if options_at else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"--set {text!r}: {item!r} is not key=value")
        options[key.strip().replace("-", "_")] = Text(value.strip())
    return Rule(scheme, (pattern,), options=options, origin=f"--set {text!r}")


class Text(str):
    """An option's value as it was typed, to be parsed once its type is known."""

    __slots__ = ()


def refuse_base(name: str) -> None:
    """Refuse a base of recipes as a scheme.

    :raises RecipeError: saying where bases are named.
    """
    if name.lower() in (DEFAULT, NONE):
        raise RecipeError(
            f"{name!r} is no scheme: it is a base, the rules that follow a recipe's own",
            hint=f'in a recipe file: base = "{name.lower()}"; "keep" leaves tensors as they are',
        )


def near_names(pattern: str, specs: Sequence[TensorSpec]) -> list[str]:
    """Names in the model that look like a pattern which matched nothing."""
    bare = pattern.removeprefix("re:").strip("*^$.").replace("\\", "")
    names = list(dict.fromkeys(s.name for s in specs))
    inside = [n for n in names if bare and bare.lower() in n.lower()]
    parts = {part: n for n in reversed(names) for part in (n, *n.split("."))}
    close = [parts[c] for c in difflib.get_close_matches(bare, parts, n=3, cutoff=0.5)]
    return list(dict.fromkeys([*inside[:3], *close]))[:3] or names[:3]


def _compile(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(r"\A" + fnmatch.translate(pattern))
    try:
        return re.compile(pattern[3:])
    except re.error as exc:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {exc}") from exc


def _recipe(data: Mapping[str, Any], where: str) -> Recipe:
    _check_keys(data, {"scheme": str, "base": str, "options": dict, "rules": list}, where)
    rules = []
    for number, entry in enumerate(data.get("rules", []), 1):
        label = f"{where}: rule {number}"
        if not isinstance(entry, Mapping):
            raise RecipeError(f"{label}: a table expected, got {entry!r}")
        allowed = {"match": (str, list), "kind": str, "module": str, "scheme": str, "options": dict, "reason": str}
        _check_keys(entry, allowed, label)
        if not entry.get("scheme"):
            raise RecipeError(f"{label}: scheme is missing", hint='name a scheme, or "keep"')
        match = entry.get("match", [])
        patterns = (match,) if isinstance(match, str) else tuple(match)
        if not all(isinstance(p, str) for p in patterns):
            raise RecipeError(f"{label}: match is a pattern or a list of patterns, got {match!r}")
        conditions = {key: entry.get(key, "") for key in ("kind", "module", "reason")}
        named = " and ".join([*patterns, *(f"{k} {entry[k]}" for k in ("kind", "module") if entry.get(k))])
        rules.append(
            Rule(entry["scheme"], patterns, options=entry.get("options", {}), origin=f"{label} ({named})", **conditions)
        )
    return Recipe(data.get("scheme", ""), data.get("options", {}), data.get("base", ""), tuple(rules))


def _check_keys(data: Mapping[str, Any], allowed: Mapping[str, Any], where: str) -> None:
    for key, value in data.items():
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(allowed)}"
            raise RecipeError(f"{where}: unknown key {key!r}", hint=hint)
        if not isinstance(value, allowed[key]):
            raise RecipeError(f"{where}: {key} has the wrong type: {value!r}")

"""Finding plugins, and keeping a broken one from breaking the rest."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, metadata
from typing import Any, TypeVar

import pluggy

from monoquant_core import hookspecs
from monoquant_core.declarations import (
    CalibratorDeclaration,
    Declaration,
    ExporterDeclaration,
    ProbeDeclaration,
    RecipeDeclaration,
    RuntimeDeclaration,
    SchemeDeclaration,
    SourceDeclaration,
)
from monoquant_core.errors import MonoquantError, PluginError, UnknownNameError
from monoquant_core.options import option_infos

D = TypeVar("D", bound=Declaration)

#: hook -> what it declares, the word for it, and the Registry's table
TABLES: dict[str, tuple[type[Declaration], str, str]] = {
    "monoquant_register_schemes": (SchemeDeclaration, "scheme", "schemes"),
    "monoquant_register_recipes": (RecipeDeclaration, "recipe", "recipes"),
    "monoquant_register_calibrators": (CalibratorDeclaration, "calibrator", "calibrators"),
    "monoquant_register_probes": (ProbeDeclaration, "probe", "probes"),
    "monoquant_register_sources": (SourceDeclaration, "source", "sources"),
    "monoquant_register_exporters": (ExporterDeclaration, "format", "exporters"),
    "monoquant_register_runtimes": (RuntimeDeclaration, "runtime", "runtimes"),
}

#: ``--scheme NAME`` looks in both tables, so that a recipe may stand before a scheme of its own plugin, never another's
SHARED_NAMES = dict.fromkeys(
    ("monoquant_register_schemes", "monoquant_register_recipes"),
    ("monoquant_register_schemes", "monoquant_register_recipes"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A plugin that was found and left out, and why."""

    plugin: str
    distribution: str
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin that is in use."""

    plugin: str
    distribution: str
    version: str


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


@dataclass
class Registry:
    """Everything that installed plugins declare. Keys are lower case; a declaration keeps its own spelling."""

    schemes: dict[str, SchemeDeclaration] = field(default_factory=dict)
    recipes: dict[str, RecipeDeclaration] = field(default_factory=dict)
    calibrators: dict[str, CalibratorDeclaration] = field(default_factory=dict)
    probes: dict[str, ProbeDeclaration] = field(default_factory=dict)
    sources: dict[str, SourceDeclaration] = field(default_factory=dict)
    exporters: dict[str, ExporterDeclaration] = field(default_factory=dict)
    runtimes: dict[str, RuntimeDeclaration] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  #: alias of a scheme -> its key
    loaded: list[Loaded] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)  #: (hook, key) -> plugin
    manager: pluggy.PluginManager = field(default_factory=_manager)

    def scheme(self, name: str) -> SchemeDeclaration:
        """The scheme of that name or alias, in any case.

        :raises UnknownNameError: naming the nearest one, or what to install.
        """
        return self._lookup(self.schemes, self.aliases.get(name.lower(), name), "scheme")

    def recipe(self, name: str) -> RecipeDeclaration:
        """The recipe of that name.

        :raises UnknownNameError: naming the nearest one, or what to install.
        """
        return self._lookup(self.recipes, name, "recipe")

    def exporter(self, name: str) -> ExporterDeclaration:
        """The format of that name.

        :raises UnknownNameError: naming the nearest one, or what to install.
        """
        return self._lookup(self.exporters, name, "format")

    def calibrator(self, name: str) -> CalibratorDeclaration:
        """The calibrator of that name.

        :raises UnknownNameError: naming the nearest one, or what to install.
        """
        return self._lookup(self.calibrators, name, "calibrator")

    def runtime(self, name: str) -> RuntimeDeclaration:
        """The runtime of that name.

        :raises UnknownNameError: naming the nearest one, or what to install.
        """
        return self._lookup(self.runtimes, name, "runtime")

    def make(self, declared: Declaration, options: object) -> Any:
        """What a declaration names, with its options.

        If it has a method ``use(registry)``, that is called first of all: plugins with hooks of their own ask the
        registry that is in use, not the installed plugins.
        """
        made = declared.load()(options)
        use = getattr(made, "use", None)
        if callable(use):
            use(self)
        return made

    def _lookup(self, table: dict[str, D], name: str, what: str) -> D:
        if name.lower() in table:
            return table[name.lower()]
        known = [declared.name for declared in table.values()]
        spelled = {n.lower(): n for n in known} | ({a: a for a in self.aliases} if what == "scheme" else {})
        close = difflib.get_close_matches(name.lower(), spelled, n=1)
        if close:
            hint = f"did you mean {spelled[close[0]]!r}?"
        elif self.problems:
            hint = f"{len(self.problems)} plugin(s) failed to load; see 'monoquant plugins list'"
        else:
            hint = install_hint(name)
        raise UnknownNameError(f"no {what} {name!r}; installed: {', '.join(sorted(known)) or 'none'}", hint=hint)


def load_registry(extra: tuple[object, ...] = (), *, found: Iterable[EntryPoint] | None = None) -> Registry:
    """Load every installed plugin that works; note the others in ``problems``.

    Entry points are taken in the order of their names, so nothing depends on install order.
    ``MONOQUANT_DISABLED_PLUGINS`` (names, comma-separated) leaves plugins out unasked;
    ``MONOQUANT_STRICT_PLUGINS=1`` makes the first problem an error.

    :param extra: plugin modules given in code, loaded before the installed ones.
    :param found: entry points to use in place of the installed ones.
    :raises PluginError: only with ``MONOQUANT_STRICT_PLUGINS``.
    """
    registry = Registry()
    disabled = {name.strip() for name in os.environ.get("MONOQUANT_DISABLED_PLUGINS", "").split(",")}
    candidates: list[tuple[Loaded, object]] = [(Loaded(getattr(p, "__name__", repr(p)), "-", "-"), p) for p in extra]
    points = entry_points(group=hookspecs.PROJECT) if found is None else found
    for ep in sorted(points, key=lambda ep: (ep.name, ep.value)):
        if ep.name in disabled:
            continue
        dist = ep.dist
        plugin = Loaded(ep.name, dist.name if dist else "-", dist.version if dist else "-")
        with _noting_problems(registry, plugin, "failed to import: "):
            candidates.append((plugin, ep.load()))
    usable: list[tuple[Loaded, object]] = []
    for plugin, module in candidates:
        # Hooks that plugins bring come first: an implementer may sort before the plugin that specifies them.
        with _noting_problems(registry, plugin):
            _check_api(plugin, module)
            _add_hookspecs(registry, plugin, module)
            usable.append((plugin, module))
    for plugin, module in usable:
        with _noting_problems(registry, plugin):
            _register(registry, plugin, module)
    raise_if_strict(registry)
    return registry


def raise_if_strict(registry: Registry) -> None:
    """Make the first problem an error if ``MONOQUANT_STRICT_PLUGINS`` asks for it.

    :raises PluginError: naming the plugin.
    """
    if registry.problems and os.environ.get("MONOQUANT_STRICT_PLUGINS", "0") not in ("", "0"):
        first = registry.problems[0]
        raise PluginError(first.plugin, first.reason)


def install_hint(name: str) -> str:
    """What to install for a name that no plugin provides: only extras that the distribution really has."""
    try:
        extras = [e for e in metadata("monoquant").get_all("Provides-Extra") or [] if e != "all"]
    except PackageNotFoundError:
        extras = []
    if name.lower() in extras:
        return f"try: pip install 'monoquant[{name.lower()}]'"
    if extras:
        return f"extras that bring plugins: {', '.join(f'monoquant[{e}]' for e in extras)}"
    return "install a plugin that provides it"


@contextlib.contextmanager
def _noting_problems(registry: Registry, plugin: Loaded, prefix: str = "") -> Iterator[None]:
    """Note a failure of a plugin, in one line, and go on: a plugin may fail in any way."""
    try:
        yield
    except (Exception, SystemExit) as exc:  # noqa: BLE001
        if isinstance(exc, PluginError):
            reason = exc.reason
        elif isinstance(exc, MonoquantError | pluggy.PluginValidationError):
            reason = str(exc)
        else:
            reason = repr(exc)
        registry.problems.append(Problem(plugin.plugin, plugin.distribution, prefix + " ".join(reason.split())))


def _check_api(plugin: Loaded, module: object) -> None:
    api = getattr(module, "MONOQUANT_HOOK_API", hookspecs.HOOK_API)
    if api != hookspecs.HOOK_API:
        raise PluginError(plugin.plugin, f"wants hook API {api}, this monoquant has {hookspecs.HOOK_API}")


def _add_hookspecs(registry: Registry, plugin: Loaded, module: object) -> None:
    own = getattr(module, "MONOQUANT_HOOKSPECS", None)
    if own is None:
        return
    manager = registry.manager
    # pluggy finds out half-way, when the first of them are already in.
    for name in dir(own):
        caller = getattr(manager.hook, name, None)
        if caller is not None and manager.parse_hookspec_opts(own, name) is not None and caller.has_spec():
            raise PluginError(plugin.plugin, f"MONOQUANT_HOOKSPECS: hook {name!r} is already specified")
    manager.add_hookspecs(own)


def _register(registry: Registry, plugin: Loaded, module: object) -> None:
    manager = registry.manager
    if manager.get_plugin(plugin.plugin) is not None:
        raise PluginError(plugin.plugin, "another installed distribution has an entry point of this name")
    if manager.is_registered(module):
        raise PluginError(plugin.plugin, f"is the same module as plugin {manager.get_name(module)!r}")
    try:
        manager.register(module, name=plugin.plugin)  # a wrong argument is found half-way, with hooks already in
        manager.check_pending()
        declared = _collect(registry, plugin.plugin, module)
    except BaseException:
        if manager.is_registered(module):
            manager.unregister(module)
        raise
    # Only now that all of it is known to be good does any of it become visible.
    for hook, items in declared.items():
        table: dict[str, Any] = getattr(registry, TABLES[hook][2])
        for item in items:
            table[item.name.lower()] = item
            registry.origins[hook, item.name.lower()] = plugin.plugin
            for alias in getattr(item, "aliases", ()):
                if alias.lower() != item.name.lower():
                    registry.aliases[alias.lower()] = item.name.lower()
                    registry.origins[hook, alias.lower()] = plugin.plugin
    registry.loaded.append(plugin)


def _collect(registry: Registry, plugin: str, module: object) -> dict[str, list[Declaration]]:
    others = [p for p in registry.manager.get_plugins() if p is not module]
    declared: dict[str, list[Declaration]] = {}
    for hook, (kind, word, _) in TABLES.items():
        seen: set[str] = set()
        for items in registry.manager.subset_hook_caller(hook, remove_plugins=others)():
            for item in items:
                if not isinstance(item, kind):
                    raise PluginError(plugin, f"{hook} gave {item!r}, not a {kind.__name__}")
                option_infos(item.options)
                for name in dict.fromkeys(n.lower() for n in (item.name, *getattr(item, "aliases", ()))):
                    for table in SHARED_NAMES.get(hook, (hook,)):
                        if (table, name) in registry.origins:
                            owner, theirs = registry.origins[table, name], TABLES[table][1]
                            raise PluginError(plugin, f"{theirs} {name!r} is already registered by {owner!r}")
                    if name in seen:
                        raise PluginError(plugin, f"{word} {name!r} is declared twice")
                    seen.add(name)
                declared.setdefault(hook, []).append(item)
    return declared

"""The application: built-in commands, then those of plugins."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from monoquant_core import __version__
from monoquant_core.cli import (
    calibration,
    catalog,
    compare,
    conformance,
    doctor,
    export,
    inspect,
    plan,
    plugins,
    quantize,
    verify,
)
from monoquant_core.cli.render import out
from monoquant_core.plugins import Problem, Registry, raise_if_strict

HELP = "Quantize any PyTorch model and export it to the file its runtime loads."


def build_app(registry: Registry) -> typer.Typer:
    """The command line for what is installed."""
    app = typer.Typer(
        name="monoquant",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    commands = (quantize, export, plan, calibration, inspect, compare, verify, catalog, plugins, doctor, conformance)
    for command in commands:
        command.register(app, registry)
    _register_plugin_commands(app, registry)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        out(f"monoquant {__version__}")
        raise typer.Exit()


def _register_plugin_commands(app: typer.Typer, registry: Registry) -> None:
    """Ask one plugin at a time, so that one that fails, or takes another's name, is left out by name."""
    manager = registry.manager
    for plugin in registry.loaded:
        module = manager.get_plugin(plugin.plugin)
        commands, groups, taken = list(app.registered_commands), list(app.registered_groups), _names(app)
        callback = app.registered_callback
        others = [p for p in manager.get_plugins() if p is not module]
        reason = ""
        try:
            manager.subset_hook_caller("monoquant_register_commands", remove_plugins=others)(app=app)
            _try(app.registered_commands[len(commands) :], app.registered_groups[len(groups) :])
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - a plugin may fail in any way
            reason = f"its commands failed to register: {exc!r}"
        names = _names(app)
        clash = next((name for name in names[len(taken) :] + names if names.count(name) > 1), None)
        if clash and not reason:
            reason = f"its command {clash!r} exists already; its commands are left out"
        if app.registered_callback is not callback and not reason:
            reason = "it replaces the callback of the application, which is monoquant's; its commands are left out"
        if reason:
            app.registered_commands[:], app.registered_groups[:] = commands, groups
            app.registered_callback = callback
            registry.problems.append(Problem(plugin.plugin, plugin.distribution, reason))
    raise_if_strict(registry)


def _try(commands: Sequence[Any], groups: Sequence[Any]) -> None:
    """Build commands now: what typer cannot make options of would else stop every command, when the first one runs."""
    trial = typer.Typer()
    trial.registered_commands, trial.registered_groups = list(commands), list(groups)
    if commands or groups:
        typer.main.get_command(trial)


def _names(app: typer.Typer) -> list[str]:
    named = [c.name or getattr(c.callback, "__name__", "").replace("_", "-") for c in app.registered_commands]
    groups = [g.name or (g.typer_instance.info.name if g.typer_instance else None) for g in app.registered_groups]
    return [*named, *(name for name in groups if isinstance(name, str))]

"""``plugins``: what is installed, and what was left out and why."""

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.render import Column, heading, out, out_json, printable, table
from monoquant_core.plugins import TABLES, Registry, install_hint


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""
    sub = typer.Typer(no_args_is_help=True, help="Installed plugins, and those left out with the reason.")

    @sub.command("list", help="List installed plugins with what they provide, and those left out with the reason.")
    def list_(json: flags.Json = False) -> None:
        provided = {plugin.plugin: _provided(registry, plugin.plugin) for plugin in registry.loaded}
        if json:
            loaded = [
                {
                    "plugin": p.plugin,
                    "distribution": p.distribution,
                    "version": p.version,
                    "provides": provided[p.plugin],
                }
                for p in registry.loaded
            ]
            problems = [
                {"plugin": p.plugin, "distribution": p.distribution, "reason": p.reason} for p in registry.problems
            ]
            out_json({"plugins": loaded, "left_out": problems})
            return
        if registry.loaded:
            columns = [Column("plugin"), Column("distribution"), Column("version"), Column("provides", fold=True)]
            table(
                columns,
                [
                    [
                        p.plugin,
                        p.distribution,
                        p.version,
                        "; ".join(f"{k} {', '.join(v)}" for k, v in provided[p.plugin].items()),
                    ]
                    for p in registry.loaded
                ],
            )
        else:
            out(f"no plugins installed; {install_hint('standard')}")
        if registry.problems:
            out()
            heading("left out")
            for problem in registry.problems:
                out(printable(f"  {problem.plugin} ({problem.distribution}): {problem.reason}"))

    app.add_typer(sub, name="plugins")


def _provided(registry: Registry, plugin: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for hook, (_, _, name) in TABLES.items():
        declared = getattr(registry, name)
        mine = [d.name for key, d in declared.items() if registry.origins.get((hook, key)) == plugin]
        if mine:
            found["formats" if name == "exporters" else name] = mine
    module = registry.manager.get_plugin(plugin)
    callers = registry.manager.get_hookcallers(module) or [] if module is not None else []
    if more := [caller.name for caller in callers if caller.name not in TABLES]:
        found["hooks"] = sorted(more)
    return found

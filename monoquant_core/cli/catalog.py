"""``schemes``, ``formats``, ``recipes`` and ``calibrators``: what installed plugins offer, with their options."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from monoquant_core.cli import flags
from monoquant_core.cli.render import Column, fields, heading, out, out_json, table
from monoquant_core.declarations import Declaration
from monoquant_core.options import option_infos
from monoquant_core.plugins import Registry, install_hint

BUILT_IN_RECIPES = {  #: the core's own, which no plugin declares
    "default": "keeps norms, biases, embeddings, positional tensors, routers and heads; the rest gets the scheme",
    "none": "keeps nothing by itself",
}


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the commands."""
    for plural, table_of, lookup in (
        ("schemes", registry.schemes, registry.scheme),
        ("formats", registry.exporters, registry.exporter),
        ("recipes", registry.recipes, registry.recipe),
        ("calibrators", registry.calibrators, registry.calibrator),
    ):
        app.add_typer(_catalog(plural, registry, table_of, lookup), name=plural)


def _catalog(plural: str, registry: Registry, declared: Mapping[str, Declaration], lookup: Any) -> typer.Typer:
    sub = typer.Typer(no_args_is_help=True, help=f"List installed {plural}, or show the options of one.")

    @sub.command("list", help=f"List installed {plural}.")
    def list_(json: flags.Json = False) -> None:
        entries = [describe(d, registry, plural) for _, d in sorted(declared.items())]
        if plural == "recipes":
            built_in = [{"name": n, "summary": s, "plugin": "built in"} for n, s in BUILT_IN_RECIPES.items()]
            entries = [*built_in, *entries]
        if json:
            out_json(entries)
        elif entries:
            columns = [Column("name"), Column("what it is", fold=True), Column("plugin"), Column("also")]
            table(columns, [[e["name"], e["summary"], e["plugin"], ", ".join(e.get("aliases", ()))] for e in entries])
        else:
            out(f"no {plural} installed; {install_hint(plural)}")

    @sub.command("show", help="Show what one is and the options it takes.")
    def show(
        name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)], json: flags.Json = False
    ) -> None:
        if plural == "recipes" and name.lower() in BUILT_IN_RECIPES:
            entry: dict[str, Any] = {"name": name.lower(), "summary": BUILT_IN_RECIPES[name.lower()], "options": []}
        else:
            entry = describe(lookup(name), registry, plural)
        if json:
            out_json(entry)
        else:
            _show(entry)

    return sub


def describe(declared: Declaration, registry: Registry, plural: str) -> dict[str, Any]:
    """A declaration as JSON: everything that flags, recipes and docs are made from."""
    hook = "monoquant_register_exporters" if plural == "formats" else f"monoquant_register_{plural}"
    plugin = registry.origins.get((hook, declared.name.lower()), "-")
    entry: dict[str, Any] = {"name": declared.name, "summary": declared.summary, "plugin": plugin}
    for name in ("aliases", "recipe", "suffix", "needs"):
        if hasattr(declared, name):
            value = getattr(declared, name)
            entry[name] = list(value) if isinstance(value, tuple) else value
    entry["options"] = [
        {
            "name": info.name,
            "flag": info.flag,
            "type": info.type.__name__,
            "default": info.default,
            "choices": None if info.choices is None else list(info.choices),
            "minimum": info.minimum,
            "help": info.help,
        }
        for info in option_infos(declared.options)
    ]
    return entry


def _show(entry: Mapping[str, Any]) -> None:
    heading(f"{entry['name']}: {entry['summary']}")
    about = [(key, entry[key]) for key in ("plugin", "recipe", "suffix") if entry.get(key)]
    if entry.get("aliases"):
        about.append(("also", ", ".join(entry["aliases"])))
    if entry.get("needs") == "graph":
        about.append(("needs", "the model's graph: a module, a .pt2 program or an .onnx file"))
    fields(about)
    out()
    if not entry["options"]:
        out("It takes no options.")
        return
    columns = [Column("option"), Column("flag"), Column("type"), Column("default"), Column("meaning", fold=True)]
    rows = []
    for o in entry["options"]:
        limits = f" (one of {', '.join(map(str, o['choices']))})" if o["choices"] else ""
        limits += f" (at least {o['minimum']})" if o["minimum"] is not None else ""
        shown = ("yes" if o["default"] else "no") if o["type"] == "bool" else str(o["default"])
        rows.append([o["name"], o["flag"], o["type"], shown, o["help"] + limits])
    table(columns, rows)

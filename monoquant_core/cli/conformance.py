"""``conformance``: the kit on an installed plugin."""

import importlib.util
from typing import Annotated

import typer

from monoquant_core.errors import MonoquantError
from monoquant_core.plugins import Registry


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""
    del registry

    @app.command()
    def conformance(
        plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="Name as 'plugins list' shows it.")],
    ) -> None:
        """Run the conformance kit on everything that an installed plugin declares; status 1 when it finds a fault."""
        if importlib.util.find_spec("pytest") is None:  # which importing the kit needs
            raise MonoquantError("the conformance kit needs pytest", hint="pip install pytest")
        from monoquant_core.testing.command import run

        raise typer.Exit(run(plugin))

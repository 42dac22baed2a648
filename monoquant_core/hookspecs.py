"""The hooks a monoquant plugin can implement.

A plugin is a module named by an entry point in the group ``monoquant``. It
implements any subset of these hooks, each taking any subset of the arguments.
The registering hooks are called once per process, before anything heavy is
imported: a plugin module may import ``monoquant_core.declarations``,
``monoquant_core.hookspecs`` and ``monoquant_core.options``, and must not import
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from monoquant_core import declarations as d
    from monoquant_core.planning import Decision
    from monoquant_core.probes import ProbeResult

PROJECT = "monoquant"
HOOK_API = 1  #: raised only when an old plugin can no longer work; see docs/plugins/versioning.md

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def monoquant_register_schemes() -> Iterable[d.SchemeDeclaration]:
    """Declare quantization schemes, such as ``int8`` or ``nf4``.

    :return: declarations; their names and aliases join those of every other plugin,
        and a name already taken leaves the later plugin out.
    """


@hookspec
def monoquant_register_recipes() -> Iterable[d.RecipeDeclaration]:
    """Declare named recipes: which tensors get which scheme, such as ``Q4_K_M``.

    :return: declarations; ``--scheme NAME`` looks among recipes first, then among schemes.
    """


@hookspec
def monoquant_register_calibrators() -> Iterable[d.CalibratorDeclaration]:
    """Declare ways to turn observed values into ranges, such as ``minmax``.

    :return: declarations; each is constructed once per observed tensor.
    """


@hookspec
def monoquant_register_probes() -> Iterable[d.ProbeDeclaration]:
    """Declare probes of what the machine at hand can run fast.

    :return: declarations; probes run only for ``monoquant doctor`` and ``--probe``.
    """


@hookspec
def monoquant_register_sources() -> Iterable[d.SourceDeclaration]:
    """Declare readers of finished files.

    :return: declarations; every reader whose suffix matches is asked in order of plugin name
        whether it recognises the path, and the first that does opens it. The core's own readers come last.
    """


@hookspec
def monoquant_register_exporters() -> Iterable[d.ExporterDeclaration]:
    """Declare file formats for ``--format NAME``.

    :return: declarations; an exporter is constructed once per run with its options.
    """


@hookspec
def monoquant_register_runtimes() -> Iterable[d.RuntimeDeclaration]:
    """Declare runtimes that can open a finished file and run it, for verification.

    :return: declarations; constructed on use, so that a missing runtime costs nothing.
    """


@hookspec
def monoquant_register_commands(app: typer.Typer) -> None:
    """Add commands to the ``monoquant`` CLI.

    Called when the command line is built, after every built-in command exists.

    :param app: the root application; add with ``@app.command()``.
    """


@hookspec(firstresult=True)
def monoquant_decide(proposed: Decision, probes: Mapping[str, ProbeResult]) -> Decision | None:
    """Change what the plan does to one tensor.

    Called for every tensor after the recipe's rules, before anything is read.
    pluggy asks the plugin that registered last first; ``tryfirst`` and ``trylast`` change that.

    :param proposed: what the recipe decided.
    :param probes: results by probe name, empty unless the user asked for probing.
    :return: another decision, whose ``reason`` names this plugin; or None to
        leave it. The first plugin that answers wins.
    """

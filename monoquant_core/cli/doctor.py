"""``doctor``: what this machine has, and how well every scheme and format runs on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from monoquant_core import __version__
from monoquant_core.cli import flags
from monoquant_core.cli.render import Column, fields, heading, notes, out, out_json, table
from monoquant_core.declarations import Declaration
from monoquant_core.plugins import Registry, install_hint
from monoquant_core.probes import Finding, ProbeResult

SPEEDS = {"fast": "fast", "slow": "works, slow", "no": "not here"}
UNKNOWN = "not known to the probes"


def register(app: typer.Typer, registry: Registry) -> None:
    """Add the command."""

    @app.command()
    def doctor(json: flags.Json = False) -> None:
        """Show what this machine has and, per scheme and format, what runs fast, slowly or not at all, and why."""
        results = run_probes(registry)
        verdicts = {
            "schemes": judge(results, "scheme", registry.schemes),
            "formats": judge(results, "format", registry.exporters),
        }
        if json:
            out_json(as_dict(registry, results, verdicts))
            return
        _show_machine(registry, results)
        for title, found in verdicts.items():
            out()
            heading(title)
            _show_verdicts(found, title)
        notes([f"{r.device}: {line}" for r in results.values() for line in r.notes])
        notes([f"{p.plugin} ({p.distribution}): {p.reason}" for p in registry.problems], "plugins left out")


def run_probes(registry: Registry) -> dict[str, ProbeResult]:
    """Ask every installed probe; one that fails is a result that says so."""
    results = {}
    for declared in registry.probes.values():
        try:
            result = registry.make(declared, declared.options()).probe()
            if not isinstance(result, ProbeResult):
                raise TypeError(f"it gives a {type(result).__name__}")
        except Exception as exc:  # noqa: BLE001 - a plugin may fail in any way
            result = ProbeResult(declared.name, present=False, summary=f"the probe failed: {exc!r}")
        results[declared.name] = result
    return results


def judge(
    results: Mapping[str, ProbeResult], what: str, declared: Mapping[str, Declaration]
) -> dict[str, list[tuple[str, Finding]]]:
    """What the probes say of every installed scheme or format, the best first; nothing for those they do not know."""
    order = list(SPEEDS)
    found = {}
    for declaration in declared.values():
        key = f"{what}:{declaration.name}"
        said = [(result.device, result.findings[key]) for result in results.values() if key in result.findings]
        found[declaration.name] = sorted(said, key=lambda item: order.index(item[1].speed))
    return found


def as_dict(
    registry: Registry,
    results: Mapping[str, ProbeResult],
    verdicts: Mapping[str, Mapping[str, Sequence[tuple[str, Finding]]]],
) -> dict[str, Any]:
    """JSON form."""
    probes = {
        name: {
            "device": r.device,
            "present": r.present,
            "summary": r.summary,
            "fast_elements": list(r.fast_elements),
            "memory_bytes": r.memory_bytes,
            "facts": dict(r.facts),
            "notes": list(r.notes),
        }
        for name, r in results.items()
    }
    judged = {
        title: {
            name: [{"on": on, "speed": f.speed, "reason": f.reason, "install": f.install} for on, f in said]
            for name, said in found.items()
        }
        for title, found in verdicts.items()
    }
    left_out = [{"plugin": p.plugin, "distribution": p.distribution, "reason": p.reason} for p in registry.problems]
    return {"monoquant": __version__, "probes": probes, **judged, "left_out": left_out}


def _show_machine(registry: Registry, results: Mapping[str, ProbeResult]) -> None:
    heading(f"monoquant {__version__}")
    plugins = ", ".join(f"{p.plugin} {p.version}" for p in registry.loaded)
    fields([("plugins", plugins or f"none; {install_hint('standard')}")])
    out()
    heading("this machine")
    if not results:
        out(f"  no probes installed; {install_hint('probes')}")
        return
    fields([(r.device, r.summary) for r in results.values()])


def _show_verdicts(found: Mapping[str, Sequence[tuple[str, Finding]]], title: str) -> None:
    if not found:
        out(f"  none installed; {install_hint('standard')}")
        return
    rows = []
    for name, said in found.items():
        if not said:
            rows.append([name, "?", "", UNKNOWN])
        for index, (on, finding) in enumerate(said):
            reason = f"{finding.reason}; to install: {finding.install}" if finding.install else finding.reason
            rows.append(["" if index else name, SPEEDS[finding.speed], on, reason])
    columns = [Column(title.removesuffix("s")), Column("here"), Column("on"), Column("why", fold=True)]
    table(columns, rows)

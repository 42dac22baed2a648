"""Makes the plan: from a source's headers, the user's choice and a format. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from monoquant_core import options as opts
from monoquant_core.declarations import ExporterDeclaration
from monoquant_core.errors import MonoquantError, PlanError
from monoquant_core.exporters import Exporter, FileLayout, FilePlan
from monoquant_core.model import ModelInfo, Source, TensorSpec
from monoquant_core.negotiation import Placer
from monoquant_core.planning import OnUnsupported, Plan, Step, bits_per_weight, describe
from monoquant_core.plugins import Registry
from monoquant_core.probes import ProbeResult
from monoquant_core.recipe import Recipe, Rule
from monoquant_core.selection import (
    Chooser,
    ask_plugins,
    check_fuse_groups,
    check_needs,
    check_not_empty,
    follow_ties,
)
from monoquant_core.stats import TensorStats


def make_plan(
    source: Source,
    *,
    registry: Registry,
    scheme: str = "",
    scheme_options: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    rules: Sequence[Rule] = (),
    format: str = "",
    format_options: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "error",
    destination: str = "",
    quantizing: bool = True,
    stats: Mapping[str, TensorStats] | None = None,
    probes: Mapping[str, ProbeResult] | None = None,
) -> Plan:
    """Decide what happens to every tensor.

    :param scheme: for tensors that no rule takes; a named recipe or a scheme. It overrides the recipe's own.
    :param rules: come before the recipe's rules: ``--keep`` and ``--set``.
    :param format: name of an exporter; without one the plan stays in memory.
    :param on_unsupported: what to do with tensors of a finished file that the format cannot hold.
    :param destination: name of the file or folder to be written.
    :param quantizing: whether a plan that quantizes nothing is an error. If not, and ``on_unsupported`` is
        "requantize", ``scheme`` is for finished tensors that the format cannot hold.
    :param stats: calibration statistics by point, see :mod:`monoquant_core.stats`.
    :raises PlanError: naming all tensors concerned, before anything is read.
    :raises RecipeError: for a rule that matches nothing.
    """
    if on_unsupported not in (choices := get_args(OnUnsupported)):
        raise PlanError(f"on_unsupported is one of {', '.join(choices)}, got {on_unsupported!r}")
    specs = source.specs()
    info = source.info
    recipe = recipe or Recipe()
    exporter = declared = None
    if format:
        declared = registry.exporter(format)
        exporter = load_exporter(registry, declared, format_options or {}, specs, info)
        with_stats = getattr(exporter, "with_stats", None)
        if stats is not None and with_stats is not None:
            exporter = with_stats(stats)
    format_base = getattr(exporter, "recipe", "") or (declared.recipe if declared else "")
    floats_stay = not quantizing and on_unsupported == "requantize"
    chosen = scheme_options or {}
    chooser = Chooser(registry, recipe, rules, scheme, chosen, info, specs, format_base, stats, floats_stay=floats_stay)
    decisions = [chooser.decide(spec) for spec in specs]
    if chooser.hopeless:
        chooser.report_refusals()
    try:
        decisions = [ask_plugins(registry, d, probes or {}) for d in decisions]
        decisions = follow_ties(decisions)
        check_needs(decisions, stats or {})
        if quantizing:
            if getattr(exporter, "fuses", True):
                check_fuse_groups(decisions)
            check_not_empty(decisions, info)
        steps, decisions, notes = Placer(decisions, info, exporter, on_unsupported, chooser).place()
    except MonoquantError:
        chooser.report_refusals()  # what was planned on is refused, whatever comes of the rest
        raise
    chooser.report_refusals(bits_per_weight(steps))
    notes += _said_by_schemes(steps)
    files: tuple[FilePlan, ...] = ()
    if exporter is not None:
        ties = {d.spec.name: d.spec.tied_to for d in decisions if d.spec.tied_to is not None and d.action == "drop"}
        placed = tuple(step.placed for step in steps)
        layout = FileLayout(placed, info, destination, _hash(steps, info, stats), ties)
        files = tuple(exporter.files(layout))
        notes += list(getattr(exporter, "notes", lambda _: ())(layout))
    unique = tuple(dict.fromkeys([*info.notes, *notes]))
    name = declared.name if declared else ""
    return Plan(info, tuple(decisions), tuple(steps), files, name, exporter, unique, chooser.as_recipe())


def _said_by_schemes(steps: Sequence[Step]) -> Iterator[str]:
    """What schemes say of the tensors that they quantize."""
    made = [
        (step.quantizer, step.spec, step.placed.held.encoding)
        for step in steps
        if step.quantizer is not None and step.placed.held.encoding is not None
    ]
    for quantizer in {id(q): q for q, _, _ in made}.values():
        if hasattr(quantizer, "notes"):
            yield from quantizer.notes([(spec, encoding) for q, spec, encoding in made if q is quantizer])


def source_for(
    registry: Registry, source: Source, declared: ExporterDeclaration, values: Mapping[str, Any], example: Any
) -> Source:
    """The source as a format wants it: itself, the graph that the format makes of it, or the checkpoint that it was.

    :param example: one batch of inputs (a tensor, a tuple or a dict of them), where there is one.
    :raises MonoquantError: when no graph can be made, or no checkpoint, saying why.
    """
    exporter = registry.make(declared, opts.build(declared.options, values, owner=f"--format {declared.name}"))
    if declared.needs == "graph":
        read: Callable[[Source, Any], Source] | None = getattr(exporter, "read_graph", None)
        return read(source, example) if read else source
    view: Callable[[], Source | None] | None = getattr(source, "checkpoint", None)
    if view is not None and getattr(exporter, "of_checkpoints", False):
        return view() or source
    return source


def load_exporter(
    registry: Registry,
    declared: ExporterDeclaration,
    values: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    info: ModelInfo,
) -> Exporter:
    """An exporter with its options bound, resolved for this model."""
    if declared.needs == "graph" and info.graph is None:
        raise PlanError(
            f"{info.name}: --format {declared.name} needs the model's graph, and a checkpoint has only tensors",
            hint="quantize from a module, a .pt2 program or an .onnx file",
        )
    exporter: Exporter = registry.make(
        declared, opts.build(declared.options, values, owner=f"--format {declared.name}")
    )
    resolve: Callable[..., Exporter] | None = getattr(exporter, "resolve", None)
    return resolve(specs, info) if resolve else exporter


def _hash(steps: Sequence[Step], info: ModelInfo, stats: Mapping[str, TensorStats] | None) -> str:
    """Identifies what is written, for names of files that must not collide."""
    content: list[Any] = [
        [s.placed.output.name, s.action, s.scheme, describe(s), s.placed.held.layout, list(s.placed.output.shape)]
        for s in steps
    ]
    for step in steps:
        if step.placed.proposal is not None and step.placed.proposal.activation is not None:
            content.append(step.placed.proposal.activation.to_dict())
    if stats is not None:  # importance decides codes, and ranges those of biases
        content.append([getattr(stats, label, "") for label in ("calibrator", "model", "data")])
    text = json.dumps([info.config, content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""A model with the schemes chosen for it: planned, calibrated and saved on demand. Imports torch only for tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monoquant_core.errors import PlanError, SourceError
from monoquant_core.planner import make_plan, source_for
from monoquant_core.planning import OnUnsupported, Plan
from monoquant_core.plugins import Registry
from monoquant_core.recipe import Recipe, Rule
from monoquant_core.selection import Chooser

if TYPE_CHECKING:
    import torch

    from monoquant_core.calibration import Calibration
    from monoquant_core.model import Source
    from monoquant_core.report import ProgressCallback, Report
    from monoquant_core.runners import Batch
    from monoquant_core.statistics import Statistics
    from monoquant_core.stats import TensorStats
    from monoquant_core.tensor import QuantizedTensor

DEFAULT_FORMAT = "safetensors"
DEFAULT_CALIBRATOR = "mse"


class QuantizedModel:
    """A source and what is to become of it. Lazy: memory does not grow with the model until you ask for tensors.

    Usable as a context manager; closing it closes the files it reads.
    """

    def __init__(
        self,
        source: Source,
        registry: Registry,
        scheme: str = "",
        options: Mapping[str, Any] | None = None,
        recipe: Recipe | None = None,
        rules: Sequence[Rule] = (),
        stats: Mapping[str, TensorStats] | None = None,
        *,
        quantizing: bool = True,
        example: Any = None,
    ) -> None:
        self.source = source
        self._example = example
        self._graphs: dict[str, Source] = {}
        self._registry, self._scheme, self._options = registry, scheme, dict(options or {})
        self._recipe, self._rules, self._stats, self._quantizing = recipe or Recipe(), rules, stats, quantizing

    def __enter__(self) -> QuantizedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the source, and the graphs made of it."""
        for source in (self.source, *self._graphs.values()):
            source.close()

    def variant(self, scheme: str, options: Mapping[str, Any] | None = None) -> QuantizedModel:
        """The same source with another scheme, or named recipe; rules, recipe and statistics stay.

        Both read the one source: closing either closes it.

        :raises MonoquantError: for an unknown scheme, and options that it does not take.
        """
        made = QuantizedModel(
            self.source,
            self._registry,
            scheme,
            options,
            self._recipe,
            self._rules,
            self._stats,
            example=self._example,
        )
        made._graphs = self._graphs
        made._check_choice()
        return made

    def plan(
        self,
        format: str = "",
        *,
        format_options: Mapping[str, Any] | None = None,
        destination: str = "",
        on_unsupported: OnUnsupported = "error",
    ) -> Plan:
        """What happens to every tensor, for a format or, without one, in memory.

        :raises MonoquantError: for everything that is known to fail.
        """
        return make_plan(
            self._source_for(format, format_options),
            registry=self._registry,
            scheme=self._scheme if self._quantizing or on_unsupported == "requantize" else "",
            scheme_options=self._options,
            recipe=self._recipe if self._quantizing or on_unsupported == "requantize" else Recipe(base="none"),
            rules=self._rules,
            format=format,
            format_options=format_options,
            on_unsupported=on_unsupported,
            destination=destination,
            quantizing=self._quantizing,
            stats=self._stats,
        )

    def calibrate(
        self,
        data: str | os.PathLike[str] | Iterable[Batch],
        *,
        calibrator: str = DEFAULT_CALIBRATOR,
        options: Mapping[str, Any] | None = None,
        format: str = "",
        format_options: Mapping[str, Any] | None = None,
        points: Collection[str] | None = None,
        device: str = "",
        cache: str | os.PathLike[str] | None = None,
        keep: bool = False,
        progress: Callable[[int], None] | None = None,
        **taken: Any,
    ) -> Statistics:
        """Run the model on data, and use what is learned from now on. Parameters as in :func:`calibrate`.

        :param keep: keep statistics in the user's cache folder, and use those that are there.
        :param taken: ``samples``, ``batch_size``, ``seed``, ``preprocess``, ``tokenizer``, ``length``.
        """
        job = self.calibration(
            data,
            calibrator=calibrator,
            options=options,
            format=format,
            format_options=format_options,
            points=points,
            device=device,
            **taken,
        )
        stats = job.cached(Path(cache) if cache else None, progress) if cache or keep else job.run(progress)
        self._stats = stats
        return stats

    def calibration(
        self,
        data: str | os.PathLike[str] | Iterable[Batch],
        *,
        calibrator: str = DEFAULT_CALIBRATOR,
        options: Mapping[str, Any] | None = None,
        format: str = "",
        format_options: Mapping[str, Any] | None = None,
        points: Collection[str] | None = None,
        device: str = "",
        **taken: Any,
    ) -> Calibration:
        """A calibration that is ready to run. Parameters as in :func:`calibrate`; nothing is run."""
        declared = self._registry.calibrator(calibrator)
        from monoquant_core.calibration import Calibration
        from monoquant_core.data import DataOptions, Recipient, batches_of
        from monoquant_core.graphs import runnable_of

        graph, info = runnable_of(self.source), self.source.info
        target = Recipient(info.name, graph.inputs, info.side_files, info.config)
        data = batches_of(data, target, DataOptions(**taken))
        if self._example is None and iter(data) is not data:
            self._example = next(iter(data), None)  # for formats that trace the model
        needs_graph = bool(format) and self._registry.exporter(format).needs == "graph"
        if needs_graph:
            made = self._source_for(format, format_options)
            graph = graph if made is self.source else runnable_of(made)
        name = self._registry.exporter(format).name if needs_graph else ""
        return Calibration(self.source, graph, data, declared, options or {}, name, points, device)

    def save(
        self,
        path: str | os.PathLike[str],
        format: str = "",
        *,
        format_options: Mapping[str, Any] | None = None,
        threads: int = 0,
        device: str = "cpu",
        force: bool = False,
        fresh: bool = False,
        nonfinite: Literal["refuse", "allow"] = "refuse",
        on_unsupported: OnUnsupported = "error",
        progress: ProgressCallback | None = None,
    ) -> Report:
        """Write it. The path holds nothing, the old file or the complete new one, whatever happens.

        A run that takes some time and is interrupted is resumed by the next one that is the same.

        :param format: without it, what the suffix of the path says, or safetensors.
        :param threads: 0 is one per usable core, at most 8, or 4 for an accelerator. They never change a byte.
        :param force: replace what is there.
        :param fresh: begin anew, whatever an interrupted run had done.
        :param nonfinite: whether NaN and infinity may stay in tensors that are kept.
        :raises MonoquantError: naming the file and the tensor.
        """
        target = Target(self, path, format, format_options, on_unsupported)
        (report,) = save_all(
            [target],
            threads=threads,
            device=device,
            force=force,
            fresh=fresh,
            nonfinite=nonfinite,
            progress=progress,
        )
        return report

    def _check_choice(self) -> None:
        """Refuse unknown names, options and rules that match nothing; the rest depends on the format."""
        source, specs = self.source, list(self.source.specs())
        if (self._recipe.rules or self._rules) and (view := getattr(source, "checkpoint", None)) is not None:
            # Some formats read a source under other names, and rules may take these.
            with contextlib.suppress(SourceError):
                other = view()
                specs += other.specs() if other is not None else ()
        Chooser(self._registry, self._recipe, self._rules, self._scheme, self._options, source.info, specs)

    def _source_for(self, format: str, values: Mapping[str, Any] | None) -> Source:
        """What a format reads: the source, or what is made of it for the format, once."""
        if not format:
            return self.source
        declared = self._registry.exporter(format)
        key = f"{declared.name} {sorted((values or {}).items())}"
        if key not in self._graphs:
            made = source_for(self._registry, self.source, declared, values or {}, self._example)
            if made is self.source:
                return made
            self._graphs[key] = made
        return self._graphs[key]

    def tensors(self) -> Iterator[tuple[str, QuantizedTensor | torch.Tensor]]:
        """Every tensor, one at a time; tied names are left out."""
        from monoquant_core.engine import RunOptions, compute

        # What a file holds may be looked at; NaN is refused when it would be quantized or written.
        options = RunOptions(nonfinite="allow")
        for step in self.plan().steps:
            yield step.placed.output.name, compute(step, self.source, stats=self._stats, options=options)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors dequantized, in their source's dtype, tied names included: for ``module.load_state_dict``."""
        from monoquant_core.tensor import QuantizedTensor, dtype_of

        specs = {spec.name: spec for spec in self.source.specs()}
        state: dict[str, torch.Tensor] = {}
        for name, value in self.tensors():
            floats = value.dequantize() if isinstance(value, QuantizedTensor) else value
            state[name] = floats.to(dtype_of(specs[name].dtype)) if isinstance(value, QuantizedTensor) else floats
        for spec in specs.values():
            if spec.tied_to in state:
                state[spec.name] = state[spec.tied_to]
        return {name: state[name] for name in specs if name in state}

    def apply_to(self, module: torch.nn.Module) -> None:
        """Put the dequantized weights into a module that has tensors of these names (fake quantization).

        Buffers that models compute, such as ``position_ids``, may be missing on either side.

        :raises SourceError: when names or shapes differ; the module is unchanged then.
        """
        from monoquant_core.graphs import put_weights

        if not (callable(module) and hasattr(module, "state_dict")):
            raise SourceError(f"{type(module).__name__}: a module is wanted", hint="state_dict() gives the tensors")
        state = self.state_dict()
        put_weights(module, self.source.info.name, {n: tuple(t.shape) for n, t in state.items()}, state.__getitem__)


@dataclass(frozen=True, slots=True)
class Target:
    """One of the outputs of :func:`save_all`."""

    model: QuantizedModel
    path: str | os.PathLike[str]
    format: str = ""  #: "" is what the suffix of the path says, or safetensors
    format_options: Mapping[str, Any] | None = None
    on_unsupported: OnUnsupported = "error"


def save_all(
    targets: Sequence[Target],
    *,
    threads: int = 0,
    device: str = "cpu",
    force: bool = False,
    fresh: bool = False,
    nonfinite: Literal["refuse", "allow"] = "refuse",
    progress: ProgressCallback | None = None,
) -> list[Report]:
    """Write several outputs of one source in one pass, in which every tensor is read once.

    All are planned before anything is read, and complete and on the disk before the first gets its name. Parameters as
    in :meth:`QuantizedModel.save`.

    :param targets: of one model, and of what its :meth:`QuantizedModel.variant` gives.
    :return: a report for each; time and memory in it are those of the whole run.
    :raises MonoquantError: naming the file and the tensor.
    """
    if nonfinite not in ("refuse", "allow"):
        raise PlanError(f"nonfinite is one of refuse, allow, got {nonfinite!r}")
    if not isinstance(threads, int) or threads < 0:
        raise PlanError(f"threads is a number, or 0 for as many as there are cores, got {threads!r}")
    outputs = plan_all(targets)
    from monoquant_core.engine import RunOptions, write_all  # not before the plans: refusals need not wait for torch

    first = targets[0]
    source = first.model._source_for(outputs[0][0].format, first.format_options)
    options = RunOptions(threads=threads, device=device, force=force, fresh=fresh, nonfinite=nonfinite)
    return write_all(outputs, source, options, stats=first.model._stats, progress=progress)


def plan_all(targets: Sequence[Target]) -> list[tuple[Plan, Path]]:
    """What :func:`save_all` would write, and where to.

    :raises MonoquantError: for everything that is known to fail; of several outputs, naming the one concerned.
    """
    if not targets:
        raise PlanError("no outputs to write")
    outputs, sources = [], []
    for target in targets:
        model, registry = target.model, target.model._registry
        format = target.format or format_for(target.path, registry)
        path = destination_for(target.path, format, registry)
        options, how = target.format_options, target.on_unsupported
        try:
            plan = model.plan(format, format_options=options, destination=path.name, on_unsupported=how)
        except PlanError as exc:
            if len(targets) == 1 or str(exc).startswith(f"{path.name}: "):
                raise
            raise type(exc)(f"{path}: {exc}", hint=exc.hint) from exc
        outputs.append((plan, path))
        sources.append((model._source_for(format, options), model._stats))
    for (plan, path), (source, stats) in zip(outputs, sources, strict=True):
        if source is not sources[0][0] or stats is not sources[0][1]:
            raise PlanError(
                f"{path}: {plan.format} reads another source than {outputs[0][1]}, so one pass cannot write both",
                hint="write it in a run of its own",
            )
    from monoquant_core.commit import Destination, check_apart

    check_apart([Destination(path, plan.files) for plan, path in outputs])
    return outputs


def format_for(path: str | os.PathLike[str], registry: Registry, default: str = DEFAULT_FORMAT) -> str:
    """The format that the suffix of a path says: by its declaration, or by its name."""
    suffix = Path(path).suffix.lower()
    said = (d.name for d in registry.exporters.values() if suffix and suffix in (d.suffix, f".{d.name.lower()}"))
    return next(said, default)


def destination_for(path: str | os.PathLike[str], format: str, registry: Registry) -> Path:
    """The destination, with the format's suffix where it has one and the path has none."""
    declared = registry.exporter(format)
    target = Path(path)
    if not target.name or "\0" in str(target):
        raise PlanError(f"{path}: not a name for an output")
    return target.with_suffix(declared.suffix) if declared.suffix and not target.suffix else target

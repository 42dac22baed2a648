"""The few lines users type: ``import monoquant_core as mq``. Imports torch only when tensors are needed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core.errors import CalibrationError, ExecutionError, OptionError, PlanError, PluginError
from monoquant_core.planning import OnUnsupported, Plan
from monoquant_core.plugins import Registry, load_registry
from monoquant_core.quantized import DEFAULT_CALIBRATOR, DEFAULT_FORMAT, QuantizedModel
from monoquant_core.recipe import Recipe, keep_rule, load_recipe, parse_set

if TYPE_CHECKING:
    from monoquant_core.agreement import Verification
    from monoquant_core.model import Source
    from monoquant_core.report import Comparison, Report
    from monoquant_core.runners import Batch
    from monoquant_core.runtimes import Runtime
    from monoquant_core.sources import Model
    from monoquant_core.statistics import Statistics
    from monoquant_core.stats import TensorStats

    Stats = str | os.PathLike[str] | Mapping[str, TensorStats]

RecipeLike = Recipe | Mapping[str, Any] | str | Path
DEFAULT_SCHEME = "int8"
MADE_UP = 4  #: samples that are made up where there are no data


@functools.cache
def installed() -> Registry:
    """The plugins installed in this environment, loaded once."""
    return load_registry()


def open_source(
    src: Model,
    *,
    weights: str | os.PathLike[str] | None = None,
    registry: Registry | None = None,
    unsafe_pickle: bool = False,
) -> Source:
    """Open a checkpoint, a finished file, an nn.Module, a program or a state_dict; reads headers only.

    :param src: may also be ``"pkg.mod:factory"``, code that makes the module.
    :param weights: a checkpoint to load into that module.
    :raises SourceError: naming the file and what is wrong with it.
    """
    from monoquant_core.sources import open_source as open_

    return open_(src, registry or installed(), weights=weights, unsafe_pickle=unsafe_pickle)


def plan(
    src: Model,
    *,
    scheme: str = "",
    options: Mapping[str, Any] | None = None,
    format: str = DEFAULT_FORMAT,
    format_options: Mapping[str, Any] | None = None,
    recipe: RecipeLike | None = None,
    keep: str | Sequence[str] = (),
    set: str | Sequence[str] = (),
    destination: str = "",
    on_unsupported: OnUnsupported = "error",
    stats: Stats | None = None,
    example: Any = None,
    weights: str | os.PathLike[str] | None = None,
    unsafe_pickle: bool = False,
    registry: Registry | None = None,
) -> Plan:
    """What ``quantize`` would do, from headers alone. Without scheme, recipe and rules it takes int8.

    :param options: of the scheme, such as ``{"group_size": 64}``.
    :param keep: patterns of tensors to leave as they are, or one.
    :param set: rules as ``"PATTERN=SCHEME:key=value"``, or one; the first that matches decides.
    :raises MonoquantError: for everything that is known to fail, before anything is read.
    """
    model = quantize(
        src,
        scheme=scheme,
        options=options,
        recipe=recipe,
        keep=keep,
        set=set,
        stats=stats,
        example=example,
        weights=weights,
        unsafe_pickle=unsafe_pickle,
        registry=registry,
    )
    with model:
        return model.plan(format, format_options=format_options, destination=destination, on_unsupported=on_unsupported)


def quantize(
    src: Model,
    *,
    scheme: str = "",
    options: Mapping[str, Any] | None = None,
    recipe: RecipeLike | None = None,
    keep: str | Sequence[str] = (),
    set: str | Sequence[str] = (),
    stats: Stats | None = None,
    example: Any = None,
    weights: str | os.PathLike[str] | None = None,
    unsafe_pickle: bool = False,
    registry: Registry | None = None,
) -> QuantizedModel:
    """A model with the schemes chosen; tensors are quantized when they are asked for or saved.

    Parameters as in :func:`plan`.

    :param stats: what :func:`calibrate` learned, a file of it, or statistics by point or by tensor name.
    :param example: one batch of inputs (a tensor, a tuple or a dict of them), for formats that trace the model.
    :param weights: a checkpoint to load into the module that ``src`` is, or makes.
    :raises MonoquantError: when the source, the recipe or the scheme is refused.
    """
    loaded = load_recipe(recipe) if recipe is not None else Recipe()
    if not (scheme or loaded.scheme or loaded.base):
        scheme = DEFAULT_SCHEME if not (loaded.rules or set) else ""
    rules = (*map(keep_rule, _several(keep)), *map(parse_set, _several(set)))
    registry = registry or installed()
    source = open_source(src, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
    try:
        known = _statistics(stats, source)
        model = QuantizedModel(source, registry, scheme, options, loaded, rules, known, example=example)
        model._check_choice()
    except BaseException:
        source.close()
        raise
    return model


def calibrate(
    src: Model,
    data: str | os.PathLike[str] | Iterable[Batch],
    *,
    calibrator: str = DEFAULT_CALIBRATOR,
    options: Mapping[str, Any] | None = None,
    format: str = "",
    format_options: Mapping[str, Any] | None = None,
    samples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    preprocess: str = "",
    tokenizer: str = "",
    length: int = 0,
    points: Collection[str] | None = None,
    device: str = "",
    cache: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
    unsafe_pickle: bool = False,
    registry: Registry | None = None,
) -> Statistics:
    """Run a model on data and learn the ranges and the importance of what its weights are multiplied with.

    :param src: something that can be run: a module, an ExportedProgram or ``.pt2``, ``pkg.mod:factory``, the folder of
        a transformers model, or a graph that a format reads.
    :param data: batches (a tensor, a tuple, or a dict by input name each), or what ``--data`` names: a file, a folder
        of images, or ``pkg.mod:function``; ``samples`` to ``length`` are for these.
    :param options: of the calibrator, such as ``{"percentile": 99.9}``.
    :param format: a format that needs a graph: its graph is run, so that values that only it has are learned, too.
    :param points: what to watch, such as ``["layer1.conv:input"]``; by default what weights are multiplied with, and
        what their modules give.
    :param cache: a file of statistics that is used if it is of this model, data and calibrator, and made if there is
        none.
    :param progress: called with the samples seen so far.
    :raises CalibrationError: when there is nothing to run, a batch does not fit, or a value is NaN or infinite.
    """
    registry = registry or installed()
    source = open_source(src, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
    with QuantizedModel(source, registry, quantizing=False) as model:
        return model.calibrate(
            data,
            calibrator=calibrator,
            options=options,
            format=format,
            format_options=format_options,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            preprocess=preprocess,
            tokenizer=tokenizer,
            length=length,
            points=points,
            device=device,
            cache=cache,
            progress=progress,
        )


def load(path: str | os.PathLike[str], *, registry: Registry | None = None) -> QuantizedModel:
    """A finished file, or any checkpoint, as it is: nothing is quantized.

    :raises SourceError: naming the file and what is wrong with it.
    """
    registry = registry or installed()
    return QuantizedModel(open_source(path, registry=registry), registry, quantizing=False)


def export(
    src: Model,
    path: str | os.PathLike[str],
    format: str = "",
    *,
    scheme: str = "",
    options: Mapping[str, Any] | None = None,
    on_unsupported: OnUnsupported = "error",
    example: Any = None,
    weights: str | os.PathLike[str] | None = None,
    unsafe_pickle: bool = False,
    registry: Registry | None = None,
    **save: Any,
) -> Report:
    """Write a model in a format: finished files are repacked, floats stay floats, nothing is requantized unasked.

    :param scheme: only for ``on_unsupported="requantize"``.
    :param save: the options of :meth:`QuantizedModel.save`.
    :raises MonoquantError: naming the file and the tensor.
    """
    check_exported(scheme, on_unsupported)
    registry = registry or installed()
    source = open_source(src, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
    with QuantizedModel(source, registry, scheme, options, quantizing=False, example=example) as model:
        return model.save(path, format, on_unsupported=on_unsupported, **save)


def check_exported(scheme: str, on_unsupported: str) -> None:
    """Refuse a scheme that nothing would get."""
    if scheme and on_unsupported != "requantize":
        raise OptionError(
            f"export does not quantize, and --scheme {scheme} would",
            hint="use quantize, or --on-unsupported requantize for a finished file",
        )


def compare(a: Model, b: Model, *, registry: Registry | None = None) -> list[Comparison]:
    """Tensor by tensor, the worst first; quantized tensors are dequantized.

    :raises SourceError: naming the file and what is wrong with it.
    """
    from monoquant_core.metrics import compare_sources

    registry = registry or installed()
    first, second = open_source(a, registry=registry), open_source(b, registry=registry)
    try:
        found = list(compare_sources(first, second))
    finally:
        first.close()
        second.close()
    return sorted(found, key=lambda c: (c.status == "compared", c.sqnr_db, c.name))


def verify(
    path: str | os.PathLike[str],
    against: Model,
    data: str | os.PathLike[str] | Iterable[Batch] | None = None,
    *,
    runtime: str = "",
    tolerance: float | None = None,
    weights: str | os.PathLike[str] | None = None,
    samples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    preprocess: str = "",
    tokenizer: str = "",
    length: int = 0,
    unsafe_pickle: bool = False,
    registry: Registry | None = None,
) -> Verification:
    """Run a finished file in its runtime, and hold the outputs against its own dequantized values and the original.

    :param against: what was quantized.
    :param data: batches: a tensor, a tuple or a mapping by input name; ``labels`` among them are the right classes. Or
        what ``--data`` names; ``samples`` to ``length`` are for it. None makes inputs up, on which no quality is
        measured.
    :param weights: a checkpoint for the module that ``against`` is, or makes.
    :param runtime: name of one, where several run the file.
    :param tolerance: largest relative error against the dequantized values; None is what the runtime's arithmetic
        explains.
    :raises ExecutionError: when no runtime runs the file, or it does not load it.
    """
    from monoquant_core.calibration import as_batch
    from monoquant_core.data import DataOptions, Recipient, batches_of
    from monoquant_core.graphs import made_up_batch, runnable_of
    from monoquant_core.verification import Subject, named, verify_with

    registry = registry or installed()
    target = Path(path)
    with contextlib.ExitStack() as opened:
        finished = open_source(path, registry=registry)
        opened.callback(finished.close)
        name, running = find_runtime(target, registry, runtime)
        original = open_source(against, weights=weights, registry=registry, unsafe_pickle=unsafe_pickle)
        opened.callback(original.close)
        graph, info = runnable_of(original), original.info
        if data is None:
            batches = [made_up_batch(graph, MADE_UP)]
        else:
            taken = DataOptions(samples, batch_size, seed, preprocess, tokenizer, length)
            takes = Recipient(info.name, graph.inputs, info.side_files, info.config, extra=("labels",))
            batches = [named(as_batch(batch), graph.inputs) for batch in batches_of(data, takes, taken)]
        subject = Subject(target, finished, name, running)
        return verify_with(subject, original, batches, tolerance=tolerance, scored=data is not None)


def find_runtime(path: Path, registry: Registry, name: str = "") -> tuple[str, Runtime]:
    """The runtime of that name, or the first that runs the file; with its name.

    :raises ExecutionError: when there is none.
    """
    declared = [registry.runtime(name)] if name else list(registry.runtimes.values())
    failed = []
    for declaration in declared:
        try:
            runtime: Runtime = registry.make(declaration, declaration.options())
            recognised = runtime.recognises(path)
        except Exception as exc:  # noqa: BLE001 - a broken plugin must not take the others down
            failed.append(f"; {declaration.name}: {exc.reason if isinstance(exc, PluginError) else repr(exc)}")
            continue
        if recognised:
            return declaration.name, runtime
    known = ", ".join(registry.runtimes) or "none installed"
    raise ExecutionError(f"{path}: no runtime runs files of this kind; known: {known}{''.join(failed)}")


def _several(texts: str | Sequence[str]) -> Sequence[str]:
    return (texts,) if isinstance(texts, str) else texts


def _statistics(stats: Stats | None, source: Source) -> Mapping[str, TensorStats] | None:
    """Statistics, read where they are a file, and of this model where they say so."""
    if stats is None:
        return None
    from monoquant_core.statistics import Statistics
    from monoquant_core.stats import TensorStats

    name = "the statistics"
    if isinstance(stats, str | os.PathLike):
        name, stats = os.fspath(stats), Statistics.load(stats)
    if isinstance(stats, Statistics):
        stats.check_model(source, name)
    elif not isinstance(stats, Mapping) or not all(isinstance(found, TensorStats) for found in stats.values()):
        raise CalibrationError(
            f"stats: {type(stats).__name__}: no statistics",
            hint="give what calibrate returned, the file of it, or TensorStats by point or tensor name",
        )
    return stats


def save_recipe(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the recipe that repeats a plan, as TOML.

    :raises PlanError: when the file cannot be written.
    """
    import tomli_w

    text = tomli_w.dumps(dict(plan.recipe))
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise PlanError(f"{path}: {exc.strerror}") from exc

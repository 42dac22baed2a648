"""From a module, an exported program or a transformers folder to an ONNX graph whose tensors have the model's names.

torch.export traces, torch.onnx translates. What neither promises is checked here by running: that the graph computes
what the module does, also for other extents than those of the example, before anything is quantized.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch.utils import _pytree

from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.graphs import made_up_batch, runnable_of
from monoquant_core.model import ModelInfo, Source
from monoquant_onnx.fold import einsums_to_matmuls, fold_batch_norms
from monoquant_onnx.graph import OnnxGraph, in_memory, quiet
from monoquant_onnx.naming import name_tensors
from monoquant_onnx.sameness import Reference
from monoquant_onnx.shapes import check_extents, name_dims
from monoquant_onnx.source import OnnxSource

if TYPE_CHECKING:
    from monoquant_core.runners import Batch

OPSET = 21  #: the oldest with 4-bit integers and blocks
SAMPLES = 2  #: of a batch to trace with: torch.export takes an extent of 1 for a constant
MOST = 4  #: samples of an example that are used

_SHAPE_TROUBLE = re.compile(
    r"constraint|dynamic|specializ|symbolic|SymInt|guard|data-dependent|ShapeEnv|unbacked", re.IGNORECASE
)
_DATA_DEPENDENT = re.compile(r"data-dependent|GuardOnDataDependent", re.IGNORECASE)


def trace(source: Source, example: Batch | None = None) -> OnnxSource:
    """The source as a graph.

    :param example: a batch to trace with; without one it is made up, where the model says what it takes.
    :raises SourceError: when torch cannot export it, or the graph does not compute what the module does.
    :raises CalibrationError: when there is nothing to run, or nothing tells what it takes.
    """
    runnable: Any = runnable_of(source)
    name = source.info.name
    notes: list[str] = []
    batch = _example(runnable, example, name)
    program = getattr(runnable, "program", None)
    if program is None:
        module, notes = _as_float32(runnable.module, name)
        with _evaluating(module):
            args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
            reference = Reference(module, args, kwargs, name)
            program = _export(module, reference, name)
            return _graph_source(source, program, reference, notes)
    called = _as_called(program, batch, [i.name for i in runnable.inputs])
    return _graph_source(source, program, Reference(program.module(), *called, name), notes)


def _graph_source(
    source: Source,
    program: torch.export.ExportedProgram,
    reference: Reference,
    notes: list[str],
) -> OnnxSource:
    name = source.info.name
    model = _translate(program, name)
    graph = OnnxGraph(model, in_memory(model.graph.initializers.values()), name)
    _name_inputs(graph, program)
    name_dims(graph, reference)
    _name_outputs(graph, reference)
    einsums_to_matmuls(graph)
    named = name_tensors(graph, program, source)
    passes.ClearMetadataAndDocStringPass()(model)  # paths of the user's files among them
    notes += [*named.notes, *fold_batch_norms(graph)]
    graph.tidy()
    graph.names.update({n: n for n in graph.data if n not in set(graph.names.values())})
    graph.names = {spec: initializer for spec, initializer in graph.names.items() if initializer in graph.data}
    graph.infer_shapes()
    notes += check_extents(graph, reference)
    info = ModelInfo(
        name,
        source.info.config,
        source.info.side_files,
        source.info.paths,
        graph,
        source.info.metadata,
        tuple(dict.fromkeys([*source.info.notes, *notes])),
    )
    tied = {spec: first for spec, first in named.tied.items() if first in graph.names}
    modules = {spec.name: spec.module for spec in source.specs()}
    made = OnnxSource(info, tied=tied, modules=modules, close=source.close)
    made.specs()
    return made


def _example(runnable: Any, example: Batch | None, name: str) -> dict[str, Any] | tuple[Any, ...]:
    """What to trace with: a few samples, and more than one."""
    if example is None:
        try:
            made = made_up_batch(runnable, SAMPLES)
            if "attention_mask" in made:  # a mask of ones is one that models leave out
                made["attention_mask"][-1, -1] = 0
            return made
        except CalibrationError as exc:
            raise CalibrationError(
                f"{name}: nothing says what the model takes, and tracing its graph needs an example: {exc}",
                hint="--data FILE (example= in Python) gives one batch to trace with, also without calibration",
            ) from exc
    batch: dict[str, Any] | tuple[Any, ...]
    if isinstance(example, Mapping):
        batch = dict(example)
    else:
        batch = tuple(example) if isinstance(example, tuple | list) else (example,)
    tensors = [t for t in _pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim]
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) != 1:
        return batch
    size = sizes.pop()

    def few(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        return value.repeat_interleave(SAMPLES, 0) if size == 1 else value[:MOST]

    return _pytree.tree_map(few, batch)  # type: ignore[no-any-return]


def _as_called(
    program: torch.export.ExportedProgram, batch: Mapping[str, Any] | tuple[Any, ...], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the program was called when it was traced: positional or by name."""
    given = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    spec = program.call_spec.in_spec
    leaves = [given.get(name) for name in names]
    if spec is None or spec.num_leaves != len(leaves):
        return tuple(leaves), {}
    args, kwargs = _pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _as_float32(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, list[str]]:
    """The module, or a float32 copy of one in half precision, for which onnxruntime has few kernels on CPUs."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    halves = sorted({str(t.dtype)[6:] for _, t in tensors if t.dtype in (torch.float16, torch.bfloat16)})
    if not halves:
        return module, []
    made = copy.deepcopy(module).float()
    return made, [f"{name}: {' and '.join(halves)} weights become float32, which onnxruntime computes with"]


def _export(module: torch.nn.Module, reference: Reference, name: str) -> torch.export.ExportedProgram:
    """Trace with every extent free that may be; where torch does not get through, with fewer, then with none."""
    failures: list[Exception] = []
    for shapes in reference.dynamic_shapes():
        try:
            with _silent():
                return torch.export.export(
                    module, reference.args, reference.kwargs, dynamic_shapes=shapes, strict=False
                )
        except Exception as exc:  # noqa: BLE001 - a model may fail in any way, and torch.export in more
            failures.append(exc)
            if not _SHAPE_TROUBLE.search(f"{type(exc).__name__} {exc}"):
                break
    raise SourceError(
        f"{name}: torch.export does not take it: {_reason(failures[-1])}", hint=_hint(failures[-1])
    ) from failures[-1]


def _translate(program: torch.export.ExportedProgram, name: str) -> ir.Model:
    # Its checks of extents take arguments in another order than they are given, where there are keywords (torch 2.13).
    guards = getattr(program, "_guards_code", None)
    if guards:
        program._guards_code = []
    try:
        with _silent():
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    except Exception as exc:  # operators without a translation, and more
        raise SourceError(
            f"{name}: torch.onnx does not translate it: {_reason(exc)}",
            hint="export it to .onnx yourself with what the operator needs, and give that file",
        ) from exc
    finally:
        if guards:
            program._guards_code = guards
    assert made is not None
    model = made.model
    if model.opset_imports.get("", 0) < OPSET:
        raise SourceError(f"{name}: torch.onnx made opset {model.opset_imports.get('', 0)}; {OPSET} is needed")
    return model


def _name_inputs(graph: OnnxGraph, program: torch.export.ExportedProgram) -> None:
    """Inputs have the names of arguments, also those that are given out again: ``x_orig`` and ``x`` of the exporter."""
    given = program.graph_signature.user_inputs
    for value in graph.model.graph.inputs:
        name = (value.name or "").removesuffix("_orig")
        if name == value.name or name not in given:
            continue
        same = next((v for node in graph.model.graph for v in node.outputs if v.name == name), None)
        if same is not None:
            same.name = graph.free_name(f"{name}_output")
        value.name = name


def _name_outputs(graph: OnnxGraph, reference: Reference) -> None:
    """Outputs that the module names keep those names."""
    outputs = graph.model.graph.outputs
    if len(outputs) == len(reference.output_names):
        for value, name in zip(outputs, reference.output_names, strict=True):
            if name and graph.free_name(name) == name:
                value.name = name


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of attention states; as it was afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    configs: dict[int, Any] = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        module.eval()
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Exporters report to the terminal; what matters is checked by running."""
    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        quiet("torch.onnx", "torch.export", "torch", "onnxscript", "onnx_ir", "torch.onnx._internal"),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        yield


def _reason(exc: BaseException) -> str:
    """The first cause that says something, on one line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    text = next((line.strip() for line in str(exc).splitlines() if line.strip()), "")
    return f"{type(exc).__name__}: {' '.join(text.split())[:240]}"


def _hint(exc: BaseException) -> str:
    if _DATA_DEPENDENT.search(f"{type(exc).__name__} {exc}"):
        return "its control flow depends on values: torch.cond expresses it, or give an .onnx file"
    return "give an .onnx file, or a .pt2 that torch.export.export made of it"

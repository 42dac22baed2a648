"""A finished file in onnxruntime, and where its optimizations change values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch

from monoquant_core.containers.entries import shown
from monoquant_core.errors import ExecutionError
from monoquant_core.runners import Batch, Input, Observe
from monoquant_onnx.graph import OnnxGraph
from monoquant_onnx.parsing import parse
from monoquant_onnx.runner import as_input, as_mapping, graph_inputs
from monoquant_onnx.sameness import distance
from monoquant_onnx.wire import read_structure

if TYPE_CHECKING:
    from typing import Self

#: nodes that only round or clip what the node before them computes
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "Cast")


class FileRunner:
    """An .onnx file as it lies on the disk.

    :param optimized: as users open it; else node by node, as it is written.
    :param also: values that become outputs.
    :raises ExecutionError: when onnxruntime does not load it.
    """

    def __init__(self, path: Path, *, optimized: bool, also: Sequence[str] = ()) -> None:
        self.path = path
        self.points: Sequence[str] = ()
        self.notes: list[str] = []
        graph = structure_of(path)
        self.inputs: Sequence[Input] = graph_inputs(graph)
        own = [value.name or "" for value in graph.model.graph.outputs]
        given = {i.name for i in self.inputs}
        more = [name for name in dict.fromkeys(also) if name not in own and name not in given]
        self.outputs = [*own, *more]
        model = with_outputs(path, self.outputs) if more else str(path)
        self._session: Any = open_session(model, path, optimized=optimized)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        """The outputs of a batch, by name.

        :raises CalibrationError: when the batch does not fit the inputs.
        :raises ExecutionError: when onnxruntime fails.
        """
        return run_session(self._session, feeds(batch, self.inputs, str(self.path)), self.outputs, self.path)


def feeds(batch: Batch, inputs: Sequence[Input], name: str) -> dict[str, torch.Tensor]:
    """A batch as a graph takes it: by name, or in order where a module calls its inputs otherwise.

    :raises CalibrationError: when it does not fit.
    """
    names = [i.name for i in inputs]
    if isinstance(batch, Mapping) and len(batch) == len(names) and not set(names) & set(batch):
        batch = tuple(batch.values())
    given = as_mapping(batch, inputs, name)
    return {i.name: as_input(name, i, given[i.name]) for i in inputs if i.name in given}


def check(path: Path) -> None:
    """Whether it is valid ONNX whose types and shapes fit, by path: external data are not loaded.

    :raises ExecutionError: with onnx's reason.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as exc:  # its own kinds, and those of protobuf
        raise ExecutionError(f"{path}: onnx.checker: {_line(exc)}") from exc


def with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """A file with other outputs; external data stay where they are."""
    proto = onnx.load(str(path), load_external_data=False)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    serialized: bytes = proto.SerializeToString()
    return serialized


def structure_of(path: Path) -> OnnxGraph:
    """The graph of a file with every node that it has, without weights."""
    structure = read_structure(path)
    try:
        return parse(structure, path)
    finally:
        structure.close()


def open_session(model: str | bytes, path: Path, *, optimized: bool) -> Any:
    """A session on the processor.

    :param path: for messages, and for the folder of external data.
    :raises ExecutionError: when onnxruntime is not installed, or does not load it.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise ExecutionError("onnxruntime is not installed", hint="pip install onnxruntime") from exc
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if isinstance(model, bytes):
        folder = str(path.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises its own kinds
        raise ExecutionError(f"{path}: onnxruntime does not load it: {_line(exc)}") from exc


def run_session(
    session: Any, given: Mapping[str, torch.Tensor], names: Sequence[str], path: Path
) -> dict[str, torch.Tensor]:
    """Values of a run, by name.

    :raises ExecutionError: when onnxruntime fails.
    """
    try:
        found = session.run(list(names), {name: tensor.numpy() for name, tensor in given.items()})
    except Exception as exc:  # onnxruntime raises its own kinds
        raise ExecutionError(f"{path}: onnxruntime: {_line(exc)}") from exc
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def diverging(path: Path, batch: Batch, bound: float) -> str:
    """The first value, in the order of the graph, that optimizations change by more than a bound, and its node.

    Found by halving: each value becomes an output beside the others. That keeps onnxruntime from joining its node with
    those behind it, and leaves everything before as it is.

    :param bound: ``norm(with - without) / norm(without)``.
    :return: "" when there is none.
    """
    graph = structure_of(path)
    graph.infer_shapes()
    given = feeds(batch, graph_inputs(graph), str(path))
    candidates = [value for node in graph.model.graph for value in node.outputs if _is_activation(graph, value)]

    def differs(value: ir.Value) -> bool:
        model = with_outputs(path, [value.name or ""])
        fast, exact = (
            run_session(open_session(model, path, optimized=optimized), given, [value.name or ""], path)
            for optimized in (True, False)
        )
        (a,), (b,) = fast.values(), exact.values()
        return a.is_floating_point() and distance(a, b) > bound

    first, last = 0, len(candidates)
    while first < last:
        middle = (first + last) // 2
        if differs(candidates[middle]):
            last = middle
        else:
            first = middle + 1
    return described(candidates[first]) if first < len(candidates) else ""


def _is_activation(graph: OnnxGraph, value: ir.Value) -> bool:
    """Whether a value is made of inputs, and of floats as far as is known."""
    floats = value.dtype is None or value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return floats and bool(value.name) and _depends_on_inputs(value, set())


def _depends_on_inputs(value: ir.Value, seen: set[ir.Value]) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.is_graph_input():
            return True
        if (node := one.producer()) is not None:
            waiting += [i for i in node.inputs if i is not None]
    return False


def described(value: ir.Value) -> str:
    """A value, and the node that computes it."""
    node = value.producer()
    while node is not None and node.op_type in _ROUNDING:
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is None:
            break
        node = before
    assert node is not None
    return f"{shown(value.name or '')}, of node {shown(node.name or '')} ({node.op_type})"


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]

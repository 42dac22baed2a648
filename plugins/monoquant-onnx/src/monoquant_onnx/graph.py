"""ONNX graphs: an ``onnx_ir`` model whose large initializers hold no data, with the data beside it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from monoquant_onnx import types
from monoquant_onnx.data import Data, InlineData, MemoryData, whole

if TYPE_CHECKING:
    import torch

    from monoquant_core.runners import Input
    from monoquant_onnx.runner import OnnxRunner

STRUCTURE = 1024  #: bytes up to which integers are part of the graph, and no tensors of the model


class OnnxGraph:
    """A graph, the data of its initializers, and the names that the model knows them by."""

    def __init__(self, model: ir.Model, data: Mapping[str, Data], name: str) -> None:
        self.model = model
        self.name = name  #: for messages
        self.data: dict[str, Data] = dict(data)  #: initializer -> its values
        self.names: dict[str, str] = {}  #: name of a spec -> initializer
        self.folded: dict[str, tuple[torch.Tensor, int]] = {}
        """Spec -> what folding a BatchNorm multiplied its output channels by (float64), and their axis."""
        self.ranges: dict[str, tuple[float, float]] = {}
        """Value -> the range that a finished file quantized it with; its Q/DQ pair is no longer in the graph."""
        self.notes: list[str] = []

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return self.model.opset_imports.get("", 0)

    @property
    def inputs(self) -> list[Input]:
        """What a batch consists of."""
        from monoquant_onnx.runner import graph_inputs

        return graph_inputs(self)

    def runner(self, points: Collection[str] | None = None, device: str = "") -> OnnxRunner:
        """Runs batches in onnxruntime and reports the values of points.

        :param points: ``"<module>:input"``, ``"<tensor>:input"``, ``"<module>:output"`` or names of values; None is
            the input and the output of every weight.
        :raises MonoquantError: for a point that the graph does not have.
        """
        from monoquant_onnx.runner import OnnxRunner

        return OnnxRunner(self, points, device)

    def uses(self, initializer: str) -> list[tuple[ir.Node, int]]:
        """Nodes that take an initializer, with the index of the input."""
        return [(use.node, use.idx) for use in self.model.graph.initializers[initializer].uses()]

    def constant(self, value: ir.Value | None) -> Data | None:
        """The values of an initializer, of structure too; None for anything that is made when the graph runs."""
        if value is None or value.name is None or value.name not in self.model.graph.initializers:
            return None
        if value.name in self.data:
            return self.data[value.name]
        tensor = value.const_value
        return _small(tensor) if tensor is not None else None

    def bind(self, name: str, data: Data) -> None:
        """Make data the values of the initializer of a name, which may be new."""
        graph = self.model.graph
        dtype = ir.DataType(types.NUMBER[data.dtype])
        tensor = lazy(name, dtype, data)
        if name in graph.initializers:
            value = graph.initializers[name]
            value.const_value, value.shape, value.type = tensor, ir.Shape(data.shape), ir.TensorType(dtype)
        else:
            value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(dtype), const_value=tensor)
            graph.register_initializer(value)
        self.data[name] = data

    def drop(self, name: str) -> None:
        """Take an initializer that nothing uses out of the graph."""
        self.model.graph.initializers.pop(name, None)
        self.data.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Give an initializer another name."""
        self.model.graph.initializers[old].name = new
        if old in self.data:
            self.data[new] = self.data.pop(old)

    def free_name(self, wanted: str) -> str:
        """A name that no value of the graph has yet."""
        taken = {value.name for value in values(self.model.graph)}
        name, i = wanted, 0
        while name in taken:
            i += 1
            name = f"{wanted}_{i}"
        return name

    def tidy(self) -> list[str]:
        """Take out what no output needs.

        :return: names of the initializers that went.
        """
        before = set(self.model.graph.initializers)
        passes.RemoveUnusedNodesPass()(self.model)
        gone = [name for name in before if name not in self.model.graph.initializers]
        for name in gone:
            self.data.pop(name, None)
        return sorted(gone)

    def infer_shapes(self) -> None:
        """Fill in types and shapes of values that have none, as far as onnx knows them."""
        unknown = [v for node in self.model.graph for v in node.outputs if v.shape is None or v.type is None]
        if not unknown:
            return
        model = self.model.clone()
        for name in self.data:  # weights as inputs: their values are not needed
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        try:
            inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
        except Exception:  # noqa: BLE001 - it gives up on operators of others in several ways, and the graph runs without
            return
        found = {v.name: v for node in ir.from_proto(inferred).graph for v in node.outputs}
        for value in unknown:
            if (known := found.get(value.name)) is not None:
                value.shape = value.shape if value.shape is not None else known.shape
                value.type = value.type if value.type is not None else known.type


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph, those of subgraphs included."""
    for inner in graph.all_nodes():
        yield from inner.outputs
    yield from graph.initializers.values()
    yield from graph.inputs


def lazy(name: str, dtype: ir.DataType, data: Data) -> ir.LazyTensor:
    """A tensor that reads its data whenever it is asked."""

    def read() -> ir.TensorProtocol:
        return array_tensor(whole(data), dtype, name)

    return ir.LazyTensor(read, dtype, ir.Shape(data.shape), name=name)


def array_tensor(tensor: torch.Tensor, dtype: ir.DataType, name: str | None = None) -> ir.TensorProtocol:
    """A torch tensor as one of onnx_ir; integers of less than a byte are codes in int8 or uint8."""
    import torch

    if tensor.dtype == torch.bfloat16 or str(tensor.dtype).startswith("torch.float8"):
        carrier = torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8
        return ir.Tensor(tensor.view(carrier).numpy().view(dtype.numpy()), dtype, name=name)
    array = tensor.numpy()
    return ir.Tensor(array.astype(dtype.numpy()) if array.dtype != dtype.numpy() else array, dtype, name=name)


def is_structure(shape: tuple[int, ...], dtype: str, nbytes: int) -> bool:
    """Whether an initializer is a constant of the graph rather than a tensor of the model."""
    floats = dtype.startswith(("float", "bfloat"))
    return math.prod(shape) <= 1 or (not floats and nbytes <= STRUCTURE)


def in_memory(initializers: Iterable[ir.Value]) -> dict[str, Data]:
    """What initializers hold that are in memory, large or small; structure is left out."""
    found: dict[str, Data] = {}
    for value in initializers:
        tensor = value.const_value
        if value.name is None or tensor is None or int(tensor.dtype) not in types.TORCH:
            continue
        shape = tuple(tensor.shape.numpy())
        data = _inline(tensor)
        if data is not None and not is_structure(shape, types.TORCH[int(tensor.dtype)], tensor.nbytes):
            found[value.name] = data
    return found


def _small(tensor: ir.TensorProtocol) -> Data | None:
    """A tensor that is in the structure of a file, or in memory; None for strings."""
    if type(tensor).__module__.startswith("torch"):
        return _inline(tensor)
    return InlineData(tensor) if int(tensor.dtype) in (*types.TORCH, *types.PACKED) else None


def _inline(tensor: ir.TensorProtocol) -> Data | None:
    """A tensor that is in memory; None for strings. Integers of less than a byte become codes."""
    import torch

    kind = int(tensor.dtype)
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return MemoryData(raw.detach())
    if kind not in types.TORCH and kind not in types.PACKED:
        return None
    data = InlineData(tensor)
    return MemoryData(whole(data), data.dtype if kind in types.PACKED else "")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep libraries from talking to the terminal."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)

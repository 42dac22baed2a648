"""From the structure of a file to its graph: what nobody vouches for is checked before anything is built on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from monoquant_core.containers.entries import shown, tensor_at
from monoquant_core.errors import SourceError
from monoquant_onnx import types
from monoquant_onnx.data import Data, FileData, InlineData
from monoquant_onnx.graph import OnnxGraph, is_structure, lazy
from monoquant_onnx.wire import MARK, Structure


def parse(structure: Structure, path: Path) -> OnnxGraph:
    """The graph of a file whose structure has been read.

    :raises SourceError: naming the file, and the node or tensor that is wrong.
    """
    try:
        proto = onnx.ModelProto.FromString(structure.model)
    except Exception as exc:  # protobuf's own error class differs between its implementations
        raise SourceError(f"{path}: not an ONNX model: {_line(exc)}") from exc
    if not proto.HasField("graph") or not proto.opset_import:
        raise SourceError(f"{path}: not an ONNX model: it has no {'opset' if proto.HasField('graph') else 'graph'}")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not 0 <= opset <= 1000 or not 0 < proto.ir_version <= 1000:
        raise SourceError(f"{path}: not an ONNX model: opset {opset}, IR version {proto.ir_version}")
    check_graph(path, proto.graph, set())
    try:
        model = ir.from_proto(proto)
    except Exception as exc:  # whatever is malformed beyond what was checked
        raise SourceError(f"{path}: not an ONNX model: {_line(exc)}") from exc
    return _bound(model, structure, path)


def check_graph(path: Path, graph: onnx.GraphProto, outer: set[str]) -> None:
    """Refuse graphs that define a value twice, or use one before it is there: cyclic ones, too.

    :param outer: values that the graphs around it define.
    :raises SourceError: naming the file, and the node or tensor.
    """
    own: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise SourceError(f"{path}: an initializer without a name")
        if tensor.name in own:
            raise SourceError(f"{tensor_at(path, tensor.name)}: occurs twice")
        _check_numbers(path, tensor)
        own.add(tensor.name)
    inputs = [value.name for value in graph.input]
    if len(set(inputs)) != len(inputs):
        twice = next(name for name in inputs if inputs.count(name) > 1)
        raise SourceError(f"{path}: input {shown(twice)} occurs twice")
    own.update(inputs)
    known = outer | own
    for node in graph.node:
        _check_node(path, node, known)
        for name in filter(None, node.output):
            if name in own:
                raise SourceError(f"{path}: node {_named(node)}: makes {shown(name)}, which is there already")
            own.add(name)
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise SourceError(f"{path}: output {shown(value.name)}: nothing makes it")


def _check_node(path: Path, node: onnx.NodeProto, known: set[str]) -> None:
    if missing := next((name for name in node.input if name and name not in known), None):
        raise SourceError(
            f"{path}: node {_named(node)}: takes {shown(missing)}, which nothing before it makes: "
            "the graph is cyclic or incomplete"
        )
    for attribute in node.attribute:
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            _check_numbers(path, tensor)
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            check_graph(path, inner, known)


def _check_numbers(path: Path, tensor: onnx.TensorProto) -> None:
    """Refuse a tensor that holds another number of numbers than its shape says, where they are not raw."""
    if tensor.HasField("raw_data") or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    shape = tuple(tensor.dims)
    count = types.stored_nbytes(tensor.data_type, shape) if tensor.data_type in types.PACKED else math.prod(shape)
    if types.TORCH.get(tensor.data_type, "").startswith("complex"):
        count *= 2
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if (found := sum(map(len, fields))) != count:
        raise SourceError(f"{tensor_at(path, tensor.name)}: {found} numbers; {list(shape)} has {count}")


def _named(node: onnx.NodeProto) -> str:
    return shown(node.name or node.op_type)


def _bound(model: ir.Model, structure: Structure, path: Path) -> OnnxGraph:
    """Put lazy tensors where the structure has only numbers of places."""
    placed: dict[int, FileData] = {}

    def replaced(tensor: Any) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        if tensor.location != MARK or not 0 <= (tensor.offset or 0) < len(structure.places):
            raise SourceError(f"{tensor_at(path, tensor.name)}: external data that its description does not give")
        place = structure.places[tensor.offset or 0]
        data = FileData(structure.readers[place.path], place)
        result = lazy(tensor.name, tensor.dtype, data)
        placed[id(result)] = data
        return result

    for inner in model.graphs():
        for value in inner.initializers.values():
            value.const_value = replaced(value.const_value) or value.const_value
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        _replace_attributes(node, replaced)
    for function in model.functions.values():
        for node in function:
            _replace_attributes(node, replaced)
    passes.LiftConstantsToInitializersPass(size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    also = [v.name for v in model.graph.inputs if v.name in model.graph.initializers]
    passes.RemoveInitializersFromInputsPass()(model)
    data: dict[str, Data] = {
        name: placed[id(value.const_value)]
        for name, value in model.graph.initializers.items()
        if id(value.const_value) in placed
    }
    for name, value in model.graph.initializers.items():
        if name not in data and value.const_value is not None and int(value.const_value.dtype) in types.TORCH:
            small = InlineData(value.const_value)
            if not is_structure(small.shape, small.dtype, value.const_value.nbytes):
                data[name] = small
    graph = OnnxGraph(model, data, str(path))
    graph.notes = list(structure.notes)
    if also:
        graph.notes.append(f"{path}: {len(also)} weights were inputs with a default; they are constants here")
    return graph


def _replace_attributes(node: ir.Node, replaced: Callable[[Any], ir.TensorProtocol | None]) -> None:
    for key, attribute in list(node.attributes.items()):
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
            if (tensor := replaced(attribute.value)) is not None:
                node.attributes[key] = ir.AttrTensor(key, tensor)
        elif isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSORS:
            node.attributes[key] = ir.AttrTensors(key, [replaced(t) or t for t in attribute.value])


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__

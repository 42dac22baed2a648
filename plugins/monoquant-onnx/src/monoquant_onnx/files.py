"""The file as the core writes it: protobuf around the data of large initializers, or beside them above 2 GB.

Protobuf's fields may come in any order, so everything but those initializers comes first; each of them is a field of
its own after that, with its data as its last field. The layout follows from sizes alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from monoquant_core.errors import PlanError
from monoquant_core.exporters import BytesAt, FilePlan, PartAt
from monoquant_onnx.editing import Streamed
from monoquant_onnx.opsets import ir_version, without_data
from monoquant_onnx.rewrite import Rewritten
from monoquant_onnx.wire import varint

#: bytes of a protobuf; its size is an int32
LIMIT = (1 << 31) - (1 << 20)
PAGE, LINE = 4096, 64  #: where large and small tensors start in the data file, so that it can be mapped

#: fields of ModelProto, GraphProto and TensorProto (onnx.proto)
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def file_plans(rewritten: Rewritten, destination: str, plan_hash: str, *, limit: int = LIMIT) -> list[FilePlan]:
    """One .onnx file, or one and its data file.

    :param destination: name of the .onnx file.
    """
    proto = checked(rewritten)
    streamed = list(rewritten.streamed.values())
    one = _one_file(proto, streamed)
    companions = f"{_literal(destination)}.{'[0-9a-f]' * 16}.data"
    if one.nbytes <= limit:
        return [FilePlan("", one.prefix, one.parts, between=one.between, companions=companions)]
    return _two_files(proto, streamed, destination, plan_hash, companions)


def checked(rewritten: Rewritten) -> onnx.ModelProto:
    """The model without the large initializers, valid as far as onnx can tell without their data.

    :raises PlanError: for a graph that onnx refuses, unless it refuses the source's as well: a bug of ours.
    """
    model = rewritten.model
    model.ir_version = max(model.ir_version, ir_version(model.opset_imports.get("", 0)))
    whole, _ = without_data(model, set(rewritten.streamed))
    if (reason := _invalid(whole)) and not _invalid(without_data(rewritten.source, rewritten.data)[0]):
        raise PlanError(f"the rewritten graph is not valid ONNX: {reason}")
    names = set(rewritten.streamed)
    kept = [value for value in whole.graph.input if value.name not in names]
    del whole.graph.input[:]
    whole.graph.input.extend(kept)
    return whole


def _invalid(model: onnx.ModelProto) -> str:
    """What onnx has against a model; "" if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        return " ".join(str(exc).split())[:300]
    return ""


@dataclass(frozen=True, slots=True)
class _One:
    prefix: bytes
    parts: tuple[PartAt, ...]
    between: tuple[BytesAt, ...]
    nbytes: int


def _one_file(proto: onnx.ModelProto, streamed: Sequence[Streamed]) -> _One:
    graph = proto.graph.SerializeToString(deterministic=True)
    around = onnx.ModelProto()
    around.CopyFrom(proto)
    around.ClearField("graph")
    headers = [_header(tensor) for tensor in streamed]
    length = len(graph) + sum(len(h) + t.nbytes for h, t in zip(headers, streamed, strict=True))
    prefix = around.SerializeToString(deterministic=True) + _field(_GRAPH, length) + graph
    parts, between, at = [], [], len(prefix)
    for header, tensor in zip(headers, streamed, strict=True):
        between.append(BytesAt(at, header))
        at += len(header)
        parts.append(PartAt(tensor.output, tensor.part, at, tensor.nbytes))
        at += tensor.nbytes
    return _One(prefix, tuple(parts), tuple(between), at)


def _two_files(
    proto: onnx.ModelProto, streamed: Sequence[Streamed], destination: str, plan_hash: str, companions: str
) -> list[FilePlan]:
    # All of them: the .onnx file is the same for every run of a plan then, and fits whichever data have the name.
    large = [tensor for tensor in streamed if tensor.nbytes]
    empty = [tensor for tensor in streamed if not tensor.nbytes]
    places, end = [], 0
    for tensor in large:
        unit = PAGE if tensor.nbytes >= PAGE else LINE
        places.append(-(-end // unit) * unit)
        end = places[-1] + tensor.nbytes

    def graph(location: str) -> onnx.ModelProto:
        found = onnx.ModelProto()
        found.CopyFrom(proto)
        for tensor, offset in zip(large, places, strict=True):
            entry = found.graph.initializer.add()
            entry.CopyFrom(_described(tensor))
            entry.data_location = onnx.TensorProto.EXTERNAL
            values = {"location": location, "offset": str(offset), "length": str(tensor.nbytes)}
            for key, value in values.items():
                entry.external_data.add(key=key, value=value)
        return found

    # The name tells the graph that fits it: data that are replaced under the same name belong to an equal graph.
    content = graph("").SerializeToString(deterministic=True) + plan_hash.encode()
    data = f"{destination}.{hashlib.sha256(content).hexdigest()[:16]}.data"
    one = _one_file(graph(data), empty)
    if one.nbytes > LIMIT:
        raise PlanError(f"{destination}: the graph alone takes {one.nbytes:,} bytes, more than protobuf holds")
    parts = tuple(PartAt(t.output, t.part, at, t.nbytes) for t, at in zip(large, places, strict=True))
    return [
        FilePlan("", one.prefix, one.parts, between=one.between, last=True, companions=companions),
        FilePlan(data, parts=parts),
    ]


def _described(tensor: Streamed) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=tensor.name, data_type=tensor.number)
    proto.dims.extend(tensor.shape)
    return proto


def _header(tensor: Streamed) -> bytes:
    """Everything of an initializer up to its data."""
    inner: bytes = _described(tensor).SerializeToString(deterministic=True) + _field(_RAW_DATA, tensor.nbytes)
    return _field(_INITIALIZER, len(inner) + tensor.nbytes) + inner


def _field(number: int, length: int) -> bytes:
    """Tag of a length-delimited field, and its length."""
    return varint(number << 3 | 2) + varint(length)


def _literal(name: str) -> str:
    """A pattern of fnmatch that only matches this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

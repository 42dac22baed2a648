"""Running a graph in onnxruntime with the values of chosen points as outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch

from monoquant_core.containers.entries import shown
from monoquant_core.errors import CalibrationError, DeviceError
from monoquant_core.runners import Batch, Input, Observe
from monoquant_onnx import types
from monoquant_onnx.data import raw_chunks, stored_bytes, whole
from monoquant_onnx.graph import STRUCTURE, array_tensor
from monoquant_onnx.layers import points_of

if TYPE_CHECKING:
    from typing import Self

    from monoquant_onnx.graph import OnnxGraph

_ALIGNMENT = 64


class OnnxRunner:
    """A session of onnxruntime over a copy of the graph in a private temporary folder.

    The weights are written there once, piece by piece, and mapped by onnxruntime. Layout optimizations are off, so
    that every reported value is the one that the graph names.

    :param optimized: False runs every node as it is.
    :raises CalibrationError: for a point that the graph does not have, or a graph that onnxruntime refuses.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        points: Collection[str] | None = None,
        device: str = "",
        *,
        optimized: bool = True,
    ) -> None:
        self.graph = graph
        self.inputs: Sequence[Input] = graph_inputs(graph)
        self.notes: list[str] = []
        known = points_of(graph)
        if points is None:
            wanted = known.default
        else:
            wanted = {point: found for point in points if (found := known.find(point)) is not None}
            if unknown := [point for point in points if point not in wanted]:
                raise CalibrationError(
                    f"{graph.name}: no point {shown(unknown[0])}",
                    hint="points are 'MODULE:input', 'MODULE:output' and the names of the graph's values",
                )
        self._observed = wanted
        self.points: Sequence[str] = tuple(wanted)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._session: Any = None
        self._providers, self._optimized = _providers(device), optimized
        self._outputs = [o.name or "" for o in graph.model.graph.outputs]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the session and of the copy."""
        self._session = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        """Run one batch and report the value of every point.

        :return: the graph's outputs, by name.
        :raises CalibrationError: when the batch does not fit the inputs, or onnxruntime fails.
        """
        feeds = self._feeds(batch)
        session = self._open()
        inside = {name for name, _ in self._observed.values()} - set(feeds)
        names = list(dict.fromkeys([*self._outputs, *(sorted(inside) if observe is not None else ())]))
        try:
            found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
        except Exception as exc:  # onnxruntime raises its own kinds
            raise CalibrationError(f"{self.graph.name}: onnxruntime: {_line(exc)}") from exc
        made = {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}
        if observe is not None:
            for point, (name, axis) in self._observed.items():
                observe(point, made[name] if name in made else feeds[name], axis)
        return {name: made[name] for name in self._outputs}

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime

            self._folder = tempfile.TemporaryDirectory(prefix="monoquant-")
            path = Path(self._folder.name) / "model.onnx"
            write_copy(self.graph, path, [name for name, _ in self._observed.values()])
            options = onnxruntime.SessionOptions()
            level = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_ENABLE_BASIC if self._optimized else level.ORT_DISABLE_ALL
            options.log_severity_level = 4
            try:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=self._providers)
            except Exception as exc:
                raise CalibrationError(f"{self.graph.name}: onnxruntime does not load it: {_line(exc)}") from exc
        return self._session

    def _feeds(self, batch: Batch) -> dict[str, torch.Tensor]:
        given = as_mapping(batch, self.inputs, self.graph.name)
        if extra := sorted(set(given) - {i.name for i in self.inputs}):
            note = f"{self.graph.name}: not used, the graph has no such inputs: {', '.join(extra)}"
            if note not in self.notes:
                self.notes.append(note)
        return {i.name: as_input(self.graph.name, i, given[i.name]) for i in self.inputs if i.name in given}


def graph_inputs(graph: OnnxGraph) -> list[Input]:
    """The inputs of a graph."""
    found = []
    for value in graph.model.graph.inputs:
        dtype = types.TORCH.get(int(value.dtype), "") if value.dtype is not None else ""
        shape = tuple(n if isinstance(n, int) else None for n in value.shape) if value.shape is not None else None
        found.append(Input(value.name or "", dtype, shape))
    return found


def as_mapping(batch: Batch, inputs: Sequence[Input], name: str) -> dict[str, torch.Tensor]:
    """A batch by input name.

    :raises CalibrationError: when it has too few or too many values, or something that is no tensor.
    """
    if isinstance(batch, Mapping):
        given = dict(batch)
    else:
        items = list(batch) if isinstance(batch, tuple | list) else [batch]
        if len(items) > len(inputs):
            raise CalibrationError(f"{name}: a batch of {len(items)} values for {len(inputs)} inputs")
        given = {i.name: value for i, value in zip(inputs, items, strict=False)}
    if missing := [i.name for i in inputs if i.required and i.name not in given]:
        raise CalibrationError(f"{name}: the batch has no {', '.join(missing)}; it has {', '.join(given) or 'nothing'}")
    return {key: torch.as_tensor(value) for key, value in given.items()}


def write_copy(graph: OnnxGraph, path: Path, extra_outputs: Sequence[str] = ()) -> None:
    """Write a graph as it is, its weights beside it in ``weights.bin``, with more of its values as outputs.

    Small ones are in the file: onnxruntime infers shapes from some, such as the factors of a Resize, and reads no
    external data for that.
    """
    model = graph.model.clone()
    with (path.parent / "weights.bin").open("wb") as file:
        for name, data in graph.data.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None
            if stored_bytes(data) <= STRUCTURE:
                value.const_value = array_tensor(whole(data), value.dtype, name)
                continue
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            for piece in raw_chunks(data):
                file.write(piece)
            value.const_value = ir.ExternalTensor(
                "weights.bin", offset, file.tell() - offset, value.dtype, shape=ir.Shape(data.shape), name=name
            )
    named = {v.name: v for node in model.graph for v in node.outputs}
    present = {v.name for v in model.graph.outputs}
    for name in dict.fromkeys(extra_outputs):
        if name in named and name not in present:
            model.graph.outputs.append(named[name])
    onnx.save_model(ir.to_proto(model), str(path))


def as_input(model: str, wanted: Input, value: torch.Tensor) -> torch.Tensor:
    """A value in the dtype that an input takes.

    :raises CalibrationError: when its dtype or its shape does not fit.
    """
    dtype = getattr(torch, wanted.dtype, None)
    tensor = value.detach().cpu()
    if dtype is not None and tensor.dtype != dtype:
        if tensor.is_floating_point() != dtype.is_floating_point or dtype == torch.bool:
            raise CalibrationError(f"{model}: input {wanted.name} takes {wanted.dtype}, the batch has {tensor.dtype}")
        tensor = tensor.to(dtype)
    if wanted.shape is not None:
        fits = len(wanted.shape) == tensor.ndim and all(
            n is None or n == m for n, m in zip(wanted.shape, tensor.shape, strict=True)
        )
        if not fits:
            shape = ", ".join("any" if n is None else str(n) for n in wanted.shape)
            raise CalibrationError(f"{model}: input {wanted.name} is [{shape}], the batch has {list(tensor.shape)}")
    return tensor.contiguous()


def _providers(device: str) -> list[str]:
    if device in ("", "cpu"):
        return ["CPUExecutionProvider"]
    import onnxruntime

    wanted = f"{device.partition(':')[0].upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise DeviceError(f"this onnxruntime does not run on {device}", hint="--device cpu, or install onnxruntime-gpu")
    return [wanted, "CPUExecutionProvider"]


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]

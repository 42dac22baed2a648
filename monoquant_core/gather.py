"""Rows of an output from the rows of its inputs: joined, permuted, transformed. And whole tensors from chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from monoquant_core.encoding import Encoding, Param, param_shape
from monoquant_core.errors import EncodingError, PlanError, SourceError
from monoquant_core.exporters import Output
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planning import Step
from monoquant_core.reencode import lift
from monoquant_core.rows import RowMap, all_rows, chunk_shape, row_count, row_length
from monoquant_core.scratch import Scratch
from monoquant_core.tasks import pieces
from monoquant_core.tensor import ParamValue, QuantizedTensor, dtype_of, same_bits

Rows = QuantizedTensor | torch.Tensor


class Reading(Protocol):
    """The part of a source that is needed here."""

    info: ModelInfo

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> Rows:
        """As :meth:`Source.read`."""
        ...


class ReadOnce:
    """What a task reads for several outputs: the rows of each tensor come from the source once.

    :param pieces: how many different reads there will be. A single one stays in the worker's buffer, where the source
        put it; several are copied, because each would overwrite the last.
    """

    def __init__(self, source: Reading, pieces: int) -> None:
        self.info = source.info
        self._source, self._pieces = source, pieces
        self._known: dict[tuple[str, range], Rows] = {}

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> Rows:
        """As :meth:`Source.read`."""
        key = name, rows
        if key not in self._known:
            value = self._source.read(name, rows, scratch)
            self._known[key] = value.clone() if self._pieces > 1 else value
        return self._known[key]


def read_rows(step: Step, source: Reading, rows: range, scratch: Scratch) -> Rows:
    """Rows of a step's output as its action wants them: codes where they are kept, else floats.

    The result may live in the scratch buffers until the next call. It is not to be written to.

    :raises SourceError: when the source cannot be read, or does not give what it announced.
    """
    out = step.placed.output
    shape = chunk_shape(out.shape, rows)
    transform = out.transform
    if transform is not None and (transform.per == "tensor" or not step.specs):
        inputs: list[torch.Tensor] = []
        for spec in step.specs:
            whole = _floats(_read(source, spec, all_rows(spec.shape), scratch))
            inputs.append(whole.clone() if len(step.specs) > 1 else whole)  # the next read may use the same buffer
        if out.rows is not None and inputs:
            inputs = [_permute(inputs[0], out.rows.order, scratch)]
        return _shaped(transform.apply(inputs), shape, out)
    value = _joined(step, source, rows, shape, scratch)
    if step.action != "keep" or transform is not None:
        value = _floats(value)
    if out.rows is not None:
        if isinstance(value, QuantizedTensor):
            value = _permute_quantized(value, torch.tensor(out.rows.order))
        else:
            value = _permute(value, out.rows.order, scratch)
    return value if transform is None else _shaped(transform.apply([_floats(value)]), shape, out)


def join(chunks: Sequence[Rows], shape: tuple[int, ...]) -> Rows:
    """One tensor from all its chunks, in order.

    :raises EncodingError: when quantized chunks do not make one tensor, such as two scales where it has one.
    """
    if len(chunks) == 1 and tuple(chunks[0].shape) == shape:
        return chunks[0]
    first = chunks[0]
    if not isinstance(first, QuantizedTensor):
        return torch.cat([_floats(c).reshape(-1) for c in chunks]).view(shape)
    return _join_quantized([c for c in chunks if isinstance(c, QuantizedTensor)], first.encoding, shape)


def _read(source: Reading, spec: TensorSpec, rows: range, scratch: Scratch) -> Rows:
    value = source.read(spec.name, rows, scratch)
    wanted = chunk_shape(spec.shape, rows)
    if isinstance(value, QuantizedTensor) != (spec.encoding is not None) or value.shape != wanted:
        raise SourceError(
            f"{source.info.name}: {spec.name}: read {_describe(value)}, expected {wanted} of {spec.dtype}"
        )
    if isinstance(value, torch.Tensor) and value.dtype != dtype_of(spec.dtype):
        raise SourceError(f"{source.info.name}: {spec.name}: read {_describe(value)}, expected {spec.dtype}")
    return value


def _joined(step: Step, source: Reading, rows: range, shape: tuple[int, ...], scratch: Scratch) -> Rows:
    """The rows one after another, in the shape of the output's chunk."""
    found = pieces(step, rows)
    if len(found) == 1:
        spec, inner = found[0]
        return _reshaped(_read(source, spec, inner, scratch), spec, step, shape)
    if step.specs[0].encoding is not None and step.action == "keep":
        # Clones: the next read may use the buffers of the last one.
        chunks = [_keep_codes(_read(source, spec, inner, scratch)).clone() for spec, inner in found]
        encoding = lift(chunks[0].encoding, len(step.specs[0].shape), len(shape))
        return _join_quantized(chunks, encoding, shape)
    buffer: torch.Tensor | None = None
    filled = 0
    for spec, inner in found:
        values = _floats(_read(source, spec, inner, scratch))
        if buffer is None:
            buffer = scratch.take("engine.joined", (math.prod(shape),), values.dtype)
        if values.dtype != buffer.dtype:
            raise PlanError(f"{step.placed.output.name}: joins {buffer.dtype} and {values.dtype}")
        buffer[filled : filled + values.numel()].copy_(values.reshape(-1))
        filled += values.numel()
    assert buffer is not None
    return buffer.view(shape)


def _reshaped(value: Rows, spec: TensorSpec, step: Step, shape: tuple[int, ...]) -> Rows:
    if tuple(value.shape) == shape:
        return value
    if isinstance(value, torch.Tensor):
        return value.reshape(shape)
    if step.action != "keep":
        return value.dequantize().reshape(shape)
    return _join_quantized([value], lift(value.encoding, len(spec.shape), len(shape)), shape)


def _join_quantized(chunks: Sequence[QuantizedTensor], encoding: Encoding, shape: tuple[int, ...]) -> QuantizedTensor:
    codes = torch.cat([c.codes.reshape(-1) for c in chunks]).view(shape)
    grid = param_shape(shape, encoding.block)
    specs = dict(encoding.params())
    params = {label: _join_param(label, [c.params()[label] for c in chunks], specs[label], grid) for label in specs}
    return QuantizedTensor(encoding, codes, **params)


def _join_param(label: str, values: Sequence[ParamValue], spec: Param, grid: tuple[int, ...]) -> ParamValue:
    first, wanted = values[0], math.prod(grid)
    nested = [v for v in values if isinstance(v, QuantizedTensor)]
    if isinstance(first, QuantizedTensor) and isinstance(spec, Encoding):
        if math.prod(first.shape) == wanted and all(first.equal(v) for v in nested):
            return first
        flat = len(first.shape) != len(grid) and len(first.shape) == 1
        return _join_quantized(nested, spec, (wanted,) if flat else grid)
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if sum(t.numel() for t in tensors) == wanted:
        return torch.cat([t.reshape(-1) for t in tensors]).view(grid)
    # A parameter of the whole tensor comes with every chunk.
    if tensors[0].numel() == wanted and all(same_bits(tensors[0].reshape(-1), t.reshape(-1)) for t in tensors):
        return tensors[0].reshape(grid)
    raise EncodingError(f"{label}: the chunks of one tensor disagree on it")


def permuted(value: Rows, order: RowMap) -> Rows:
    """The rows in another order, those of parameters too."""
    index = torch.tensor(order.order)
    if isinstance(value, QuantizedTensor):
        return _permute_quantized(value, index)
    blocks = value.reshape(-1, len(order.order), row_length(tuple(value.shape)))
    return blocks.index_select(1, index).view(value.shape)


def reshaped(value: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """The same rows as a tensor of another rank: a matrix of a stack, or the stack of one matrix."""
    return _join_quantized([value], lift(value.encoding, len(value.shape), len(shape)), shape)


def _permute(values: torch.Tensor, order: tuple[int, ...], scratch: Scratch) -> torch.Tensor:
    shape = tuple(values.shape)
    blocks = values.reshape(row_count(shape) // len(order), len(order), row_length(shape))
    buffer = scratch.take("engine.permuted", blocks.shape, values.dtype)
    return torch.index_select(blocks, 1, torch.tensor(order), out=buffer).view(shape)


def _permute_quantized(tensor: QuantizedTensor, order: torch.Tensor) -> QuantizedTensor:
    """The same permutation of codes and of parameters that belong to one row; those of all rows stay."""
    rows = row_count(tensor.shape)

    def permuted(value: torch.Tensor) -> torch.Tensor:
        if row_count(tuple(value.shape)) != rows:
            return value
        blocks = value.reshape(rows // len(order), len(order), value.shape[-1])
        return blocks.index_select(1, order).view(value.shape)

    params = {
        label: _permute_quantized(value, order)
        if isinstance(value, QuantizedTensor) and row_count(value.shape) == rows
        else value
        if isinstance(value, QuantizedTensor)
        else permuted(value)
        for label, value in tensor.params().items()
    }
    return QuantizedTensor(tensor.encoding, permuted(tensor.codes), **params)


def _shaped(values: torch.Tensor, shape: tuple[int, ...], out: Output) -> torch.Tensor:
    if tuple(values.shape) != shape:
        raise PlanError(
            f"{out.name}: the format's transform made {tuple(values.shape)} of {shape}: a bug of the format"
        )
    return values


def _floats(value: Rows) -> torch.Tensor:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _keep_codes(value: Rows) -> QuantizedTensor:
    assert isinstance(value, QuantizedTensor)
    return value


def _describe(value: Rows) -> str:
    kind = value.encoding if isinstance(value, QuantizedTensor) else value.dtype
    return f"{tuple(value.shape)} of {kind}"

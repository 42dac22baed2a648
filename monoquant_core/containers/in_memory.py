"""Tensors that are already in memory: which of them can be read, which are one, and their rows. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monoquant_core import rows as r
from monoquant_core.containers.entries import check_name, tensor_at
from monoquant_core.containers.strided import first_index
from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS, TensorSpec
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import dtype_name

#: top-level keys under which training programs keep the weights, in order of preference
WRAPPERS = ("state_dict", "model_state_dict", "model")
_NAMED = 8  #: left-out entries that a note names


def find_state(source: str, saved: object) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights in what was saved: a dict of tensors, or one that holds it under one of ``WRAPPERS``.

    :param source: for messages.
    :return: the tensors, by name, and notes on what was left out.
    :raises SourceError: when there are no tensors in it.
    """
    if isinstance(saved, torch.Tensor):
        raise SourceError(f"{source}: a single tensor without a name", hint="save a dict: {'weight': tensor}")
    if not isinstance(saved, Mapping):
        raise SourceError(
            f"{source}: a dict of tensors expected, found {type(saved).__name__}", hint="save model.state_dict()"
        )
    state, notes = saved, []
    wrapper = next((key for key in WRAPPERS if isinstance(saved.get(key), Mapping) and _tensors(saved[key])), None)
    if wrapper is not None:
        state = saved[wrapper]
        notes.append(f"{source}: the weights are those under {wrapper!r}")
        notes += _left_out(source, {key: value for key, value in saved.items() if key != wrapper})
    tensors = _tensors(state)
    if not tensors:
        if "param_groups" in saved and "state" in saved:
            raise SourceError(f"{source}: holds the state of an optimizer and no weights")
        keys = ", ".join(repr(key) for key in list(saved)[:_NAMED])
        raise SourceError(
            f"{source}: holds no tensors" + (f", only {keys}" if keys else ""), hint="save model.state_dict()"
        )
    for name in tensors:
        check_name(source, name)
    notes += _left_out(source, {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)})
    return tensors, notes


def check_plain(source: str, name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors whose values are not simply theirs, by name.

    :raises SourceError: for sparse, quantized, meta and nested tensors, subclasses, and dtypes that files do not hold.
    """
    where = tensor_at(source, name)
    if torch.nn.parameter.is_lazy(tensor):
        raise SourceError(f"{where}: is not initialized", hint="run the model once, or load its weights")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise SourceError(
            f"{where}: is a tensor subclass, {kind}",
            hint="give plain tensors: full_tensor(), dequantize() or to_dense()",
        )
    if tensor.is_quantized:
        raise SourceError(
            f"{where}: is quantized by torch ({dtype_name(tensor.dtype)})",
            hint="give x.dequantize(), or the float model",
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise SourceError(f"{where}: is not a dense tensor ({layout})", hint="give x.to_dense()")
    if tensor.is_meta:
        raise SourceError(f"{where}: has no data, only a shape (meta device)", hint="load its weights first")
    if dtype_name(tensor.dtype) not in DTYPE_BITS:
        raise SourceError(f"{where}: dtype {dtype_name(tensor.dtype)} is not supported")


def describe(source: str, tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """Specs of tensors; those that are the same memory are tied to the first of them.

    :raises SourceError: for a tensor that cannot be read, see :func:`check_plain`.
    """
    first: dict[Any, str] = {}
    specs = []
    for name, tensor in tensors.items():
        check_name(source, name)
        check_plain(source, name, tensor)
        tied_to = first.setdefault(_memory(tensor), name) if tensor.numel() else name
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        specs.append(TensorSpec(name, shape, dtype, tied_to=tied_to if tied_to != name else None))
    return specs


def rows_of(tensor: torch.Tensor, rows: range, scratch: Scratch | None = None, slot: str = "source") -> torch.Tensor:
    """Rows of a tensor as one contiguous chunk of its rank on the CPU; a view of it where that is possible."""
    shape = tuple(tensor.shape)
    box = r.chunk_shape(shape, rows)
    index = tuple(slice(i, i + n) for i, n in zip(first_index(shape, rows), box, strict=True))
    chunk = tensor.detach()[index]
    if chunk.device.type == "cpu" and chunk.is_contiguous() and not chunk.is_conj() and not chunk.is_neg():
        return chunk
    out = torch.empty(box, dtype=chunk.dtype) if scratch is None else scratch.take(slot, box, chunk.dtype)
    return out.copy_(chunk)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    where = (str(tensor.device), storage.data_ptr(), tensor.storage_offset())
    return (*where, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())


def _tensors(saved: Mapping[Any, Any]) -> dict[Any, torch.Tensor]:
    return {key: value for key, value in saved.items() if isinstance(value, torch.Tensor)}


def _left_out(source: str, entries: Mapping[Any, Any]) -> list[str]:
    if not entries:
        return []
    kinds = [f"{key!r} ({_described(value)})" for key, value in list(entries.items())[:_NAMED]]
    more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return [f"{source}: left out beside the weights: {', '.join(kinds)}{more}"]


def _described(value: object) -> str:
    tensors = len(_tensors(value)) if isinstance(value, Mapping) else 0
    return type(value).__name__ + (f" with {tensors} tensor{'s' * (tensors > 1)}" if tensors else "")

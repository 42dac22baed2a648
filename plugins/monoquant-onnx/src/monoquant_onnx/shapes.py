"""Extents of a graph that vary: named, and tried with others than those of the example.

torch.export takes the number of steps of a recurrent layer for a constant and says nothing. Here every extent that the
module takes otherwise is tried; one that only the graph's declaration has frozen is freed, the others are told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir
import torch

from monoquant_core.errors import SourceError
from monoquant_onnx.graph import values
from monoquant_onnx.sameness import Reference

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

_SYMBOL = re.compile(r"[A-Za-z_]\w*")

Axes: TypeAlias = "list[tuple[int, int]]"  #: input and axis


def name_dims(graph: OnnxGraph, reference: Reference) -> None:
    """Call the extents of a graph that vary batch and sequence instead of s77; those that are numbers become numbers.

    Lengths share a name where the module takes no others: onnxruntime reuses memory for extents of one name.
    """
    names: dict[str, str] = {}
    firsts: dict[int, str] = {}  # length in the example -> the first name of one
    for symbol, axes in _symbols(graph).items():
        i, axis = axes[0]
        if axis == 0 and reference.batched:
            names[symbol] = "batch"
            continue
        size = reference.inputs[i].shape[axis]
        if size in firsts and not _runs(reference, with_extent(reference.inputs, axes, size + 1)):
            names[symbol] = firsts[size]
            continue
        number = len({n for n in names.values() if n.startswith("sequence")})
        names[symbol] = f"sequence_{number + 1}" if number else "sequence"
        firsts.setdefault(size, names[symbol])
    for value in values(graph.model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_named(dim, names) for dim in value.shape.dims])


def _symbols(graph: OnnxGraph) -> dict[str, Axes]:
    """Names of extents that vary -> the axes of the inputs that have them."""
    found: dict[str, Axes] = {}
    for i, value in enumerate(graph.model.graph.inputs):
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if not isinstance(dim, int) and _SYMBOL.fullmatch(_text(dim)):
                found.setdefault(_text(dim), []).append((i, axis))
    return found


def check_extents(graph: OnnxGraph, reference: Reference) -> list[str]:
    """Run the graph with the example, and with other extents than the example's.

    :return: what is fixed though the module takes it otherwise.
    :raises SourceError: when the graph computes something else than the module, or only for other extents.
    """
    reference.check(graph, [reference.inputs, *_other_extents(graph, reference)])
    notes: list[str] = []
    for axes in _frozen(graph, reference):
        i, axis = axes[0]
        size = reference.inputs[i].shape[axis]
        others = [with_extent(reference.inputs, axes, n) for n in (size + 1, max(2, size - 1))]
        if not _runs(reference, others[0]):
            continue  # the module has that extent in its weights
        if _free(graph, reference, axes, [o for o in others if _runs(reference, o)]):
            continue
        named = ", ".join(f"axis {a} of {graph.model.graph.inputs[n].name!r}" for n, a in axes)
        notes.append(
            f"{graph.name}: {named} is fixed at {size}: the module takes other extents there, and the exporter made a "
            "constant of it; inputs of other sizes are refused"
        )
    return notes + _sizes_of_images(graph, reference)


def _sizes_of_images(graph: OnnxGraph, reference: Reference) -> list[str]:
    """Sizes that are those of the example, where the module would take others."""
    notes = []
    for i, (value, tensor) in enumerate(zip(graph.model.graph.inputs, reference.inputs, strict=True)):
        if tensor.ndim < 4:
            continue
        larger = list(reference.inputs)
        for axis in range(2, tensor.ndim):
            larger = with_extent(larger, [(i, axis)], 2 * tensor.shape[axis])
        if _runs(reference, larger):
            size = "x".join(str(n) for n in tensor.shape[2:])
            notes.append(f"{graph.name}: {value.name!r} is fixed at {size}, the size of the example")
    return notes


def with_extent(inputs: Sequence[torch.Tensor], axes: Sequence[tuple[int, int]], size: int) -> list[torch.Tensor]:
    """The inputs with another extent along some axes: repeated, or cut."""
    result = list(inputs)
    for i, axis in axes:
        repeats = -(-size // result[i].shape[axis])
        result[i] = torch.cat([result[i]] * repeats, axis).narrow(axis, 0, size)
    return result


def _other_extents(graph: OnnxGraph, reference: Reference) -> list[list[torch.Tensor]]:
    """Inputs that the module takes, with another number of samples, and with other lengths: equal ones stay equal."""
    together: dict[tuple[bool, int], Axes] = {}
    for axes in _symbols(graph).values():
        i, axis = axes[0]
        is_batch = axis == 0 and reference.batched
        together.setdefault((is_batch, reference.inputs[i].shape[axis]), []).extend(axes)
    found = []
    for (_, size), axes in together.items():
        changed = with_extent(reference.inputs, axes, size + 1)
        if _runs(reference, changed):
            found.append(changed)
    return found


def _frozen(graph: OnnxGraph, reference: Reference) -> list[Axes]:
    """Fixed axes of the inputs, those together that vary together: the batch, and sequences of one length."""
    batch: Axes = []
    by_size: dict[int, Axes] = {}
    for i, (value, tensor) in enumerate(zip(graph.model.graph.inputs, reference.inputs, strict=True)):
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if not isinstance(dim, int):
                continue
            if axis == 0 and reference.batched:
                batch.append((i, axis))
            elif axis in reference.free_axes(tensor):
                by_size.setdefault(dim, []).append((i, axis))
    return [group for group in (batch, *by_size.values()) if group]


def _free(
    graph: OnnxGraph, reference: Reference, axes: Sequence[tuple[int, int]], others: Sequence[list[torch.Tensor]]
) -> bool:
    """Declare axes free if the graph then computes what the module does for other extents; else leave it as it was."""
    main = graph.model.graph
    before = {id(v): v.shape for v in values(main)}
    outputs = [v for node in main.all_nodes() for v in node.outputs]
    name = "batch" if axes[0][1] == 0 and reference.batched else "sequence"
    taken = {_text(d) for v in main.inputs for d in (v.shape.dims if v.shape is not None else ())}
    while name in taken:
        name += "_2"
    for i, axis in axes:
        shape = main.inputs[i].shape
        assert shape is not None
        dims = list(shape.dims)
        dims[axis] = ir.SymbolicDim(name)
        main.inputs[i].shape = ir.Shape(dims)
    for value in outputs:
        value.shape = None
    try:
        graph.infer_shapes()
        reference.check(graph, [reference.inputs, *others])
    except SourceError:
        for value in values(main):
            value.shape = before[id(value)]
        return False
    return True


def _runs(reference: Reference, inputs: Sequence[torch.Tensor]) -> bool:
    try:
        reference.run(inputs)
    except SourceError:
        return False
    return True


def _text(dim: object) -> str:
    return dim.value or "" if isinstance(dim, ir.SymbolicDim) else str(dim)


def _named(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    text = _text(dim)
    if isinstance(dim, int) or text.isdigit():
        return int(text)
    return ir.SymbolicDim(_SYMBOL.sub(lambda found: names.get(found[0], found[0]), text) or None)

"""Which initializer of an exported graph is which tensor of the model.

The exporter folds transposes, BatchNorms and gate orders into new initializers and calls them ``val_7``. It notes where
each came from; that is taken as a hint, and the values decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
import torch

from monoquant_core.model import Source
from monoquant_onnx.data import MemoryData
from monoquant_onnx.layers import attribute, uses_through

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_FX_NODE = "pkg.torch.onnx.fx_node"
_QUOTED = re.compile(r"'([^']+)'")
_PARAMETER = re.compile(r"%((?:p|b|c)_\w+)")
_SCALED = 1e-5  #: largest difference from a multiple, relative to the largest element of the channel

Relation = Literal["same", "transposed", "scaled", ""]


@dataclass
class Named:
    """What became of the model's tensors."""

    tied: dict[str, str] = field(default_factory=dict)  #: name -> first name of the same tensor
    notes: list[str] = field(default_factory=list)


def name_tensors(graph: OnnxGraph, program: torch.export.ExportedProgram, source: Source) -> Named:
    """Give initializers the names that the source has for their tensors, where their values are those tensors.

    Copies of one tensor become one again, with a Transpose where the graph wants it so. Weights that are in memory
    already are not kept a second time.
    """
    state = {n: t.detach() for n, t in {**program.state_dict, **program.constants}.items() if _is_plain(t)}
    first = _firsts(state)
    spell = _Spelling(source)
    named = Named(tied={spell(n): spell(f) for n, f in first.items() if n != f})
    arguments = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    found = {name: _match(graph, name, state, arguments) for name in list(graph.data)}
    taken: dict[str, tuple[str, Relation]] = {}  # first name of a tensor -> its initializer, and how it is that tensor
    order = {"same": 0, "transposed": 1, "scaled": 2, "": 3}
    for initializer, (fqn, relation) in sorted(found.items(), key=lambda item: order[item[1][1]]):
        if not relation:
            continue
        original = first[fqn]
        if original in taken:
            kept, how = taken[original]
            _retie(graph, kept, initializer, relation == how)
            continue
        if relation != "scaled":
            tensor = state[original]
            graph.bind(initializer, MemoryData(tensor.T if relation == "transposed" else tensor))
        name = spell(original)
        if relation == "scaled":
            graph.folded[name] = _factor(graph, initializer, state[fqn])
        graph.names[name] = _renamed(graph, initializer, name)
        taken[original] = graph.names[name], relation
    _rename_biases(graph, found)
    named.notes = _notes(graph, found, first, taken, state, source, spell)
    return named


class _Spelling:
    """Names of the source for names of the module that was made of it: with or without the prefix of a submodule."""

    def __init__(self, source: Source) -> None:
        self._names = {spec.name for spec in source.specs()}
        self._prefixes = sorted({n.partition(".")[0] + "." for n in self._names})

    def __call__(self, name: str) -> str:
        if name in self._names:
            return name
        prefixed = [p + name for p in self._prefixes if p + name in self._names]
        if len(prefixed) == 1:
            return prefixed[0]
        shorter = name.partition(".")[2]
        return shorter if shorter in self._names else name


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and value.layout == torch.strided


def _firsts(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> the first name of the same memory."""
    seen: dict[tuple[object, ...], str] = {}
    result = {}
    for name, t in state.items():
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,)
        result[name] = seen.setdefault(key, name)
    return result


def _match(
    graph: OnnxGraph, initializer: str, state: Mapping[str, torch.Tensor], arguments: Mapping[str, str]
) -> tuple[str, Relation]:
    """The tensor that an initializer is, and how; what the exporter says is tried before every tensor of the size."""
    data = graph.data[initializer]
    if not isinstance(data, MemoryData):
        return "", ""
    value = graph.model.graph.initializers[initializer]
    said = [initializer, *_QUOTED.findall(value.metadata_props.get(_FOLDED, ""))]
    for node, _ in graph.uses(initializer):
        said += [arguments.get(a, "") for a in _PARAMETER.findall(node.metadata_props.get(_FX_NODE, ""))]
    hinted = [name for name in dict.fromkeys(said) if name in state]
    for name in hinted:
        if relation := _relation(data.tensor, state[name]):
            return name, relation
    for name in hinted:
        if _factor_axis(graph, initializer) is not None and _is_multiple(graph, initializer, state[name]):
            return name, "scaled"
    if data.tensor.ndim < 2:
        return "", ""
    for name, tensor in state.items():
        if tensor.numel() == data.tensor.numel() and (relation := _relation(data.tensor, tensor)):
            return name, relation
    return "", ""


def _relation(found: torch.Tensor, tensor: torch.Tensor) -> Relation:
    if found.dtype != tensor.dtype:
        return ""
    if found.shape == tensor.shape and torch.equal(found, tensor):
        return "same"
    if found.ndim == tensor.ndim == 2 and found.shape == tensor.T.shape and torch.equal(found, tensor.T):
        return "transposed"
    return ""


def _factor_axis(graph: OnnxGraph, initializer: str) -> int | None:
    for node, index in graph.uses(initializer):
        if index == 1 and node.op_type == "Conv":
            return 0
        if index == 1 and node.op_type == "ConvTranspose":
            return 1
        if index == 1 and node.op_type == "Gemm":
            return 0 if attribute(node, "transB", 0) else 1
    return None


def _factor(graph: OnnxGraph, initializer: str, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the output channels of a tensor were multiplied by, by least squares."""
    axis = _factor_axis(graph, initializer)
    data = graph.data[initializer]
    assert axis is not None
    assert isinstance(data, MemoryData)
    a, b = (t.double().movedim(axis, 0).flatten(1) for t in (data.tensor, tensor))
    return ((a * b).sum(1) / (b * b).sum(1).clamp_min(1e-300)), axis


def _is_multiple(graph: OnnxGraph, initializer: str, tensor: torch.Tensor) -> bool:
    data = graph.data[initializer]
    assert isinstance(data, MemoryData)
    if data.tensor.shape != tensor.shape or not tensor.is_floating_point() or tensor.ndim < 2:
        return False
    factor, axis = _factor(graph, initializer, tensor)
    a, b = (t.double().movedim(axis, 0).flatten(1) for t in (data.tensor, tensor))
    return bool(((a - factor[:, None] * b).abs().amax(1) <= _SCALED * a.abs().amax(1)).all())


def _retie(graph: OnnxGraph, kept: str, copy: str, same_way: bool) -> None:
    """Use one initializer for both, through a Transpose where they lie differently."""
    main = graph.model.graph
    value = main.initializers[kept]
    if not same_way:
        node = ir.node("Transpose", [value], {"perm": [1, 0]}, name=graph.free_name(f"{kept}_transpose"), num_outputs=1)
        made = node.outputs[0]
        made.name = graph.free_name(f"{kept}_transposed")
        assert value.shape is not None
        made.shape, made.type = ir.Shape(list(reversed(value.shape.dims))), value.type
        main.insert_before(main[0], node)
        value = made
    ir.convenience.replace_all_uses_with(main.initializers[copy], value)
    graph.drop(copy)


def _renamed(graph: OnnxGraph, initializer: str, name: str) -> str:
    if initializer != name and graph.free_name(name) == name:
        graph.rename(initializer, name)
        return name
    return initializer


def _rename_biases(graph: OnnxGraph, found: Mapping[str, tuple[str, Relation]]) -> None:
    """Biases that folding a BatchNorm made: ``conv.weight_bias`` of the exporter is ``conv.bias``."""
    for initializer, (_, relation) in found.items():
        module = initializer.removesuffix(".weight_bias")
        if not relation and module != initializer and initializer in graph.data:
            graph.names[f"{module}.bias"] = _renamed(graph, initializer, f"{module}.bias")


def _notes(
    graph: OnnxGraph,
    found: Mapping[str, tuple[str, Relation]],
    first: Mapping[str, str],
    taken: Mapping[str, object],
    state: Mapping[str, torch.Tensor],
    source: Source,
    spell: _Spelling,
) -> list[str]:
    notes = []
    classes = {spec.name: spec.module for spec in source.specs()}
    if scaled := [n for n, (_, relation) in found.items() if relation == "scaled"]:
        notes.append(f"{graph.name}: {len(scaled)} BatchNorm folded into the weights before them by the exporter")
    mapped = set(graph.names.values())
    left = [n for n in found if n in graph.data and n not in mapped and len(graph.data[n].shape) >= 2]
    recurrent = [n for n in left if any(u.op_type in ("LSTM", "GRU", "RNN") for u, _ in uses_through(graph, n))]
    if recurrent:
        made_of = sorted({q for n in recurrent for q in _sources(graph, n) if q in first})
        notes.append(
            f"{graph.name}: {_some(recurrent)}: ONNX has the gates of recurrent layers in another order, so "
            f"{_some(made_of)} cannot be told apart there: they stay floats under these names"
        )
    if others := [n for n in left if n not in recurrent]:
        notes.append(f"{graph.name}: tensors of the graph that are none of the model: {_some(others)}")
    gone = [n for n, f in first.items() if f not in taken and n not in graph.data and n == f]
    gone = [n for n in gone if not any(n in _sources(graph, r) for r in recurrent)]
    if scaled:  # what their parameters became has been said
        gone = [n for n in gone if "BatchNorm" not in classes.get(spell(n), "")]
    if zeros := [n for n in gone if not state[n].any()]:
        notes.append(f"{graph.name}: zeros, which the exporter left out of the graph: {_some(list(map(spell, zeros)))}")
    if rest := [spell(n) for n in gone if n not in zeros]:
        notes.append(f"{graph.name}: folded into others or not used, so not in the graph: {_some(rest)}")
    return notes


def _sources(graph: OnnxGraph, initializer: str) -> Iterable[str]:
    value = graph.model.graph.initializers[initializer]
    return _QUOTED.findall(value.metadata_props.get(_FOLDED, ""))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

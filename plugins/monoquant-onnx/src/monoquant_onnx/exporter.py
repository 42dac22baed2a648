"""``--format onnx``: the graph of the source with quantized weights, in standard ONNX.

Only ``pack``, ``unpack`` and the transforms import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from monoquant_core.encoding import Encoding
from monoquant_core.errors import PlanError
from monoquant_core.exporters import (
    Drop,
    FileLayout,
    FilePlan,
    Held,
    Holds,
    Output,
    Part,
    Placed,
    Refuses,
    Repacks,
    Transform,
    Verdict,
)
from monoquant_core.model import ModelInfo, Source, TensorSpec
from monoquant_core.schemes import Proposal
from monoquant_onnx.layouts import NO_KERNEL, Layout, layout_of, repacked, stored_arrays
from monoquant_onnx.plugin import OnnxOptions
from monoquant_onnx.roles import OTHER, Role, dynamic_reason, role_of, static_reason
from monoquant_onnx.types import NUMBER

if TYPE_CHECKING:
    import torch

    from monoquant_core.stats import TensorStats
    from monoquant_core.tensor import QuantizedTensor
    from monoquant_onnx.graph import OnnxGraph
    from monoquant_onnx.ranges import Ranges
    from monoquant_onnx.rewrite import Rewritten
    from monoquant_onnx.static import Pairs

DYNAMIC, STATIC, ROWS, WEIGHTS = "MatMulInteger", "QDQ", "Gather+DequantizeLinear", "DequantizeLinear"

#: codes of weights that two of them times uint8 inputs add up to less than an int16 holds
SEVEN_BITS = (-63, 63)


class OnnxExporter:
    """Writes an ``.onnx`` file.

    :param graph: of the model, once it is known.
    """

    name = "onnx"
    recipe = "int8-embeddings"
    fuses = False  #: runtimes keep q, k and v apart

    def __init__(
        self,
        options: OnnxOptions,
        graph: OnnxGraph | None = None,
        specs: Sequence[TensorSpec] = (),
        stats: Mapping[str, TensorStats] | None = None,
    ) -> None:
        self._options, self._graph, self._specs, self._stats = options, graph, {s.name: s for s in specs}, stats or {}
        self._roles: dict[str, Role] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._rewritten: tuple[tuple[Placed, ...], Rewritten] | None = None
        if graph is not None:
            self._roles = {spec.name: role_of(graph, graph.names[spec.name]) for spec in specs if not spec.tied_to}
            self._names = _array_names(graph, [spec.name for spec in specs if not spec.tied_to])

    def read_graph(self, source: Source, example: Any) -> Source:
        """The source with an ONNX graph: itself, or what torch exports.

        :raises MonoquantError: when there is no way to a graph, saying what would be one.
        """
        from monoquant_onnx.attach import graph_of

        return graph_of(source, example, self._options.graph)

    def sample_graph(self, specs: Sequence[TensorSpec]) -> OnnxGraph:
        """A graph that gives out these tensors, each under its name and ``:out``: for the conformance kit."""
        from monoquant_onnx.sample import sample_graph

        return sample_graph(specs)

    def resolve(self, specs: Sequence[TensorSpec], info: ModelInfo) -> OnnxExporter:
        """The exporter for this model.

        :raises PlanError: when its graph is none of ONNX.
        """
        from monoquant_onnx.graph import OnnxGraph

        if not isinstance(info.graph, OnnxGraph):
            raise PlanError(
                f"{info.name}: --format onnx needs an ONNX graph, and this is {type(info.graph).__name__}",
                hint="quantize from a module, a .pt2 program, a model folder or an .onnx file",
            )
        return OnnxExporter(self._options, info.graph, specs, self._stats)

    def with_stats(self, stats: Mapping[str, TensorStats]) -> OnnxExporter:
        """The exporter that knows the ranges of activations."""
        return OnnxExporter(self._options, self._graph, list(self._specs.values()), stats)

    def fingerprint(self) -> str:
        """The processor that it is for; the graph and the ranges of values show in the plan."""
        return self._options.target

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        """Every initializer, as it lies in the graph."""
        return [Output(spec.name, spec.shape, spec.dtype, (spec.name,)) for spec in specs]

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        """What DequantizeLinear and integer products take."""
        if proposal is None or isinstance(proposal.encoding, str):
            if out.dtype in NUMBER:
                return Holds(out.dtype, None)
            return Refuses(f"ONNX has no type for {out.dtype}")
        if self._roles.get(out.name, OTHER).what == "output":
            return Refuses("the graph gives it out as it is", hint=f"--keep '{out.name}'")
        encoding = proposal.encoding
        layout = layout_of(out.shape, encoding)
        if isinstance(layout, str):
            return self._other(out, proposal, encoding, layout)
        return self._held(out, proposal, encoding)

    def settle(self, placed: Sequence[Placed]) -> Sequence[Output]:
        """Biases of layers that are computed in integers: int32, in steps of the input's scale times the weight's."""
        static = [item for item in placed if item.held.layout == STATIC]
        if not static:
            return []
        from monoquant_onnx.static import find_pairs

        assert self._graph is not None
        layers = {
            node: item.output.name
            for item in static
            for node, _ in self._graph.uses(self._graph.names[item.output.name])
        }
        pairs = find_pairs(self._graph.model.graph, layers, self._ranges(placed).find)
        known = {item.output.name: item for item in placed}
        found: list[Output] = []
        for item in static:
            if self._roles[item.output.name].what in ("conv", "gemm"):
                found += self._with_bias(item, known, pairs)
        return found

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        """The codes under the tensor's own name, and its parameters."""
        if held.encoding is None:
            return [Part(self._name(out.name), out.dtype, out.shape)]
        found = []
        for stored in self._arrays(out, held):
            name = self._name(out.name, stored.label)
            shape = (stored.nbytes,) if 0 < stored.bits < 8 else stored.shape
            if stored.rows:
                found.append(Part(name, stored.dtype, shape, rows=stored.rows))
            else:
                found.append(Part(name, stored.dtype, shape, per="tensor"))
        return found

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        """raw_data of every array."""
        if held.encoding is None:
            return {self._name(out.name): rows.contiguous()}  # type: ignore[union-attr]
        from monoquant_onnx.packing import packed

        arrays = self._arrays(out, held)
        return {self._name(out.name, a.label): value for a, value in packed(rows, arrays)}  # type: ignore[arg-type]

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        """Inverse of ``pack``. Parts may come flat."""
        if held.encoding is None:
            return parts[self._name(out.name)]
        from monoquant_onnx.packing import unpacked

        found = {a.label: parts[self._name(out.name, a.label)] for a in self._arrays(out, held)}
        return unpacked(found, out.shape, held.encoding, first_row)

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        """The .onnx file, and above 2 GB its data beside it."""
        from monoquant_onnx.files import LIMIT, file_plans

        limit = min(LIMIT, self._options.max_inline)
        return file_plans(
            self._rewrite(layout.outputs), layout.destination or "model.onnx", layout.plan_hash, limit=limit
        )

    def notes(self, layout: FileLayout) -> Sequence[str]:
        """What the file does that the plan's table does not show."""
        layouts = [item.held.layout for item in layout.outputs]
        notes = []
        if DYNAMIC in layouts:
            notes.append(
                "inputs are quantized when the model runs, one scale for a whole tensor (DynamicQuantizeLinear)"
            )
        if STATIC in layouts:
            if self._options.target in ("auto", "x86"):
                notes.append(
                    "weights of static layers have 7 bits: x86 processors without VNNI would overflow with 8; "
                    "--target vnni, arm or gpu gives 8"
                )
            if missing := self._rewrite(layout.outputs).missing:
                notes.append(
                    f"{len(missing)} values stay floats, as their ranges are not known: {', '.join(missing[:3])}; "
                    "calibrate the ONNX graph itself to know them"
                )
        elements = {item.held.encoding.element.name for item in layout.outputs if item.held.encoding is not None}
        notes += [NO_KERNEL[name] for name in sorted(elements & NO_KERNEL.keys())]
        return notes

    def _held(self, out: Output, proposal: Proposal, encoding: Encoding) -> Verdict:
        role, activation = self._roles.get(out.name, OTHER), proposal.activation
        if activation is None:
            rows = role.looked_up and len(out.shape) == 2 and _by_rows(encoding) and encoding.element.bits >= 8
            return Holds(ROWS if rows and isinstance(encoding.scale, str) else WEIGHTS, encoding)
        plain = dataclasses.replace(proposal, activation=None)
        if activation.dynamic:
            reason = dynamic_reason(role, out.shape, encoding, out.dtype)
            return Refuses(reason, plain) if reason else Holds(DYNAMIC, encoding)
        reason = static_reason(role, out.shape, encoding, out.dtype)
        if reason:
            return Refuses(reason, plain)
        spec = self._specs.get(out.name)
        finished = spec is not None and spec.encoding is not None
        low, high = encoding.codes_range
        if self._options.target in ("auto", "x86") and (low, high) < SEVEN_BITS and not finished:
            narrow = dataclasses.replace(encoding, clip=SEVEN_BITS)
            return Refuses("8-bit weights overflow on x86 without VNNI", dataclasses.replace(proposal, encoding=narrow))
        return Holds(STATIC, encoding)

    def _other(self, out: Output, proposal: Proposal, encoding: Encoding, reason: str) -> Verdict:
        """The same codes with other parameters, or a refusal."""
        if (found := repacked(out.shape, encoding)) is not None:
            target, exact = found
            held = self._held(out, dataclasses.replace(proposal, encoding=target), target)
            if isinstance(held, Holds):
                return Repacks(held.layout, target, exact)
            return held
        if encoding.offset is not None and encoding.zero_point is None and encoding.element.kind == "int":
            instead = Encoding(encoding.element, encoding.block, "float32", zero_point=encoding.element)
            if not isinstance(layout_of(out.shape, instead), str):
                return Refuses(f"{encoding}: {reason}", Proposal(instead))
        return Refuses(f"{encoding}: {reason}")

    def _with_bias(self, item: Placed, known: Mapping[str, Placed], pairs: Pairs) -> list[Output]:
        from monoquant_onnx import biases

        assert self._graph is not None
        weight = item.output.name
        found = biases.find(self._graph, self._graph.names[weight], pairs)
        bias = next(
            (name for name, initializer in self._graph.names.items() if found and initializer == found.name), ""
        )
        if found is None or bias not in known or known[bias].held.encoding is not None or self._specs[bias].encoding:
            return []
        scale = (weight, self._name(weight, "_scale"))
        steps = item.held.encoding
        assert steps is not None
        shape = found.shape if any(b == 1 for b in steps.block) else ()
        outputs = [
            Output(
                bias,
                found.shape,
                "int32",
                (bias,),
                transform=Transform(biases.codes(found.input_scale), "tensor", biases.REASON, of=(scale,)),
            ),
            Output(
                self._name(bias, "_scale"),  # which nothing else is called
                shape,
                "float32",
                (),
                transform=Transform(biases.scales(found.input_scale), "tensor", biases.REASON, of=(scale,)),
            ),
        ]
        if self._specs[weight].encoding is None:
            axis = self._roles[weight].outputs_axis
            lifted = biases.lifted(found.input_scale, self._graph.data[found.name], steps, axis)
            transform = Transform(lifted, "tensor", biases.LIFTED)
            outputs.append(dataclasses.replace(item.output, transform=transform))
        return outputs

    def _rewrite(self, placed: Sequence[Placed]) -> Rewritten:
        from monoquant_onnx.rewrite import rewrite

        assert self._graph is not None
        key = tuple(placed)
        if self._rewritten is None or self._rewritten[0] != key:
            made = rewrite(self._graph, placed, self._roles, self._names, self._ranges(placed))
            self._rewritten = (key, made)
        return self._rewritten[1]

    def _ranges(self, placed: Sequence[Placed]) -> Ranges:
        from monoquant_onnx.ranges import Ranges

        assert self._graph is not None
        inputs = {
            item.output.name: item.proposal.activation
            for item in placed
            if item.proposal is not None and item.proposal.activation is not None
        }
        return Ranges(self._graph, self._stats, inputs)

    def _arrays(self, out: Output, held: Held) -> list[Any]:
        assert held.encoding is not None
        layout = layout_of(out.shape, held.encoding)
        assert isinstance(layout, Layout)
        return stored_arrays(out.shape, held.encoding, layout, gathered=held.layout == ROWS)

    def _name(self, output: str, label: str = "") -> str:
        return self._names.get((output, label), f"{output}{label}")


def _by_rows(encoding: Encoding) -> bool:
    """Whether parameters belong to rows, or to the whole tensor."""
    return encoding.block[0] == 1 or all(b == -1 for b in encoding.block)


def _array_names(graph: OnnxGraph, specs: Sequence[str]) -> dict[tuple[str, str], str]:
    """(spec, label) -> a name in the graph for each array that a tensor may become."""
    names: dict[tuple[str, str], str] = {}
    for spec in specs:
        initializer = graph.names[spec]
        names[spec, ""] = initializer
        for label in ("_scale", "_zero_point", "_scale_scale", "_scale_zero_point"):
            names[spec, label] = graph.free_name(f"{initializer}{label}")
    return names

"""The calibrated range of every value of a graph, from whatever statistics there are of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from monoquant_onnx.layers import points_of
from monoquant_onnx.static import FUSED, Range

if TYPE_CHECKING:
    import onnx_ir as ir

    from monoquant_core.encoding import ActivationQuant
    from monoquant_core.stats import TensorStats
    from monoquant_onnx.graph import OnnxGraph


class Ranges:
    """Ranges by value. Statistics of a value's own name come first, then those of the layers that it flows between.

    :param inputs: spec -> how the plan quantizes the input of its layer.
    """

    def __init__(
        self, graph: OnnxGraph, stats: Mapping[str, TensorStats], inputs: Mapping[str, ActivationQuant]
    ) -> None:
        self._known: dict[str, Range] = dict(graph.ranges)
        points = points_of(graph)
        for point, (name, _) in points.modules.items():
            layer, _, side = point.rpartition(":")
            for spec in (layer, f"{layer}.weight"):
                found = inputs.get(spec) if side == "input" else None
                if found is not None and found.low is not None and found.high is not None:
                    self._known[name] = (found.low, found.high)
        for point in [p for side in (":output", ":input") for p in points.modules if p.endswith(side)]:
            if point in stats:
                self._known[points.modules[point][0]] = _range(stats[point])
        for name in points.values:
            if name in stats:
                self._known[name] = _range(stats[name])

    def find(self, value: ir.Value) -> Range | None:
        """The range of a value, or None."""
        known = self._known.get(value.name or "")
        node = value.producer()
        if known is not None or node is None or node.op_type not in FUSED:
            return known
        inner = node.inputs[0]
        before = self._known.get(inner.name or "") if inner is not None else None
        if before is None or node.op_type != "Relu":
            return None
        return max(0.0, before[0]), max(0.0, before[1])


def _range(stats: TensorStats) -> Range:
    low, high = getattr(stats, "low", None), getattr(stats, "high", None)
    if low is None or high is None:
        low, high = stats.minimum, stats.maximum
    return float(low.min()), float(high.max())

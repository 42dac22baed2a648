"""A module as the truth that its graph is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from monoquant_core.errors import CalibrationError, SourceError

if TYPE_CHECKING:
    from monoquant_onnx.graph import OnnxGraph

TOLERANCE = 1e-3
"""Largest ``norm(graph - module) / norm(module)`` of an output. float32 sums in another order give 1e-7 to 1e-5; a
wrong epsilon, a BatchNorm folded wrongly or a transposed weight gives 1e-2 and more."""


class Reference:
    """A module with an example of its inputs.

    :raises SourceError: when the module does not run on it.
    """

    def __init__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> None:
        self.module, self.name = module, name
        self.args, self.kwargs = args, dict(kwargs)
        self.output_names: list[str] = []
        self.run(self.inputs)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors among the inputs, in the order in which graphs take them."""
        return [t for t in _pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, torch.Tensor)]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The module's outputs for other tensors in the same places.

        :raises SourceError: when it does not run.
        """
        leaves, spec = _pytree.tree_flatten((self.args, self.kwargs))
        given = iter(inputs)
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(filled, spec)
        try:
            with torch.no_grad():
                result = self.module(*args, **kwargs)
        except Exception as exc:  # a model may fail in any way
            reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:240]}"
            shapes = ", ".join(f"{str(t.dtype)[6:]} {list(t.shape)}" for t in inputs)
            raise SourceError(
                f"{self.name}: does not run on {shapes}: {reason}",
                hint="--data (example= in Python) gives an example of what it takes",
            ) from exc
        found = [(k, t) for k, t in _pytree.tree_leaves_with_path(result) if isinstance(t, torch.Tensor)]
        self.output_names = [_name(keys) for keys, _ in found]
        return [t.detach() for _, t in found]

    @property
    def batched(self) -> bool:
        """Whether all inputs have as many samples."""
        return len({t.shape[0] if t.ndim else 0 for t in self.inputs}) == 1 and self.inputs[0].ndim > 0

    def free_axes(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Axes of an input, the batch aside, whose extents are asked to be free: sequences, not sizes of images."""
        if tensor.ndim == 2 and not tensor.is_floating_point():
            return (1,)
        return (1, 2) if tensor.ndim == 3 else ()

    def dynamic_shapes(self) -> list[Any]:
        """What torch.export is asked for, the most first: batch and sequences, the batch, nothing."""
        auto = torch.export.Dim.AUTO

        def wanted(free: bool, batch: bool) -> Any:
            def of(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return None
                axes = (0,) if batch and self.batched else ()
                return dict.fromkeys((*axes, *(self.free_axes(value) if free else ())), auto)

            shapes = _pytree.tree_map(of, (self.args, self.kwargs))
            return shapes[0] if not self.kwargs else shapes[1]

        return [wanted(True, True), wanted(False, True), wanted(False, False)]

    def check(self, graph: OnnxGraph, batches: Sequence[Sequence[torch.Tensor]]) -> None:
        """Compare the graph, run by onnxruntime, with the module.

        :raises SourceError: when they differ by more than ``TOLERANCE``, or onnxruntime does not run the graph.
        """
        names = [o.name for o in graph.model.graph.outputs]
        try:
            with graph.runner(()) as runner:
                for inputs in batches:
                    self._compare(names, list(runner.run(tuple(inputs)).values()), self.run(inputs))
        except CalibrationError as exc:
            raise SourceError(str(exc), hint=exc.hint) from exc

    def _compare(self, names: Sequence[str | None], found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        if len(found) != len(expected):
            raise SourceError(f"{self.name}: the graph has {len(found)} outputs, the module {len(expected)}")
        for name, ours, theirs in zip(names, found, expected, strict=True):
            if (difference := distance(ours, theirs)) > TOLERANCE:
                raise SourceError(
                    f"{self.name}: output {name!r} of the exported graph differs from the module's by {difference:.2g} "
                    f"of its size; {TOLERANCE:g} is allowed",
                    hint="what torch.onnx made of this model is wrong; nothing was written",
                )


def _name(path: tuple[Any, ...]) -> str:
    """What a result in a mapping is called: "last_hidden_state"; "" for others."""
    keys = [key.key for key in path if isinstance(key, _pytree.MappingKey)]
    return str(keys[0]) if len(keys) == len(path) == 1 else ""


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """``norm(ours - theirs) / norm(theirs)``; infinite where shapes, integers or what is not finite differ."""
    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours.to(theirs.dtype), theirs) else float("inf")
    a, b = ours.double(), theirs.double()
    usual = b.isfinite() & (b.abs() < 1e30)  # masks are -inf or the smallest float
    others = ~usual & ~b.isnan()
    if not torch.equal(a.isnan(), b.isnan()) or bool((a[others].sign() != b[others].sign()).any()):
        return float("inf")
    difference, size = float((a - b)[usual].norm()), float(b[usual].norm())
    return difference / size if size else (0.0 if difference < 1e-6 else float("inf"))

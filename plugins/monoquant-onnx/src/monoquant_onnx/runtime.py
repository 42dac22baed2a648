"""ONNX files in onnxruntime, for verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from monoquant_core.declarations import NoOptions
from monoquant_core.errors import ExecutionError
from monoquant_core.graphs import runnable_of
from monoquant_core.model import Source
from monoquant_core.runners import Batch, Input, Observe, Runner
from monoquant_onnx import sessions
from monoquant_onnx.graph import OnnxGraph
from monoquant_onnx.runner import OnnxRunner
from monoquant_onnx.source import OnnxSource

FLOATS = 1e-4  #: only weights are quantized: both sides multiply float32, in another order perhaps
#: Values are rounded to 8 bits on both sides, where float32 sums in another order take some to the next step, and those
#: take others. Measured: up to 0.004 in six layers of an encoder; wrong arithmetic gives 0.05 and more.
ROUNDED = 0.02
#: relative error of a cosine of 0.999, which is what onnxruntime's kernels for 4 and 8 bits cost: they round inputs
OPTIMIZED = 0.045


class OnnxRuntime:
    """Runs a file as its users do, and node by node as it is written."""

    optimized_bound = OPTIMIZED

    def __init__(self, options: NoOptions) -> None:
        del options
        self._path = Path()
        self._outputs: list[str] = []

    def recognises(self, path: Path) -> bool:
        """A file of that name."""
        return path.suffix.lower() == ".onnx" and path.is_file()

    def open(self, path: Path) -> Runner:
        """The file with every optimization, once onnx has checked it.

        :raises ExecutionError: when it is not valid, or onnxruntime does not load it.
        """
        runner = sessions.FileRunner(path, optimized=True)
        self._path, self._outputs = path, runner.outputs
        return runner

    def open_exact(self, path: Path) -> Runner:
        """The file without any optimization.

        :raises ExecutionError: when onnxruntime does not load it.
        """
        return sessions.FileRunner(path, optimized=False)

    def reference(self, original: Source, finished: Source | None) -> Runner:
        """The original itself; or its graph with the file's weights, and values rounded where the file rounds them.

        :raises MonoquantError: when the original is no model that can be run.
        """
        if finished is not None:
            if not isinstance(finished, OnnxSource):
                raise ExecutionError(f"{finished.info.name}: is no ONNX file")
            return _Simulated(original, finished, self._path)
        runner = runnable_of(original).runner(())
        return runner if isinstance(original.info.graph, OnnxGraph) else _Renamed(runner, self._outputs)

    def tolerance(self, finished: Source) -> float:
        """By whether values are rounded while the file runs."""
        rounds = any(spec.activation is not None for spec in finished.specs())
        return ROUNDED if rounds or (isinstance(finished, OnnxSource) and finished.graph.ranges) else FLOATS

    def diverging(self, path: Path, batch: Batch, bound: float) -> str:
        """The first value that optimizations change by more than ``bound``, with its node; "" when there is none."""
        return sessions.diverging(path, batch, bound)


class _Simulated:
    """What the file should compute. The original becomes a graph with the first batch, as when it was exported."""

    def __init__(self, original: Source, finished: OnnxSource, path: Path) -> None:
        self._original, self._finished, self._path = original, finished, path
        self._runner: OnnxRunner | None = None
        self.inputs: Sequence[Input] = finished.graph.inputs
        self.points: Sequence[str] = ()
        self.notes: Sequence[str] = ()

    def __enter__(self) -> _Simulated:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        if self._runner is None:
            self._runner = self._made(batch)
        return self._runner.run(sessions.feeds(batch, self._runner.inputs, self._original.info.name), observe)

    def _made(self, batch: Batch) -> OnnxRunner:
        from monoquant_onnx.attach import graph_of
        from monoquant_onnx.simulated import simulated

        graph = graph_of(self._original, batch).info.graph
        return OnnxRunner(simulated(graph, self._finished, self._path), (), optimized=False)


class _Renamed:
    """A module whose outputs are called as the file calls them: in the same order."""

    def __init__(self, runner: Runner, outputs: Sequence[str]) -> None:
        self._runner, self._outputs = runner, outputs
        self.inputs, self.points, self.notes = runner.inputs, runner.points, runner.notes

    def __enter__(self) -> _Renamed:
        self._runner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.__exit__(*exc)

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        found = self._runner.run(batch, observe)
        if len(found) != len(self._outputs):
            return found  # what has the same name is compared
        return dict(zip(self._outputs, found.values(), strict=True))

"""ONNX files in onnxruntime, for verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from monoquant_core.agreement import Agreement
from monoquant_core.containers.entries import shown
from monoquant_core.declarations import NoOptions
from monoquant_core.errors import ExecutionError
from monoquant_core.graphs import runnable_of
from monoquant_core.model import Source
from monoquant_core.runners import Batch, Input, Observe, Runner
from monoquant_onnx import sessions
from monoquant_onnx.attach import graph_of
from monoquant_onnx.graph import OnnxGraph
from monoquant_onnx.runner import OnnxRunner
from monoquant_onnx.sameness import distance
from monoquant_onnx.simulated import Site, simulated
from monoquant_onnx.source import OnnxSource
from monoquant_onnx.stretches import stretches

#: Both sides compute in float32, in another order perhaps; measured are 1e-6 and less.
FLOATS = 1e-4
#: relative error of a cosine of 0.999, which is what onnxruntime's kernels for 4 and 8 bits cost: they round inputs
OPTIMIZED = 0.045
#: Between two roundings kernels do the same with the same values, and a few codes are one step apart: 0.0003 measured.
STRETCH = 0.01


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
        sessions.check(path)
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
        """What the order of float32 sums explains: the reference takes rounded values from the file."""
        return FLOATS

    def alone(self, path: Path, batches: Sequence[Mapping[str, torch.Tensor]]) -> Sequence[Agreement]:
        """Each stretch between two roundings, with optimizations against without; none where nothing is rounded."""
        return stretches(path, batches, STRETCH)

    def diverging(self, path: Path, batch: Batch, bound: float) -> str:
        """The first value that optimizations change by more than ``bound``, with its node; "" when there is none."""
        return sessions.diverging(path, batch, bound)


class _Simulated:
    """What the file should compute. The original becomes a graph with the first batch, as when it was exported.

    Rounded values come from the file as long as the values before them agree; else it rounds for itself, and says where
    it began to differ.
    """

    def __init__(self, original: Source, finished: OnnxSource, path: Path) -> None:
        self._original, self._finished, self._path = original, finished, path
        self._graph: OnnxGraph | None = None
        self._runners: dict[bool, OnnxRunner] = {}
        self._sites: list[Site] = []
        self._file: sessions.FileRunner | None = None
        self.inputs: Sequence[Input] = finished.graph.inputs
        self.points: Sequence[str] = ()
        self.notes: list[str] = []

    def __enter__(self) -> _Simulated:
        return self

    def __exit__(self, *exc: object) -> None:
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._file = None

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        runner = self._runner(batch, given=True)
        taken = sessions.feeds(batch, self.inputs, self._original.info.name)
        if not self._sites:
            return runner.run(taken, observe)
        if self._file is None:
            inside = [name for site in self._sites for name in (site.before, *site.rounded)]
            self._file = sessions.FileRunner(self._path, optimized=False, also=inside)
        theirs = {**taken, **self._file.run(batch)}
        found = runner.run({**taken, **{site.given: site.floats(theirs) for site in self._sites}}, observe)
        ours = {**taken, **found}
        for site in self._sites:
            if (far := distance(theirs[site.before], ours[site.value])) > FLOATS:
                note = f"the first value that differs from the IR's, by {far:.2g} of its size, is {shown(site.before)}"
                self.notes += [] if self.notes else [note]
                return self._runner(batch, given=False).run(taken, observe)
        return found

    def _runner(self, batch: Batch, *, given: bool) -> OnnxRunner:
        if given not in self._runners:
            if self._graph is None:
                self._graph = graph_of(self._original, batch).info.graph
            graph, sites = simulated(self._graph, self._finished, self._path, given=given)
            self._sites = sites if given else self._sites
            self._runners[given] = OnnxRunner(graph, (), optimized=False)
        return self._runners[given]


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

"""What a runtime is: a program that opens a finished file and runs it. Importing this module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from monoquant_core.model import Source
from monoquant_core.runners import Runner

#: outputs of these names score the next token, or a class, along their last axis
LOGITS, LOG_PROBABILITIES = "logits", "log_probabilities"


class Runtime(Protocol):
    """Runs finished files of its formats, for verification.

    A runtime that rewrites what it loads has more: ``open_exact(path) -> Runner`` runs the file as it stands, and is
    what the IR is compared with; ``optimized_bound`` is the largest relative error that the rewriting may cost;
    ``diverging(path, batch, bound) -> str`` names the first value that differs by more between the two.
    ``alone(path, batches) -> Sequence[Agreement]`` compares the two stretch by stretch, in the order of the graph, each
    with the same inputs; where it gives any, they are judged and not the end.
    """

    def recognises(self, path: Path) -> bool:
        """Whether it runs files of this kind, from a look at the name and the header. Never raises."""
        ...

    def open(self, path: Path) -> Runner:
        """A finished file, as users open it. Outputs are float32, samples along the first axis; of ``logits`` and
        ``log_probabilities`` it may give the last positions only.

        :raises ExecutionError: when the runtime is not installed (with what to install), or does not load the file.
        """
        ...

    def reference(self, original: Source, finished: Source | None) -> Runner:
        """The same outputs without this runtime.

        :param original: the model that was quantized.
        :param finished: its dequantized values take the place of the original's; None leaves those.
        :raises MonoquantError: when the original is no model that can be run.
        """
        ...

    def tolerance(self, finished: Source) -> float:
        """Largest relative error against the IR that the runtime's own arithmetic explains."""
        ...

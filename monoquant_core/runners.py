"""Running a model and watching what flows through it. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from typing import Self

    import torch

#: one batch of inputs: a tensor for the first input, a tuple in the inputs' order, or a mapping by input name
Batch: TypeAlias = "torch.Tensor | tuple[Any, ...] | Mapping[str, Any]"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model, as far as its graph tells."""

    name: str
    dtype: str = ""  #: torch's name; "" is unknown
    shape: tuple[int | None, ...] | None = None  #: None for an extent that may vary; None altogether is unknown
    required: bool = True


class Observe(Protocol):
    """What a runner tells the values of a point."""

    def __call__(self, point: str, values: torch.Tensor, axis: int = -1) -> None:
        """Take in values; they may be freed or changed after the call.

        :param point: ``"<module path>:input"``, ``"<module path>:output"``, or the name of another value of a graph.
        :param axis: of channels: 1 of what a convolution takes and gives, else the last.
        """
        ...


class Runner(Protocol):
    """A model that is ready to run, with the points to be watched chosen.

    A context manager: leaving it restores whatever it changed about the model.
    """

    @property
    def inputs(self) -> Sequence[Input]:
        """What it takes."""
        ...

    @property
    def points(self) -> Sequence[str]:
        """Those it is expected to report; one that no batch reaches is warned of."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know: conversions that it made."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def run(self, batch: Batch, observe: Observe | None = None) -> Mapping[str, torch.Tensor]:
        """Run one batch and report the values of every point as they come.

        :return: the outputs, by name.
        :raises CalibrationError: when the batch does not fit the inputs, or the model fails.
        """
        ...


class Runnable(Protocol):
    """A graph that can be run. A format's own graph (``ModelInfo.graph``) implements it to be calibrated."""

    @property
    def inputs(self) -> Sequence[Input]:
        """What it takes."""
        ...

    def runner(self, points: Collection[str] | None = None, device: str = "") -> Runner:
        """A runner.

        :param points: what to watch; None is every point whose statistics a plan could use.
        :param device: where to run: ``cpu``, ``cuda``; "" is where the model is.
        :raises CalibrationError: for a point that there is not.
        """
        ...

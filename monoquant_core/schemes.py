"""What a quantization scheme is. Imports no torch: a plan must be cheap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from monoquant_core.encoding import FLOAT_BITS, ActivationQuant, ElementType, Encoding, per_channel, per_group, per_row
from monoquant_core.errors import EncodingError
from monoquant_core.model import TensorSpec

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.stats import TensorStats
    from monoquant_core.tensor import QuantizedTensor

NEEDS = frozenset({"importance", "ranges", "absmax", "whole"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a scheme would make of a tensor.

    :raises EncodingError: for an encoding not in canonical form, or an unknown need.
    """

    encoding: Encoding | str  #: a float dtype name is a cast, which the core does itself
    activation: ActivationQuant | None = None  #: how the layer's input is quantized at run time
    layout: str | None = None  #: a preferred name of the format's own: "TQ1_0"
    needs: frozenset[str] = frozenset()
    """What ``quantize`` needs beside the rows: ``absmax`` (of the whole tensor, from a first pass), ``whole`` (all rows
    at once), ``importance`` (per column; required, not merely used), ``ranges`` (calibrated)."""

    def __post_init__(self) -> None:
        if isinstance(self.encoding, Encoding):
            self.encoding.check_weight()
        elif self.encoding not in FLOAT_BITS:
            raise EncodingError(f"a cast is to one of {', '.join(FLOAT_BITS)}, got {self.encoding!r}")
        if self.needs - NEEDS:
            raise EncodingError(f"needs: unknown {sorted(self.needs - NEEDS)}, known {sorted(NEEDS)}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a scheme cannot quantize a tensor, and what would work.

    :raises EncodingError: without a reason.
    """

    reason: str
    hint: str = ""
    instead: Proposal | None = None  #: what it would take if the hint is followed: the error says what that comes to

    def __post_init__(self) -> None:
        if not self.reason:
            raise EncodingError("a refusal has a reason")


@dataclass(slots=True)
class Context:
    """What ``quantize`` gets beside the rows."""

    spec: TensorSpec  #: the tensor the rows belong to
    rows: range  #: which rows of it these are
    scratch: Scratch  #: the worker's buffers; names that a scheme takes should start with its own name
    absmax: float | None = None  #: largest magnitude of the whole tensor, where the proposal asked for it
    importance: torch.Tensor | None = None
    """float32, for each input of the layer its mean square, all of them with every chunk. Inputs are the last axis; of
    a convolution all axes but the first, flattened; of a transposed linear layer axis 0. Of a stack of layers
    it has a row for each."""
    extra: Mapping[str, object] = field(default_factory=dict)  #: room for later needs
    stored: torch.Tensor | None = None  #: the rows in the dtype of the source, where that has half the bytes


class Quantizer(Protocol):
    """One scheme with its options bound. ``propose`` and ``accepts`` import no torch and read no data.

    More methods are optional: ``use(registry)``, called once, first, for schemes that ask other plugins;
    ``with_ranges(spec, proposal, stats: TensorStats) -> Proposal``, called in planning where calibration knows the
    range of what goes into the layer: ``proposal`` with a static activation, say, and without the need for ``ranges``;
    ``notes(tensors) -> Sequence[str]``, what to tell the user when the scheme quantizes these, each with the encoding
    that it gets; ``process_bytes(spec, encoding) -> int``, memory that a process needs once before it can quantize such
    a tensor, such as that of a compiler; and ``fingerprint() -> str``, which tells the scheme from another one that has
    the same options and version and gives other codes: a digest of the files that it reads, "" where there are none. It
    may be called in any thread, and is called for runs that take some time; without it they are not resumed when they
    were interrupted.
    """

    #: whether zeros stay exactly zero; the conformance kit and the check rely on it
    keeps_zero: bool
    #: whether quantizing a dequantized tensor gives the same codes
    idempotent: bool
    #: whether every code is the nearest one to its value, so that the check may hold it to half a step
    nearest: bool

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The encoding for a tensor, or why there is none. The same answer every time."""
        ...

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether ``quantize`` can produce this encoding instead of the proposed one (negotiation with a format)."""
        ...

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize a chunk of whole blocks.

        :param rows: a float chunk of the tensor's rank; not to be written to.
        :return: exactly ``encoding`` and the chunk's shape; it may live in ``context.scratch``. A parameter of the
            whole tensor comes with every chunk.
        :raises QuantizationError: for NaN or infinity, naming the tensor.
        """
        ...


def unsuitable(spec: TensorSpec) -> Refusal | None:
    """Why no scheme with a scale per channel or block takes the tensor; None if nothing speaks against it."""
    if not spec.is_float:
        return Refusal(f"{spec.dtype} values are not floats to be quantized")
    if len(spec.shape) < 2:
        return Refusal(f"a {'vector' if spec.shape else 'scalar'} has no channels that could share a scale")
    if spec.numel == 0:
        return Refusal("it has no elements")
    return None


def channel_block(spec: TensorSpec) -> tuple[int, ...]:
    """One block per output channel: per row, except where a layer stores its weight otherwise."""
    ndim = len(spec.shape)
    if spec.kind == "conv_transpose" or spec.transposed:
        return per_channel(ndim, 1)
    return per_channel(ndim, 0) if spec.kind == "conv" else per_row(ndim)


def group_block(spec: TensorSpec, size: int) -> tuple[int, ...] | Refusal:
    """Groups of ``size`` inputs of an output channel, or why there are none, with the sizes that would fit.

    A convolution is taken as ``[out, in * k * k]``, as every runtime takes it.
    """
    hint = "--granularity channel needs no groups"
    if spec.kind == "conv_transpose":
        return Refusal("the rows of a transposed convolution mix output channels: they cannot be cut into groups", hint)
    flat = spec.kind == "conv" and len(spec.shape) > 2
    row = spec.shape[0] if spec.transposed else math.prod(spec.shape[1:]) if flat else spec.shape[-1]
    if row % size:
        divisors = {d for i in range(1, math.isqrt(row) + 1) if row % i == 0 for d in (i, row // i)}
        nearest = sorted((d for d in divisors if d >= 16), key=lambda d: (abs(d - size), d))[:4]
        fitting = f"; groups of {' or '.join(map(str, sorted(nearest)))} do" if nearest else ""
        return Refusal(f"groups of {size} do not divide its rows of {row}{fitting}", hint)
    if spec.transposed:
        return (size, 1)
    return per_group(2 if flat else len(spec.shape), size)


def static_inputs(spec: TensorSpec, element: ElementType, stats: TensorStats) -> ActivationQuant | None:
    """Layer inputs quantized with one scale that calibration found; None where the inputs are indices.

    The range is what the calibrator chose, neither made symmetric nor rounded: formats derive from it what they store.
    """
    if spec.kind in ("embedding", "position") or stats.low is None or stats.high is None:
        return None
    low, high = float(stats.low.min()), float(stats.high.max())
    return ActivationQuant(element, "tensor", dynamic=False, low=low, high=high)


def dynamic_inputs(spec: TensorSpec, element: ElementType) -> ActivationQuant | None:
    """Layer inputs quantized at run time, with a scale per token; None where the inputs are indices.

    The inputs of a convolution are images: nothing in them is a token, and they share one scale.
    """
    if spec.kind == "embedding":
        return None
    return ActivationQuant(element, "tensor" if spec.kind.startswith("conv") else "token", dynamic=True)

"""Integer schemes: which encoding a tensor gets. Imports torch only to quantize."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from monoquant_core.compiling import NUMBA_BYTES, accelerator
from monoquant_core.encoding import INT8, Encoding, integer, per_tensor
from monoquant_core.errors import OptionError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import (
    Context,
    Proposal,
    Refusal,
    channel_block,
    dynamic_inputs,
    group_block,
    static_inputs,
    unsuitable,
)
from monoquant_int.plugin import IntOptions, W8A8Options

if TYPE_CHECKING:
    import torch

    from monoquant_core.stats import TensorStats
    from monoquant_core.tensor import QuantizedTensor

GROUP_SIZE = 128
WORTH_COMPILING = 1 << 21  #: elements of a tensor: models that have none of that size are done before numba is loaded
SCALES = ("float32", "float16", "bfloat16")  #: dtypes a scale can be asked for in


class IntQuantizer:
    """Integers of one width with a scale per tensor, output channel or group, symmetric or with a zero point.

    :raises OptionError: for options that exclude each other.
    """

    keeps_zero = True
    nearest = True  #: a search settles the scale; codes are the nearest ones to it

    def __init__(self, bits: int, options: IntOptions, *, inputs: str = "none") -> None:
        self.bits, self.options = bits, options
        self.inputs = inputs  #: "none", or what W8A8Options.activations says
        self.granularity = options.granularity
        if self.granularity == "auto":
            self.granularity = "group" if options.group_size or bits < 8 else "channel"
        if options.group_size and self.granularity != "group":
            raise OptionError(
                f"int{bits}: group_size {options.group_size} and granularity {self.granularity} exclude each other"
            )
        if options.rounding == "search" and self.granularity == "tensor":
            raise OptionError(
                f"int{bits}: rounding search needs a scale per channel or group, not one per tensor",
                hint="use --rounding nearest, or another granularity",
            )
        if options.narrow_range and not options.symmetric:
            raise OptionError(f"int{bits}: narrow_range is for symmetric codes")
        self.element = integer(bits, signed=options.symmetric)
        largest = (1 << bits - 1) - 1
        self.clip = (-largest, largest) if options.narrow_range else None
        #: a search need not find the same scale again; ties at the ends of an asymmetric range may move it
        self.idempotent = options.symmetric and not self._searches(tensor_wide=False)

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The encoding for a tensor, or why there is none."""
        refusal = unsuitable(spec)
        if refusal is not None:
            return refusal
        block: tuple[int, ...] | Refusal = per_tensor(len(spec.shape))
        if self.granularity == "group":
            block = group_block(spec, self.options.group_size or GROUP_SIZE)
        elif self.granularity == "channel":
            block = channel_block(spec)
        if isinstance(block, Refusal):
            return block
        zero_point = None if self.options.symmetric else self.element
        encoding = Encoding(self.element, block, "float32", zero_point=zero_point, clip=self.clip)
        needs: frozenset[str] = frozenset()
        if self.granularity == "tensor":
            needs = frozenset({"absmax" if self.options.symmetric else "whole"})
        if self.inputs == "static" and dynamic_inputs(spec, INT8) is not None:
            return Proposal(encoding, needs=needs | {"ranges"})
        activation = dynamic_inputs(spec, INT8) if self.inputs in ("auto", "dynamic") else None
        return Proposal(encoding, activation, needs=needs)

    def with_ranges(self, spec: TensorSpec, proposal: Proposal, stats: TensorStats) -> Proposal:
        """The same with the calibrated range of the layer's input, where the options ask for it."""
        if self.inputs not in ("auto", "static"):
            return proposal
        activation = static_inputs(spec, INT8, stats)
        if activation is None:
            return proposal
        return dataclasses.replace(proposal, activation=activation, needs=proposal.needs - {"ranges"})

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether ``quantize`` can produce it: the same codes and zero points, in any scale dtype and granularity."""
        if unsuitable(spec) is not None:
            return False
        blocks = [channel_block(spec), per_tensor(len(spec.shape)), group_block(spec, max(1, *encoding.block))]
        return (
            encoding.element == self.element
            and encoding.zero_point == (None if self.options.symmetric else self.element)
            and encoding.offset is None
            and encoding.scale in SCALES
            and encoding.block in blocks
            and not (encoding.tensor_wide and self.options.rounding == "search")
        )

    def fingerprint(self) -> str:
        """Nothing beside its options decides what it gives."""
        return ""

    def process_bytes(self, spec: TensorSpec, encoding: Encoding) -> int:
        """What numba takes where it is used."""
        return NUMBA_BYTES if self._worth_compiling(spec, encoding) and accelerator() == "numba" else 0

    def notes(self, tensors: Sequence[tuple[TensorSpec, Encoding]]) -> Sequence[str]:
        """What the searches run with, where they take time."""
        if not any(self._worth_compiling(spec, encoding) for spec, encoding in tensors):
            return ()
        if accelerator() == "numba":
            return ("on the CPU, the searches for integer scales run in numba",)
        return (
            "on the CPU, the searches for integer scales run in torch: with numba (pip install 'monoquant[fast]') they "
            "take a fraction of the time and give the same bytes",
        )

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize a chunk of whole blocks.

        A block of zeros has scale 1. Zeros are exact. With ``nearest`` nothing is clipped.

        :raises QuantizationError: for NaN and infinity, and for a scale that its dtype cannot hold.
        """
        encoding = self._clipped(encoding)
        return _kernel()(rows, encoding, context, search=self._searches(encoding.tensor_wide, encoding.codes_range))

    def _clipped(self, encoding: Encoding) -> Encoding:
        """With the codes that the options allow: a format that asks for its own encoding knows of no clip."""
        if self.clip is None or encoding.clip is not None:
            return encoding
        return dataclasses.replace(encoding, clip=self.clip)

    def _worth_compiling(self, spec: TensorSpec, encoding: Encoding) -> bool:
        used = self._clipped(encoding).codes_range
        return spec.numel >= WORTH_COMPILING and self._searches(encoding.tensor_wide, used)

    def _searches(self, tensor_wide: bool, codes: tuple[int, int] | None = None) -> bool:
        """Whether the scale is searched for; ``codes`` are those that are used, which a format may confine."""
        if self.options.rounding == "auto":
            bits = self.bits if codes is None else (codes[1] - codes[0]).bit_length()
            return bits < 8 and not tensor_wide
        return self.options.rounding == "search"


@functools.cache
def _kernel() -> Callable[..., QuantizedTensor]:
    """Imported with the first chunk, because it imports torch; once, because that takes a microsecond."""
    from monoquant_int.kernels import quantize

    return quantize


def w8a8(options: W8A8Options) -> IntQuantizer:
    """8-bit weights whose layers quantize their inputs, too."""
    weights = IntOptions(
        granularity="channel" if options.granularity == "auto" else options.granularity,
        rounding=options.rounding,
        narrow_range=options.narrow_range,
    )
    return IntQuantizer(8, weights, inputs=options.activations)


int2, int3, int4, int5, int6, int7, int8 = (functools.partial(IntQuantizer, bits) for bits in range(2, 9))

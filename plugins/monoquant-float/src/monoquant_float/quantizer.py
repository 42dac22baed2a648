"""Float schemes: which encoding a tensor gets. Imports torch only to quantize."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from monoquant_core.declarations import NoOptions
from monoquant_core.encoding import FLOAT8_E4M3FN, Encoding, per_tensor
from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context, Proposal, Refusal, channel_block, dynamic_inputs, static_inputs, unsuitable
from monoquant_float.plugin import Fp8Options

if TYPE_CHECKING:
    import torch

    from monoquant_core.stats import TensorStats
    from monoquant_core.tensor import QuantizedTensor

SCALES = ("float32", "float16", "bfloat16")  #: dtypes a scale can be asked for in


class Fp8Quantizer:
    """float8_e4m3fn (OCP 8-bit floating point specification v1.0) with a scale per output channel or tensor."""

    keeps_zero = True
    idempotent = True
    nearest = True

    def __init__(self, options: Fp8Options) -> None:
        self.options = options

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The encoding for a tensor, or why there is none."""
        refusal = unsuitable(spec)
        if refusal is not None:
            return refusal
        block, needs = channel_block(spec), frozenset[str]()
        if self.options.granularity == "tensor":
            block, needs = per_tensor(len(spec.shape)), frozenset({"absmax"})
        activation = dynamic_inputs(spec, FLOAT8_E4M3FN) if self.options.activations != "none" else None
        if self.options.activations == "static" and activation is not None:
            activation, needs = None, needs | {"ranges"}
        return Proposal(Encoding(FLOAT8_E4M3FN, block, "float32"), activation, needs=needs)

    def with_ranges(self, spec: TensorSpec, proposal: Proposal, stats: TensorStats) -> Proposal:
        """The same with the calibrated range of the layer's input, where the options ask for it."""
        if self.options.activations not in ("auto", "static"):
            return proposal
        activation = static_inputs(spec, FLOAT8_E4M3FN, stats)
        if activation is None:
            return proposal
        return dataclasses.replace(proposal, activation=activation, needs=proposal.needs - {"ranges"})

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether ``quantize`` can produce it: the same codes, in any scale dtype and granularity."""
        return (
            unsuitable(spec) is None
            and encoding.element == FLOAT8_E4M3FN
            and encoding.offset is None
            and encoding.scale in SCALES
            and encoding.block in (channel_block(spec), per_tensor(len(spec.shape)))
        )

    def fingerprint(self) -> str:
        """Nothing beside its options decides what it gives."""
        return ""

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize a chunk of whole blocks. A block of zeros has scale 1.

        :raises QuantizationError: for NaN and infinity, and for a scale that its dtype cannot hold.
        """
        from monoquant_float import kernels

        return kernels.quantize(rows, encoding, context)


class Cast:
    """A float dtype for every float tensor. The engine casts, and refuses finite values that would become infinite."""

    keeps_zero = True
    idempotent = True
    nearest = True

    def __init__(self, dtype: str, options: NoOptions) -> None:
        self.dtype = dtype

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The dtype, for floats."""
        return Proposal(self.dtype) if spec.is_float else Refusal(f"{spec.dtype} values are not floats to be cast")

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """No encoding: a cast quantizes nothing."""
        return False

    def fingerprint(self) -> str:
        """Nothing beside its options decides what it gives."""
        return ""

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Never called for a cast, which has no encoding.

        :raises QuantizationError: always.
        """
        raise QuantizationError(f"{context.spec.name}: {self.dtype} is a cast and cannot make {encoding}")


float16, bfloat16 = (functools.partial(Cast, dtype) for dtype in ("float16", "bfloat16"))

"""Schemes: one for each type of ggml that quantizes. Imports torch only to quantize."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

from monoquant_core.encoding import Encoding
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context, Proposal, Refusal, unsuitable
from monoquant_gguf.layouts import QUANTIZED, by_name
from monoquant_gguf.plugin import TypeOptions

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor

#: types that have a code for zero whatever the block's parameters are
KEEPS_ZERO = frozenset({"Q8_0", "Q4_0", "Q5_0", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"})

#: types whose scale settles the codes, so that each is the nearest; others leave the codes of a search where it is zero
NEAREST = frozenset({"Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})


class GgmlQuantizer:
    """Blocks of one type of ggml, along the last axis."""

    idempotent = False  #: the largest code need not be in use again, and a search may find another scale

    def __init__(self, name: str, options: TypeOptions) -> None:
        self.layout, self.rounding = by_name(name), options.rounding
        self.keeps_zero = name in KEEPS_ZERO
        self.nearest = name in NEAREST

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The type's encoding, or why there is none."""
        refusal = unsuitable(spec)
        if refusal is not None:
            return refusal
        row, size = spec.shape[-1], self.layout.block_size
        if row % size:
            fitting = [other.name for other in QUANTIZED if row % other.block_size == 0]
            hint = f"types that fit rows of {row}: {', '.join(fitting)}" if fitting else "store it as a float"
            return Refusal(f"blocks of {size} do not divide its rows of {row}", hint=hint)
        return Proposal(self.layout.encoding_for(len(spec.shape)), layout=self.layout.name)

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether it is this type's encoding, and fits."""
        fits = unsuitable(spec) is None and spec.shape[-1] % self.layout.block_size == 0
        return fits and len(encoding.block) == len(spec.shape) and self.layout.holds(encoding)

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize whole rows.

        :raises QuantizationError: for NaN and infinity, and for values beyond what the type's float16 scales hold.
        """
        from monoquant_gguf.kernels import run

        return run.quantize(self.layout, rows, encoding, context, search=self.rounding == "search")


def accelerator() -> str:
    """What the searches run with: ``numba`` where it is installed, else ``torch``."""
    return "numba" if importlib.util.find_spec("numba") is not None else "torch"


Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4 = (
    functools.partial(GgmlQuantizer, name)
    for name in (
        *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
    )
)

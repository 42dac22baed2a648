"""Schemes: one for each type of ggml that quantizes. Imports torch only to quantize."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monoquant_core.compiling import NUMBA_BYTES, accelerator
from monoquant_core.encoding import Encoding
from monoquant_core.model import TensorSpec
from monoquant_core.plugins import Registry
from monoquant_core.schemes import Context, Proposal, Refusal, unsuitable
from monoquant_gguf import imatrix
from monoquant_gguf.layouts import by_name
from monoquant_gguf.plugin import TypeOptions
from monoquant_gguf.roles import targets_of

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor

#: types that have a code for zero whatever the block's parameters are
KEEPS_ZERO = frozenset({"Q8_0", "Q4_0", "Q5_0", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"})

#: types whose codes are the nearest to the scale as it is stored; others are rounded to one that becomes a float16
NEAREST = frozenset({"MXFP4"})

#: types whose parameters are searched for, by numba where it is installed
SEARCHED = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})

#: types whose scales llama.cpp searches for, and those that the search of ours compiles
SEARCHED = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
REFIT = SEARCHED | {"Q8_0", "Q4_0", "Q5_0"}

#: what llama-quantize takes where a type's blocks do not divide the rows; F16 where these do not, either
FALLBACKS = {
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"},
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"},
}


class GgmlQuantizer:
    """Blocks of one type of ggml, along the last axis."""

    idempotent = False  #: the largest code need not be in use again, and a search may find another scale

    def __init__(self, name: str, options: TypeOptions) -> None:
        self.layout, self.options = by_name(name), options
        #: types that it may come to, the wanted one first
        self.layouts = [self.layout]
        if options.allow_fallback and name in FALLBACKS:
            self.layouts.append(by_name(FALLBACKS[name]))
        self.keeps_zero = all(layout.name in KEEPS_ZERO for layout in self.layouts)
        self.nearest = all(layout.name in NEAREST for layout in self.layouts)
        self._registry: Registry | None = None
        if options.imatrix:
            imatrix.load(options.imatrix)  # what is wrong with it is said in planning

    def use(self, registry: Registry) -> None:
        """Whose plugins bring architectures."""
        self._registry = registry

    def process_bytes(self, spec: TensorSpec, encoding: Encoding) -> int:
        """What numba takes where it is used."""
        compiled = REFIT if self.options.rounding == "search" else SEARCHED
        wanted = self.options.imatrix or not compiled.isdisjoint(layout.name for layout in self.layouts)
        return NUMBA_BYTES if wanted and accelerator() == "numba" else 0

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The type's encoding, or why there is none; where its blocks do not divide rows, an allowed fallback's."""
        refusal = unsuitable(spec)
        if refusal is not None:
            return refusal
        row, size = spec.shape[-1], self.layout.block_size
        for layout in self.layouts:
            if row % layout.block_size == 0:
                return Proposal(layout.encoding_for(len(spec.shape)), layout=layout.name)
        if self.options.allow_fallback:
            return Proposal("float16", layout="F16")
        fallback = by_name(FALLBACKS.get(self.layout.name, "F16"))
        if row % fallback.block_size:
            fallback = by_name("F16")
        encoding = "float16" if fallback.encoding is None else fallback.encoding_for(len(spec.shape))
        return Refusal(
            f"blocks of {size} do not divide its rows of {row}; llama-quantize falls back to {fallback.name}, "
            f"{fallback.bits_per_weight:g} bits per weight instead of {self.layout.bits_per_weight:g}",
            hint="--allow-fallback accepts those types",
            instead=Proposal(encoding, layout=fallback.name),
        )

    def notes(self, tensors: Sequence[tuple[TensorSpec, Encoding]]) -> Sequence[str]:
        """What the searches run with, where they take time."""
        if not any(layout.name in SEARCHED for layout in self.layouts):
            return ()
        if accelerator() == "numba":
            return ("on the CPU, the searches of ggml's types run in numba",)
        return (
            "on the CPU, the searches of ggml's types run in torch: with numba (pip install 'monoquant[gguf-fast]') "
            "they take a fraction of the time and give the same bytes",
        )

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether it is this type's encoding, and fits."""
        if unsuitable(spec) is not None or len(encoding.block) != len(spec.shape):
            return False
        return any(spec.shape[-1] % layout.block_size == 0 and layout.holds(encoding) for layout in self.layouts)

    def fingerprint(self) -> str:
        """The importance matrix, if there is one."""
        return imatrix.digest(self.options.imatrix) if self.options.imatrix else ""

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize whole rows.

        :raises QuantizationError: for NaN and infinity, and for values beyond what the type's float16 scales hold.
        """
        from monoquant_gguf.kernels import run

        layout = next((layout for layout in self.layouts if layout.holds(encoding)), self.layout)
        search, importance = self.options.rounding == "search", self._importance(rows.shape[-1], context)
        return run.quantize(layout, rows, encoding, context, search=search, importance=importance)

    def _importance(self, columns: int, context: Context) -> torch.Tensor | None:
        """Of the importance matrix, if there is one that has the tensor."""
        if not self.options.imatrix or context.importance is not None:
            return None
        found = imatrix.load(self.options.imatrix)
        names = targets_of(context.spec.name, self._registry)
        return next((v for v in (found.importance(name, columns) for name in names) if v is not None), None)


Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4 = (
    functools.partial(GgmlQuantizer, name)
    for name in (
        *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
    )
)

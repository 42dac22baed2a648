"""What monoquant-float registers."""

from __future__ import annotations

from dataclasses import dataclass

from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option


@dataclass(frozen=True)
class Fp8Options:
    """Options of ``fp8``."""

    granularity: str = option("channel", "What shares a scale.", choices=("channel", "tensor"))
    activations: str = option(
        "auto",
        "Inputs of layers: dynamic brings them to 8 bits per token at run time, static with one scale that calibration "
        "found, none leaves them; auto is static where there are statistics, else dynamic.",
        choices=("auto", "dynamic", "static", "none"),
    )


@hookimpl
def monoquant_register_schemes() -> list[SchemeDeclaration]:
    """``fp8``, ``float16`` and ``bfloat16``."""
    return [
        SchemeDeclaration(
            "fp8",
            "8-bit floats (e4m3fn), one scale per output channel; layer inputs to 8 bits at run time, or as calibrated",
            "monoquant_float.quantizer:Fp8Quantizer",
            Fp8Options,
            aliases=("f8", "float8_e4m3fn", "W8A8-FP8", "FP8-dynamic"),
        ),
        SchemeDeclaration(
            "float16",
            "A cast to IEEE half precision",
            "monoquant_float.quantizer:float16",
            aliases=("f16", "fp16", "half"),
        ),
        SchemeDeclaration("bfloat16", "A cast to bfloat16", "monoquant_float.quantizer:bfloat16", aliases=("bf16",)),
    ]

"""What monoquant-gguf registers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from monoquant_core.declarations import (
    ExporterDeclaration,
    RecipeDeclaration,
    RuntimeDeclaration,
    SchemeDeclaration,
    SourceDeclaration,
)
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option
from monoquant_gguf import hookspecs

MONOQUANT_HOOKSPECS = hookspecs

#: what each type is for, in the order of docs and listings
TYPES = {
    "Q8_0": "8 bits, one scale for 32 weights",
    "Q4_0": "4 bits, one scale for 32 weights",
    "Q4_1": "4 bits, scale and minimum for 32 weights",
    "Q5_0": "5 bits, one scale for 32 weights",
    "Q5_1": "5 bits, scale and minimum for 32 weights",
    "Q2_K": "2 bits, 4-bit scales and minima for 16 weights",
    "Q3_K": "3 bits, 6-bit scales for 16 weights",
    "Q4_K": "4 bits, 6-bit scales and minima for 32 weights",
    "Q5_K": "5 bits, 6-bit scales and minima for 32 weights",
    "Q6_K": "6 bits, 8-bit scales for 16 weights",
    "IQ4_NL": "4-bit codebook, one scale for 32 weights",
    "IQ4_XS": "4-bit codebook, 6-bit scales for 32 weights",
    "MXFP4": "4-bit floats, a power of two for 32 weights",
    "TQ1_0": "-1, 0 and 1 in 1.6 bits, one scale for 256 weights",
    "TQ2_0": "-1, 0 and 1 in 2 bits, one scale for 256 weights",
}

#: llama-quantize's mixtures; those that share their name with a type take its place, as in llama-quantize
MIXTURES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q4_0", "Q8_0")

ROUNDINGS = ("search", "llama.cpp")


@dataclass(frozen=True)
class TypeOptions:
    """Options of ggml's types."""

    rounding: str = option(
        "search",
        "search has a squared error that is never above llama.cpp's; llama.cpp writes the same bytes as it does.",
        choices=ROUNDINGS,
    )
    allow_fallback: bool = option(False, "Take a larger type where a type's blocks do not divide the rows.")
    imatrix: str = option("", "Importance matrix that llama-imatrix wrote: weighs the error of every column.")


@dataclass(frozen=True)
class MixtureOptions:
    """Options of llama-quantize's mixtures."""

    rounding: str = option(
        "search",
        "search has a squared error that is never above llama.cpp's; llama.cpp writes the same bytes as it does.",
        choices=ROUNDINGS,
    )
    allow_fallback: bool = option(False, "Take a larger type where a type's blocks do not divide the rows.")
    imatrix: str = option("", "Importance matrix that llama-imatrix wrote: weighs the error of every column.")


@hookimpl
def monoquant_register_schemes() -> Iterable[SchemeDeclaration]:
    """Every type of ggml that quantizes."""
    return [
        SchemeDeclaration(name, f"ggml {name}: {summary}", f"monoquant_gguf.quantizer:{name}", TypeOptions)
        for name, summary in TYPES.items()
    ]


@hookimpl
def monoquant_register_recipes() -> Iterable[RecipeDeclaration]:
    """llama-quantize's mixtures."""
    return [
        RecipeDeclaration(name, f"llama-quantize's {name}", f"monoquant_gguf.mixtures:{name}", MixtureOptions)
        for name in MIXTURES
    ]


@dataclass(frozen=True)
class GgufOptions:
    """Options of ``--format gguf``."""

    architecture: str = option(
        "auto",
        "What llama.cpp calls the model: auto asks config.json, generic writes every tensor under its own name.",
    )
    outtype: str = option(
        "auto",
        "Type of the matrices that nothing quantizes: auto is bf16 for a bfloat16 checkpoint, else f16.",
        choices=("auto", "f32", "f16", "bf16"),
    )
    tokenizer: str = option(
        "auto",
        "auto takes the one beside the weights; none writes the model without a vocabulary.",
        choices=("auto", "none"),
    )


@hookimpl
def monoquant_register_exporters() -> Iterable[ExporterDeclaration]:
    """The format."""
    return [
        ExporterDeclaration(
            "gguf",
            "GGUF v3 for llama.cpp",
            "monoquant_gguf.exporter:GgufExporter",
            GgufOptions,
            suffix=".gguf",
        )
    ]


@hookimpl
def monoquant_register_sources() -> Iterable[SourceDeclaration]:
    """The reader of finished files."""
    return [SourceDeclaration("gguf", "GGUF v2 and v3 files", "monoquant_gguf.source:GgufReader", suffixes=(".gguf",))]


@hookimpl
def monoquant_register_runtimes() -> Iterable[RuntimeDeclaration]:
    """What runs the files."""
    return [
        RuntimeDeclaration(
            "llama.cpp",
            "GGUF files in llama.cpp, through xllamacpp",
            "monoquant_gguf.runtime:LlamaCppRuntime",
            formats=("gguf",),
            distribution="xllamacpp",
        )
    ]

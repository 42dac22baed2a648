"""What monoquant-onnx registers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from monoquant_core.declarations import ExporterDeclaration, RecipeDeclaration, RuntimeDeclaration, SourceDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option

MAX_INLINE = (1 << 31) - (1 << 20)  #: bytes of a protobuf


@hookimpl
def monoquant_register_sources() -> Iterable[SourceDeclaration]:
    """The reader of graphs."""
    return [SourceDeclaration("onnx", "ONNX graphs", "monoquant_onnx.source:OnnxReader", suffixes=(".onnx",))]


@dataclass(frozen=True)
class OnnxOptions:
    """Options of ``--format onnx``."""

    graph: str = option("", "An .onnx file whose graph the weights go into, for sources that have none.")
    target: str = option(
        "auto",
        "Processor for static quantization; auto and x86 confine weights to 7 bits, which no processor overflows with.",
        choices=("auto", "x86", "vnni", "arm", "gpu"),
    )
    max_inline: int = option(MAX_INLINE, "Bytes above which the data go into a file beside the .onnx file.", minimum=0)


@hookimpl
def monoquant_register_exporters() -> Iterable[ExporterDeclaration]:
    """The format."""
    return [
        ExporterDeclaration(
            "onnx",
            "ONNX for onnxruntime",
            "monoquant_onnx.exporter:OnnxExporter",
            OnnxOptions,
            recipe="int8-embeddings",
            suffix=".onnx",
            needs="graph",
        )
    ]


@hookimpl
def monoquant_register_recipes() -> Iterable[RecipeDeclaration]:
    """What is quantized unless rules say otherwise."""
    return [
        RecipeDeclaration(
            "int8-embeddings", "the default rules, and embeddings as int8", "monoquant_onnx.recipe:OnnxRecipe"
        )
    ]


@hookimpl
def monoquant_register_runtimes() -> Iterable[RuntimeDeclaration]:
    """What runs the files."""
    return [
        RuntimeDeclaration(
            "onnxruntime",
            ".onnx files in onnxruntime",
            "monoquant_onnx.runtime:OnnxRuntime",
            formats=("onnx",),
            distribution="onnxruntime",
        )
    ]

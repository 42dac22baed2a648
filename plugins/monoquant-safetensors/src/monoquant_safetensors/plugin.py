"""What monoquant-safetensors registers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from monoquant_core.declarations import ExporterDeclaration, RecipeDeclaration, RuntimeDeclaration, SourceDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option


@dataclass(frozen=True)
class SafetensorsOptions:
    """Options of ``--format safetensors``."""

    convention: str = option(
        "auto",
        "compressed-tensors is what transformers, vLLM and SGLang load; generic holds every encoding and is read by "
        "monoquant only; auto takes the first for a transformers model folder.",
        choices=("auto", "compressed-tensors", "generic"),
    )
    max_shard_size: str = option(
        "5GB",
        "Largest file of tensors before the next one begins: 5GB, 900MB, 2GiB. OUT with the suffix .safetensors is one "
        "file.",
    )


@hookimpl
def monoquant_register_exporters() -> Iterable[ExporterDeclaration]:
    """The format."""
    summary = "safetensors: a compressed-tensors folder for transformers and vLLM, or generic tensors"
    return [
        ExporterDeclaration(
            "safetensors", summary, "monoquant_safetensors.exporter:SafetensorsExporter", SafetensorsOptions
        )
    ]


@hookimpl
def monoquant_register_recipes() -> Iterable[RecipeDeclaration]:
    """The default recipe of compressed-tensors folders."""
    summary = "the default recipe, for Linear layers only: what compressed-tensors holds"
    return [RecipeDeclaration("linear", summary, "monoquant_safetensors.recipe:LinearRecipe")]


@hookimpl
def monoquant_register_sources() -> Iterable[SourceDeclaration]:
    """Readers of both conventions."""
    return [
        SourceDeclaration(
            "compressed-tensors",
            "folders that compressed-tensors, llm-compressor or monoquant wrote",
            "monoquant_safetensors.source:CompressedTensorsReader",
            suffixes=("/",),
        ),
        SourceDeclaration(
            "generic-safetensors",
            "safetensors files and folders that monoquant wrote with --convention generic",
            "monoquant_safetensors.source:GenericReader",
            suffixes=("/", ".safetensors"),
        ),
    ]


@hookimpl
def monoquant_register_runtimes() -> Iterable[RuntimeDeclaration]:
    """What reads the folders."""
    return [
        RuntimeDeclaration(
            "transformers",
            "compressed-tensors folders in transformers",
            "monoquant_safetensors.runtime:TransformersRuntime",
            formats=("safetensors",),
            distribution="transformers",
        )
    ]

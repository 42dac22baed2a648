"""Both conventions against the conformance kit."""

from __future__ import annotations

from pathlib import Path

import pytest
from monoquant_safetensors import plugin
from monoquant_safetensors.exporter import SafetensorsExporter
from monoquant_safetensors.plugin import SafetensorsOptions

from monoquant_core.declarations import SourceDeclaration
from monoquant_core.model import ModelInfo
from monoquant_core.plugins import load_registry
from monoquant_core.rows import all_rows
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.testing import ExporterConformance, PluginConformance

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def read_floats(path: Path):
    """A finished file dequantized, as monoquant reads it back."""
    source = open_source(path, load_registry((plugin,), found=()))
    try:
        read = {s.name: source.read(s.name, all_rows(s.shape)) for s in source.specs()}
        return {n: t.dequantize() if isinstance(t, QuantizedTensor) else t.clone() for n, t in read.items()}
    finally:
        source.close()


class TestPlugin(PluginConformance):
    plugin = "safetensors"


class TestCompressedTensors(ExporterConformance):
    @pytest.fixture
    def exporter(self):
        return SafetensorsExporter(SafetensorsOptions())

    @pytest.fixture
    def info(self):
        return ModelInfo("sample", CONFIG)

    def read_back(self, path):
        return read_floats(path)


class TestGenericFile(ExporterConformance):
    suffix = ".safetensors"

    @pytest.fixture
    def exporter(self):
        return SafetensorsExporter(SafetensorsOptions(convention="generic"))

    def read_back(self, path):
        return read_floats(path)


class TestGenericFolder(TestGenericFile):
    suffix = ""

    @pytest.fixture
    def exporter(self):
        return SafetensorsExporter(SafetensorsOptions(convention="generic", max_shard_size="20KB"))


def test_sources_are_declared():
    registry = load_registry((plugin,), found=())
    assert all(isinstance(d, SourceDeclaration) for d in registry.sources.values())
    assert set(registry.sources) == {"compressed-tensors", "generic-safetensors"}

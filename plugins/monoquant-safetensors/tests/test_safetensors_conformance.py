"""Both conventions against the conformance kit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monoquant_safetensors import plugin
from monoquant_safetensors.exporter import SafetensorsExporter
from monoquant_safetensors.plugin import SafetensorsOptions
from safetensors.torch import load_file

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


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """A finished folder as compressed-tensors itself decodes it, module by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    schemes = [QuantizationScheme.model_validate(group) for group in config.get("config_groups", {}).values()]
    for module in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        scheme = next(s for s in schemes if module in s.targets or s.targets == ["Linear"])
        stored = {n: tensors.pop(n) for n in list(tensors) if n.startswith(f"{module}.")}
        state = {n.removeprefix(f"{module}."): t for n, t in stored.items()}
        if state["weight_scale"].dtype in (torch.float16, torch.bfloat16):
            state["weight_scale"] = state["weight_scale"].float()  # as a model in float32 does when it is loaded
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        tensors[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    return tensors


class TestPlugin(PluginConformance):
    plugin = "safetensors"


class TestAuto(ExporterConformance):
    """The convention that suits the model: some samples make a compressed-tensors folder, others a generic one."""

    @pytest.fixture
    def exporter(self):
        return SafetensorsExporter(SafetensorsOptions())

    @pytest.fixture
    def info(self):
        return ModelInfo("sample", CONFIG)

    def read_back(self, path):
        return read_floats(path)


class TestCompressedTensors(TestAuto):
    @pytest.fixture
    def exporter(self):
        return SafetensorsExporter(SafetensorsOptions(convention="compressed-tensors"))

    def read_back(self, path):
        """As the format's own library decodes it, which is what monoquant reads too."""
        theirs, ours = decompressed(path), read_floats(path)
        assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}
        assert all(torch.equal(theirs[name].float(), ours[name].float()) for name in ours)
        return theirs


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

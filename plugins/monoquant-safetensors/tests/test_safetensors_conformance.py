"""Both conventions against the conformance kit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monoquant_safetensors import plugin
from monoquant_safetensors.exporter import SafetensorsExporter
from monoquant_safetensors.plugin import SafetensorsOptions
from safetensors.torch import load_file

from monoquant_core.declarations import SourceDeclaration
from monoquant_core.encoding import Encoding, integer
from monoquant_core.exporters import Holds
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import load_registry
from monoquant_core.rows import all_rows, quantum
from monoquant_core.schemes import Proposal
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.testing import ExporterConformance, PluginConformance
from monoquant_core.testing.samples import ENCODINGS, quantized, take_rows

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


@settings(max_examples=80, deadline=None)
@given(
    convention=st.sampled_from(["generic", "compressed-tensors"]),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 70), st.sampled_from([64, 96, 128, 160, 33])),
    cut=st.integers(1, 69),
    seed=st.integers(0, 99),
)
def test_pieces_fill_the_places_of_the_whole(convention, encoding, bits, symmetric, shape, cut, seed):
    """Packed in two chunks, the bytes are those of packing at once, and each chunk unpacks to itself."""
    spec = TensorSpec("a.weight", shape, "float32", kind="linear")
    exporter = SafetensorsExporter(SafetensorsOptions(convention)).resolve([spec], ModelInfo("sample", CONFIG))
    chosen = ENCODINGS[encoding]
    if convention == "compressed-tensors":  # whose encodings are a few; all widths of them
        element = integer(bits, signed=symmetric)
        chosen = Encoding(element, (1, 32), "float32", zero_point=None if symmetric else element)
    (out,) = exporter.outputs([spec], ModelInfo("sample"))
    held = exporter.verdict(out, Proposal(chosen))
    assume(isinstance(held, Holds))
    whole = quantized(chosen, shape, seed)
    parts = exporter.parts(out, held)
    step = math.lcm(quantum(shape, chosen, tensor_wide=True), *(p.rows for p in parts if p.per == "rows"))
    at = min(cut // step * step, shape[0])
    assume(0 < at < shape[0])
    expected = exporter.pack(whole, out, held, 0)
    assert exporter.unpack(expected, out, held, 0).equal(whole)
    for rows in (range(at), range(at, shape[0])):
        chunk = take_rows(whole, rows)
        packed = dict(exporter.pack(chunk, out, held, rows.start))
        assert exporter.unpack(packed, out, held, rows.start).equal(chunk)
        for part in parts:
            first, nbytes = part.span(shape[0], rows)
            data = expected[part.name].reshape(-1).view(torch.uint8)[first : first + nbytes]
            assert torch.equal(packed[part.name].reshape(-1).view(torch.uint8), data), part.name


def test_sources_are_declared():
    registry = load_registry((plugin,), found=())
    assert all(isinstance(d, SourceDeclaration) for d in registry.sources.values())
    assert set(registry.sources) == {"compressed-tensors", "generic-safetensors"}

"""Files that others wrote, as sources; and the format against the conformance kit."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from monoquant_gguf.exporter import GgufExporter
from monoquant_gguf.layouts import QUANTIZED, Layout
from monoquant_gguf.plugin import GgufOptions
from monoquant_gguf.source import GgufSource

import monoquant_core as mq
from monoquant_core.errors import MonoquantError, SourceError
from monoquant_core.rows import all_rows
from monoquant_core.sources import open_source
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.testing import ExporterConformance, PluginConformance

gguf = pytest.importorskip("gguf")


def write(path: Path, tensors: Mapping[str, tuple[np.ndarray, int | None]]) -> Path:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if kind is None else gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> GgufSource:
    """Opened by the plugin."""
    source = open_source(path, mq.load_registry())
    assert isinstance(source, GgufSource)
    return source


class TestPlugin(PluginConformance):
    plugin = "gguf"


class TestGeneric(ExporterConformance):
    suffix = ".gguf"

    @pytest.fixture
    def exporter(self) -> GgufExporter:
        return GgufExporter(GgufOptions(architecture="generic"))

    def read_back(self, path: Path) -> dict[str, torch.Tensor]:
        found = {}
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if tensor.tensor_type.name == "BF16":
                bits = tensor.data.view(np.uint16).reshape(shape).astype(np.int16)
                found[tensor.name] = torch.from_numpy(bits).view(torch.bfloat16)
            elif tensor.tensor_type.name in ("F16", "F32", "F64", "I8", "I16", "I32", "I64"):
                found[tensor.name] = torch.from_numpy(np.array(tensor.data)).reshape(shape)
            else:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                found[tensor.name] = torch.from_numpy(np.array(values)).reshape(shape)
        return found


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
def test_every_type_dequantizes_as_in_c(layout: Layout, tmp_path: Path, llamacpp: ModuleType) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (6, 512)).astype(np.float32)
    values[2] = 0
    raw = np.frombuffer(llamacpp.quantize(values, layout.name), np.uint8).reshape(6, -1)
    source = load(write(tmp_path / "x.gguf", {"w": (raw, layout.ggml_type)}))
    (spec,) = source.specs()
    assert (spec.shape, spec.dtype, spec.encoding) == ((6, 512), "float32", layout.encoding_for(2))
    assert spec.nbytes == raw.nbytes
    expected = llamacpp.dequantize(raw.tobytes(), layout.name, values.size).reshape(values.shape)
    for rows in (all_rows(spec.shape), range(0, 1), range(2, 5)):
        chunk = source.read("w", rows)
        assert isinstance(chunk, QuantizedTensor)
        assert np.array_equal(chunk.dequantize().numpy(), expected[rows.start : rows.stop])


def test_a_stack_of_experts_is_read_in_chunks(tmp_path: Path, llamacpp: ModuleType) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (3, 4, 64)).astype(np.float32)
    raw = np.frombuffer(llamacpp.quantize(values.reshape(12, 64), "Q8_0"), np.uint8).reshape(3, 4, -1)
    source = load(write(tmp_path / "x.gguf", {"blk.0.ffn_up_exps.weight": (raw, 8)}))
    (spec,) = source.specs()
    assert (spec.shape, spec.kind) == ((3, 4, 64), "experts")
    expected = llamacpp.dequantize(raw.tobytes(), "Q8_0", values.size).reshape(values.shape)
    for rows, index in ((range(12), slice(None)), (range(4, 8), slice(1, 2))):
        chunk = source.read(spec.name, rows)
        assert isinstance(chunk, QuantizedTensor)
        assert np.array_equal(chunk.dequantize().numpy(), expected[index])


def test_kinds_and_fuse_groups_follow_the_names_of_llama_cpp(tmp_path: Path) -> None:
    names = {
        "token_embd.weight": ("embedding", None),
        "output.weight": ("head", None),
        "blk.0.attn_q.weight": ("linear", "blk.0.qkv"),
        "blk.0.ffn_up.weight": ("linear", "blk.0.gate_up"),
        "blk.0.ffn_down.weight": ("linear", None),
        "blk.0.ffn_gate_inp.weight": ("router", None),
        "blk.0.attn_norm.weight": ("norm", None),
    }
    matrix, vector = np.ones((4, 32), np.float32), np.ones(32, np.float32)
    path = write(tmp_path / "x.gguf", {n: (vector if k == "norm" else matrix, None) for n, (k, _) in names.items()})
    assert {s.name: (s.kind, s.fuse) for s in load(path).specs()} == names


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
def test_a_scale_that_is_not_finite_is_refused(bits: int, tmp_path: Path) -> None:
    raw = np.zeros((2, 34), np.uint8)
    raw[1, :2] = np.frombuffer(struct.pack("<H", bits), np.uint8)
    path = write(tmp_path / "x.gguf", {"w": (raw, 8)})
    with pytest.raises(SourceError, match=r"x.gguf: tensor 'w': a scale of it is not finite"):
        load(path).read("w", range(2))
    with pytest.raises(MonoquantError, match="'w'"):
        mq.export(path, tmp_path / "y.gguf", "gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def test_a_file_that_changes_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"w": (np.ones((4, 32), np.float32), None)})
    source = load(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(SourceError, match=r"x.gguf: tensor 'w'"):
        source.read("w", range(4))


def test_a_file_without_tensors_and_one_that_is_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no tensors"):
        load(write(tmp_path / "x.gguf", {}))
    (tmp_path / "y.gguf").write_bytes(b"not a GGUF file, but long enough")
    with pytest.raises(SourceError, match=r"y.gguf: not a GGUF file"):
        load(tmp_path / "y.gguf")
    with pytest.raises(SourceError, match="there is none of this name"):
        load(write(tmp_path / "z.gguf", {"w": (np.ones(4, np.float32), None)})).read("v", range(1))


def test_a_gguf_file_goes_into_safetensors_with_its_codes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (4, 64)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    tensors = {k.name: (gguf.quants.quantize(values, k), int(k)) for k in (kinds.Q4_0, kinds.Q8_0, kinds.Q4_1)}
    path = write(tmp_path / "x.gguf", tensors)
    mq.export(path, tmp_path / "y.safetensors", "safetensors", format_options={"convention": "generic"})
    before, after = load(path), open_source(tmp_path / "y.safetensors", mq.load_registry())
    for spec in after.specs():
        a, b = before.read(spec.name, range(4)), after.read(spec.name, range(4))
        assert isinstance(a, QuantizedTensor)
        assert isinstance(b, QuantizedTensor)
        assert a.equal(b)


def test_the_command_line_compares_and_refuses_in_one_line(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(0, 0.1, (4, 64)).astype(np.float32)
    path = write(tmp_path / "x.gguf", {"w": (matrix, None)})
    other = write(tmp_path / "y.gguf", {"w": (gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), 8)})
    run = [sys.executable, "-m", "monoquant_core.cli"]
    done = subprocess.run([*run, "compare", str(path), str(other)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dB" in done.stdout
    path.write_bytes(path.read_bytes()[:-100])
    done = subprocess.run([*run, "inspect", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "x.gguf" in done.stderr.splitlines()[0]

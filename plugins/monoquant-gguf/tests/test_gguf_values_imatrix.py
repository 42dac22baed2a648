"""Importance matrices of llama.cpp, in both forms, and what comes of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from monoquant_gguf import blocks
from monoquant_gguf.imatrix import importance, load
from monoquant_gguf.layouts import by_name
from monoquant_gguf.mixtures import Mixture
from monoquant_gguf.plugin import MixtureOptions, TypeOptions
from monoquant_gguf.quantizer import GgmlQuantizer

from monoquant_core.errors import CalibrationError, PlanError, SourceError
from monoquant_core.kinds import annotate
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch

WIDTH = 256
Array = np.ndarray[Any, np.dtype[np.float32]]


def means(*names: str, matrices: int = 1) -> dict[str, Array]:
    random = np.random.default_rng(4)
    return {name: random.random((matrices, WIDTH)).astype(np.float32) for name in names}


def plain(path: Path, entries: Mapping[str, Array], calls: int = 4) -> Path:
    """As llama-imatrix wrote it until 2025: means times calls."""
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw = name.encode()
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size)
        data += (values * np.float32(calls)).tobytes()
    path.write_bytes(data + struct.pack("<ii", 7, 4) + b"wiki")
    return path


def as_gguf(path: Path, entries: Mapping[str, Array], counts: float = 8, kind: str = "imatrix") -> Path:
    """As it writes it since: sums of squares, and counts."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values * np.float32(counts))
        writer.add_tensor(f"{name}.counts", np.full((len(values), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"


def model(*, experts: int = 0) -> tuple[ModelInfo, list[TensorSpec]]:
    info = ModelInfo("model", {"model_type": "mixtral" if experts else "llama", "num_hidden_layers": 1})
    names = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    names += [f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(experts)]
    names += [] if experts else ["model.layers.0.mlp.down_proj.weight"]
    return info, annotate(
        [TensorSpec(name, (WIDTH,) if "norm" in name else (16, WIDTH), "float32") for name in names], info
    )


@pytest.mark.parametrize("form", [plain, as_gguf])
def test_both_forms(form: Any, tmp_path: Path) -> None:
    expected = means(Q, DOWN)
    found = load(form(tmp_path / "imatrix.dat", expected))
    assert set(found.entries) == {Q, DOWN}
    for name, values in expected.items():
        read = found.importance(name, WIDTH)
        assert read is not None
        np.testing.assert_array_equal(read.numpy(), values)
    assert found.importance("blk.1.attn_q.weight", WIDTH) is None
    by_source = importance(found, *model())
    assert set(by_source) == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    np.testing.assert_array_equal(by_source["model.layers.0.mlp.down_proj.weight"].numpy(), expected[DOWN][0])


@pytest.mark.parametrize("form", [plain, as_gguf])
def test_experts(form: Any, tmp_path: Path) -> None:
    expected = means("blk.0.ffn_down_exps.weight", matrices=3)
    found = importance(load(form(tmp_path / "i", expected)), *model(experts=3))
    for expert in range(3):
        read = found[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
        np.testing.assert_array_equal(read.numpy(), next(iter(expected.values()))[expert])
    with pytest.raises(CalibrationError, match="3 experts, the model has 2"):
        importance(load(tmp_path / "i"), *model(experts=2))


def test_what_got_no_input_is_not_weighted(tmp_path: Path) -> None:
    read = load(as_gguf(tmp_path / "i", means(Q), counts=0)).importance(Q, WIDTH)
    assert read is not None
    assert bool((read == 1).all())


def test_another_model(tmp_path: Path) -> None:
    found = load(plain(tmp_path / "i", means("blk.7.attn_q.weight")))
    with pytest.raises(CalibrationError, match="none of its 1 tensors is in model"):
        importance(found, *model())
    with pytest.raises(CalibrationError, match="256 values for 100 columns"):
        found.importance("blk.7.attn_q.weight", 100)
    with pytest.raises(PlanError, match="none of its 1 tensors is in model"):
        Mixture("Q4_K_M", MixtureOptions(imatrix=str(tmp_path / "i"))).rules(*model())


def test_impossible_values(tmp_path: Path) -> None:
    for value in (-1.0, np.nan, np.inf):
        values = means(Q)
        values[Q][0, 3] = value
        with pytest.raises(CalibrationError, match="negative or not finite"):
            load(plain(tmp_path / f"i{value}", values)).importance(Q, WIDTH)


def test_hostile_files(tmp_path: Path) -> None:
    whole = plain(tmp_path / "whole", means(Q)).read_bytes()
    name_at = 8 + len(Q)
    cases = {
        "empty": (b"", "ends where a count of entries should be"),
        "none": (struct.pack("<i", 0) + whole[4:], "a count of entries of 0"),
        "many": (struct.pack("<i", 1 << 30) + whole[4:], "a count of entries of 1073741824"),
        "negative": (struct.pack("<i", -1) + whole[4:], "a count of entries of -1"),
        "long name": (whole[:4] + struct.pack("<i", 1 << 30) + whole[8:], "a name's length of 1073741824"),
        "not a name": (whole[:8] + b"\xff" * len(Q) + whole[name_at:], "not UTF-8"),
        "values": (whole[: name_at + 4] + struct.pack("<i", 1 << 30) + whole[name_at + 8 :], "a count of values of"),
        "cut": (whole[:200], "a count of values of 256"),
        "twice": (struct.pack("<i", 2) + whole[4:-12] + whole[4:], "occurs twice"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(SourceError, match=message):
            load(path)
    with pytest.raises(SourceError, match="a GGUF file of type 'model', not imatrix"):
        load(as_gguf(tmp_path / "model", means(Q), kind="model"))
    with pytest.raises(SourceError, match="without entries"):
        load(as_gguf(tmp_path / "nothing", {}))
    with pytest.raises(SourceError, match="cannot be opened"):
        GgmlQuantizer("Q4_K", TypeOptions(imatrix=str(tmp_path / "missing")))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_0", "IQ4_NL"])
def test_bytes_are_those_of_llama_cpp(name: str, tmp_path: Path, llamacpp: ModuleType) -> None:
    """By the source's name, by llama.cpp's, and for each expert of a stack, however it is cut."""
    layout = by_name(name)
    expected = means(Q, DOWN) | means("blk.0.ffn_down_exps.weight", matrices=3)
    path = as_gguf(tmp_path / "imatrix.gguf", expected)
    quantizer = GgmlQuantizer(name, TypeOptions(rounding="llama.cpp", imatrix=str(path)))
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, (12, WIDTH)).astype(np.float32))
    for spelled in ("model.layers.0.self_attn.q_proj.weight", Q):
        context = Context(TensorSpec(spelled, (12, WIDTH), "float32"), range(12), Scratch())
        raw = blocks.pack(quantizer.quantize(x, layout.encoding_for(2), context), layout)
        assert raw.numpy().tobytes() == llamacpp.quantize(x.numpy(), name, expected[Q][0])
    stack = expected["blk.0.ffn_down_exps.weight"]
    wanted = b"".join(llamacpp.quantize(x[4 * e : 4 * e + 4].numpy(), name, stack[e]) for e in range(3))
    spec = TensorSpec("blk.0.ffn_down_exps.weight", (3, 4, WIDTH), "float32")
    for cuts in ([range(12)], [range(4), range(4, 12)], [range(2), range(2, 4), range(4, 8), range(8, 12)]):
        raw_bytes = b""
        for rows in cuts:
            chunk = x[rows.start : rows.stop].reshape(-1, min(4, len(rows)), WIDTH)
            tensor = quantizer.quantize(chunk, layout.encoding_for(3), Context(spec, rows, Scratch()))
            raw_bytes += blocks.pack(tensor, layout).numpy().tobytes()
        assert raw_bytes == wanted

"""The engine with the standard schemes and the safetensors format, on a model made here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import monoquant_core as mq
from monoquant_core.engine import RunOptions, compute, write
from monoquant_core.errors import CheckError, QuantizationError
from monoquant_core.rows import chunks, quantum
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor, same_bits

for plugin in ("monoquant_int", "monoquant_float", "monoquant_safetensors"):
    pytest.importorskip(plugin)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int8", {"granularity": "tensor"}),
    ("int8", {"symmetric": False}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 32, "rounding": "nearest"}),
    ("int4", {"group_size": 32, "symmetric": False}),
    ("int3", {"group_size": 64}),
    ("w8a8", {}),
    ("fp8", {}),
    ("fp8", {"activations": "none"}),
    ("float16", {}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_model(folder: Path, dtype: torch.dtype = torch.bfloat16, factor: float = 0.02) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(96, 64, generator=generator),
        "model.norm.weight": torch.ones(64),
    }
    for i in range(2):
        for name, shape in (("q_proj", (64, 64)), ("k_proj", (32, 64)), ("v_proj", (32, 64))):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(72, 192, generator=generator)
    tensors = {k: (v * factor).to(dtype) for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def content(path: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_threads_and_chunks_never_change_a_byte(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    source = make_model(tmp_path / "model")
    found = []
    with mq.quantize(source, scheme=scheme, options=options) as model:
        for number, run in enumerate((RunOptions(1), RunOptions(3, 700), RunOptions(2, 5000), RunOptions(4, 1))):
            plan = model.plan("safetensors", destination="out")
            report = write(plan, model.source, tmp_path / f"out{number}", run)
            found.append(content(tmp_path / f"out{number}"))
            assert report.nbytes == plan.bytes_after == sum(map(len, found[-1].values()))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_a_finished_folder_reads_back_what_was_computed(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    """Row by row too, wherever the rows begin."""
    source = make_model(tmp_path / "model")
    with mq.quantize(source, scheme=scheme, options=options) as model:
        model.save(tmp_path / "out")
        plan = model.plan("safetensors", destination="out")
        wanted = {s.placed.output.name: compute(s, model.source) for s in plan.steps}
    finished = mq.open_source(tmp_path / "out")
    for spec in finished.specs():
        if spec.tied_to is not None:
            continue
        value = wanted[spec.name]
        for elements in (10**9, 777, 200):
            pieces = [
                finished.read(spec.name, rows, Scratch())
                for rows in chunks(spec.shape, quantum(spec.shape, spec.encoding, tensor_wide=True), elements)
            ]
            if isinstance(value, QuantizedTensor):
                assert torch.equal(torch.cat([p.dequantize() for p in pieces]), value.dequantize())
            else:
                assert same_bits(torch.cat(pieces), value)
    finished.close()


@pytest.mark.parametrize(("scheme", "options"), CASES[:-1])
def test_a_finished_folder_is_repacked_without_a_change(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    source = make_model(tmp_path / "model")
    with mq.quantize(source, scheme=scheme, options=options) as model:
        model.save(tmp_path / "once")
    report = mq.export(tmp_path / "once", tmp_path / "twice")
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    assert {t.action for t in report.tensors} <= {"keep", "repack"}
    assert "repack" in {t.action for t in report.tensors}
    assert report.sqnr_db == math.inf


def test_what_is_kept_is_kept_bit_for_bit(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    with mq.quantize(source, scheme="int8") as model:
        model.save(tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert same_bits(before[name], after[name])


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_a_nan_is_refused_by_every_scheme(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][70, 5] = math.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with (
        mq.quantize(source, scheme=scheme, options=options) as model,
        pytest.raises(QuantizationError, match=rf"{name}\[70, 5\] is nan"),
    ):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e-7, 1e6, 1e30])
@pytest.mark.parametrize(("scheme", "options"), CASES[:-1])
def test_every_magnitude_is_quantized_well_or_refused(
    tmp_path: Path, scheme: str, options: dict[str, Any], factor: float
) -> None:
    source = make_model(tmp_path / "model", torch.float32, factor)
    with mq.quantize(source, scheme=scheme, options=options) as model:
        refusal = None
        try:
            report = model.save(tmp_path / "out")
        except (CheckError, QuantizationError) as exc:
            refusal = exc
    if refusal is None:
        assert report.sqnr_db > (10 if factor > 1e-41 else 0)
    else:
        assert factor in (1e-41, 1e30)
        assert "--keep" in refusal.hint

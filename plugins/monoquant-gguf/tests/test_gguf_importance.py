"""Statistics of inputs, as calibration gives them: what they change, and that each expert of a stack has its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from monoquant_gguf.layouts import QUANTIZED

import monoquant_core as mq
from monoquant_core.stats import TensorStats
from monoquant_core.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")

#: schemes that search, and the recipe's options for them
SEARCHES = {layout.name: {} for layout in QUANTIZED if layout.name != "Q8_0"} | {"int4": {"group_size": 32}}


def stats(importance: torch.Tensor) -> TensorStats:
    return TensorStats(100, -importance.sqrt() * 3, importance.sqrt() * 3, importance)


def uneven(columns: int, seed: int = 0) -> torch.Tensor:
    """A few inputs that are a thousand times as strong as others."""
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 8 + 1e-3


@pytest.mark.parametrize("scheme", SEARCHES)
def test_importance_changes_the_codes_and_lowers_the_error_that_counts(scheme: str) -> None:
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    importance, name = uneven(512), "layer.weight"
    found = []
    for known in (None, {name: stats(importance)}):
        rules = [f"{name}={scheme}" + "".join(f":{k}={v}" for k, v in SEARCHES[scheme].items())]
        with mq.quantize({name: weight}, set=rules, stats=known) as model:
            ((_, tensor),) = model.tensors()
        assert isinstance(tensor, QuantizedTensor)
        found.append(tensor)
    plain, weighted = (((t.dequantize() - weight).double().square() * importance).sum() for t in found)
    assert not found[0].equal(found[1])
    assert weighted < plain


def test_importance_is_that_of_llama_cpps_matrix(tmp_path: Path, llamacpp: ModuleType) -> None:
    """Statistics and an imatrix of the same numbers give the same bytes: llama.cpp's."""
    weight, name = torch.randn(16, 256) * 0.02, "layers.0.weight"
    how: Any = {"format": "gguf", "format_options": {"architecture": "generic"}}
    known = {name: stats(uneven(256))}
    mq.quantize({name: weight}, set=[f"{name}=Q4_K:rounding=llama.cpp"], stats=known).save(tmp_path / "m.gguf", **how)
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert tensor.data.tobytes() == llamacpp.quantize(weight.numpy(), "Q4_K", uneven(256).numpy())


@pytest.mark.parametrize(("scheme", "options"), [("Q5_1", {}), ("int4", {"group_size": 32})])
def test_every_expert_of_a_stack_has_its_own(
    scheme: str, options: dict[str, Any], pretrained: Callable[..., Path], tmp_path: Path
) -> None:
    pretrained(tmp_path / "model", "MixtralForCausalLM", intermediate_size=96, num_local_experts=3)
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    known = {name.format(i): stats(uneven(96, seed=i)) for i in (0, 2)}  # nothing reached the second
    how: Any = {"format": "gguf", "format_options": {"tokenizer": "none"}}
    mq.quantize(tmp_path / "model", scheme=scheme, options=options, stats=known).save(tmp_path / "m.gguf", **how)
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_down_exps.weight")
    stacked = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    with mq.load(tmp_path / "model") as source:
        weights = source.state_dict()
    for i in range(3):
        expert = name.format(i)
        one = {expert: known.get(expert, stats(torch.ones(96)))}  # as llama-quantize does
        with mq.quantize({expert: weights[expert]}, scheme=scheme, options=options, stats=one) as m:
            m.save(tmp_path / f"{i}.gguf", format="gguf", format_options={"architecture": "generic"})
        (alone,) = gguf.GGUFReader(tmp_path / f"{i}.gguf").tensors
        np.testing.assert_array_equal(stacked[i], gguf.quants.dequantize(alone.data, alone.tensor_type))


def test_inputs_of_a_transposed_layer(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    name, how = "transformer.h.0.mlp.c_fc.weight", {"format": "gguf", "format_options": {"tokenizer": "none"}}
    with mq.load(tmp_path / "model") as source:
        weight = source.state_dict()[name].t()
    importance, errors = uneven(64), []
    for known in (None, {name: stats(importance)}):
        mq.quantize(tmp_path / "model", scheme="Q5_1", stats=known).save(tmp_path / "m.gguf", force=True, **how)
        tensor = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight")
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        errors.append(float(((values - weight).double().square() * importance).sum()))
    assert errors[1] < errors[0]

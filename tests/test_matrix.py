"""Every installed scheme in every installed format: held and read back exactly, or a gap that is declared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import monoquant_core as mq
from monoquant_core.engine import compute
from monoquant_core.errors import UnsupportedEncodingError
from monoquant_core.exporters import Repacks
from monoquant_core.options import option_infos
from monoquant_core.plugins import load_registry
from monoquant_core.tensor import QuantizedTensor, same_bits
from monoquant_core.testing.samples import normal

REGISTRY = load_registry()

#: what a format cannot do with a scheme: ours to do (notimpl), upstream's (notyet), or impossible (never), and why
GAPS: dict[tuple[str, str], tuple[str, str]] = {
    ("fp8", "gguf"): ("never", "ggml has no type of 8-bit floats"),
    ("int2", "gguf"): ("never", "ggml's 2-bit types have minima, or three codes of the four"),
    ("int3", "gguf"): ("never", "Q3_K's scales are codes themselves"),
    ("int6", "gguf"): ("never", "Q6_K's scales are codes themselves"),
    ("int7", "gguf"): ("never", "ggml has no type of 7 bits"),
    ("w8a8", "gguf"): ("never", "GGUF stores weights only"),
    **{
        (name, "safetensors:compressed-tensors"): ("never", "compressed-tensors has zero points, not minima")
        for name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
    },
    **{
        (name, "safetensors:compressed-tensors"): ("never", "compressed-tensors' scales are numbers, not codes")
        for name in ("Q3_K", "Q6_K", "IQ4_XS")
    },
    ("IQ4_NL", "safetensors:compressed-tensors"): ("never", "compressed-tensors has no codebooks"),
    **{(f"int{bits}", "onnx"): ("never", "ONNX has integers of 2, 4, 8 and 16 bits") for bits in (3, 5, 6, 7)},
    **{(name, "onnx"): ("never", "ONNX has integers of 2, 4, 8 and 16 bits") for name in ("Q5_0", "Q3_K", "Q6_K")},
    **{
        (name, "onnx"): ("never", "DequantizeLinear has zero points, not minima")
        for name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
    },
    **{(name, "onnx"): ("never", "ONNX has no codebooks") for name in ("IQ4_NL", "IQ4_XS")},
}

#: gguf's names and side files are its plugin's tests' to show; here every tensor keeps its name
OPTIONS = {"gguf": {"architecture": "generic"}}


def formats() -> list[str]:
    """Every format, once for each convention where it has several."""
    found = []
    for declaration in REGISTRY.exporters.values():
        conventions = [i for i in option_infos(declaration.options) if i.name == "convention"]
        choices = [c for i in conventions for c in i.choices or () if c != "auto"]
        found += [f"{declaration.name}:{c}" for c in choices] or [declaration.name]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers saves one: two projections, a norm, embeddings and a head."""
    folder = tmp_path_factory.mktemp("model")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {  # rows of whole super-blocks of 256
        "model.embed_tokens.weight": normal((64, 256), 1),
        "model.layers.0.mlp.up_proj.weight": normal((512, 256), 2),
        "model.layers.0.mlp.gate_proj.weight": normal((512, 256), 3),
        "model.layers.0.mlp.down_proj.weight": normal((256, 512), 4),
        "model.layers.0.input_layernorm.weight": torch.ones(256, dtype=torch.float32),
        "lm_head.weight": normal((64, 256), 5),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_graph(source: mq.Source, format: str) -> None:
    """Formats that need a graph get one that gives out every tensor; what else they do is for their own tests."""
    declared = REGISTRY.exporter(format)
    if declared.needs == "graph":
        exporter = declared.load()(declared.options())
        source.info = dataclasses.replace(source.info, graph=exporter.sample_graph(source.specs()))


@pytest.mark.parametrize("scheme", sorted(d.name for d in REGISTRY.schemes.values()))
@pytest.mark.parametrize("format", formats())
def test_scheme_in_format(scheme: str, format: str, model: Path, tmp_path: Path) -> None:
    name, _, convention = format.partition(":")
    options = {"convention": convention} if convention else OPTIONS.get(name, {})
    # As a rule: a recipe of the same name would take its place as --scheme.
    recipe = {"base": "none", "rules": [{"match": "*.mlp.*", "scheme": scheme}]}
    with mq.quantize(model, scheme="", recipe=recipe) as quantized:
        add_graph(quantized.source, name)
        if (scheme, format) in GAPS:
            assert GAPS[scheme, format][0] in ("notimpl", "notyet", "never")
            with pytest.raises(UnsupportedEncodingError):
                quantized.plan(name, format_options=options)
            return
        suffix = REGISTRY.exporter(name).suffix
        plan = quantized.plan(name, format_options=options, destination=f"out{suffix}")
        expected = dict(quantized.tensors())
        for step in plan.steps:
            wanted, held = expected[step.placed.output.name], step.placed.held.encoding
            if isinstance(wanted, QuantizedTensor) and held != wanted.encoding:
                made = compute(step, quantized.source)
                if isinstance(step.placed.held, Repacks) and step.placed.held.exact:
                    assert isinstance(made, QuantizedTensor)
                    assert torch.equal(made.codes, wanted.codes)
                    assert same_bits(made.dequantize(), wanted.dequantize())
                else:
                    assert any(f"{wanted.encoding} is quantized as {held}" in note for note in plan.notes)
                expected[step.placed.output.name] = made
        report = quantized.save(tmp_path / f"out{suffix}", name, format_options=options)
        assert report.nbytes == plan.bytes_after
    changed = {t.name for t in report.tensors if t.action in ("quantize", "cast")}
    assert changed == {n for n in expected if ".mlp." in n}
    with mq.load(tmp_path / f"out{suffix}") as loaded:
        found = dict(loaded.tensors())
    assert set(found) == set(expected)
    for tensor, wanted in expected.items():
        back = found[tensor]
        if isinstance(wanted, QuantizedTensor):
            assert isinstance(back, QuantizedTensor), tensor
            assert back.equal(wanted), tensor
        else:
            assert isinstance(back, torch.Tensor), tensor
            assert same_bits(back, wanted), tensor


def test_gaps_name_what_is_installed() -> None:
    assert set(GAPS) <= {(d.name, f) for d in REGISTRY.schemes.values() for f in formats()}
    assert REGISTRY.schemes
    assert REGISTRY.exporters

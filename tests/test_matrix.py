"""Every installed scheme in every installed format: held and read back exactly, or a gap that is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import monoquant_core as mq
from monoquant_core.errors import UnsupportedEncodingError
from monoquant_core.options import option_infos
from monoquant_core.plugins import load_registry
from monoquant_core.tensor import QuantizedTensor, same_bits
from monoquant_core.testing.samples import normal

REGISTRY = load_registry()

#: what a format cannot do with a scheme: ours to do (notimpl), upstream's (notyet), or impossible (never), and why
GAPS: dict[tuple[str, str], tuple[str, str]] = {}


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
    tensors = {
        "model.embed_tokens.weight": normal((64, 128), 1),
        "model.layers.0.mlp.up_proj.weight": normal((256, 128), 2),
        "model.layers.0.mlp.gate_proj.weight": normal((256, 128), 3),
        "model.layers.0.mlp.down_proj.weight": normal((128, 256), 4),
        "model.layers.0.input_layernorm.weight": torch.ones(128, dtype=torch.float32),
        "lm_head.weight": normal((64, 128), 5),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", sorted(d.name for d in REGISTRY.schemes.values()))
@pytest.mark.parametrize("format", formats())
def test_scheme_in_format(scheme: str, format: str, model: Path, tmp_path: Path) -> None:
    name, _, convention = format.partition(":")
    options = {"convention": convention} if convention else {}
    with mq.quantize(model, scheme=scheme) as quantized:
        if (scheme, format) in GAPS:
            assert GAPS[scheme, format][0] in ("notimpl", "notyet", "never")
            with pytest.raises(UnsupportedEncodingError):
                quantized.plan(name, format_options=options)
            return
        expected = dict(quantized.tensors())
        suffix = REGISTRY.exporter(name).suffix
        report = quantized.save(tmp_path / f"out{suffix}", name, format_options=options)
        assert report.nbytes == quantized.plan(name, format_options=options, destination=f"out{suffix}").bytes_after
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

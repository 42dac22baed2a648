"""Mixtures against llama-quantize's rules, and the counts that it prints for real models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from monoquant_gguf.mixtures import Mixture
from monoquant_gguf.plugin import MIXTURES, MixtureOptions

import monoquant_core as mq
from monoquant_core.api import save_recipe
from monoquant_core.errors import PlanError
from monoquant_core.kinds import annotate
from monoquant_core.model import ModelInfo, TensorSpec


def llama(layers: int, *, width: int = 512, kv: int = 2, heads: int = 8, tied: bool = False, experts: int = 0) -> Any:
    """Config and tensors of a Llama or Mixtral."""
    config = {
        "model_type": "mixtral" if experts else "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_size": width,
        "tie_word_embeddings": tied,
    }
    if experts:
        config["num_local_experts"] = experts
    inner, small = 2 * width, width // heads * kv
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, width), "model.norm.weight": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm.weight": (width,), f"{at}.post_attention_layernorm.weight": (width,)}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (width, width) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (small, width) for n in "kv"}
        if experts:
            moe = f"{at}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (experts, width)
            for e in range(experts):
                shapes |= {f"{moe}.experts.{e}.{n}.weight": (inner, width) for n in ("w1", "w3")}
                shapes[f"{moe}.experts.{e}.w2.weight"] = (width, inner)
        else:
            shapes |= {f"{at}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
    if not tied:
        shapes["lm_head.weight"] = (1000, width)
    info = ModelInfo("model", config)
    return info, annotate([TensorSpec(name, shape, "bfloat16") for name, shape in shapes.items()], info)


def types(mixture: str, info: ModelInfo, specs: list[TensorSpec], **options: Any) -> dict[str, str]:
    """What each tensor gets by the rules, in order, as a plan would apply them."""
    rules = Mixture(mixture, MixtureOptions(**options)).rules(info, specs)
    return {spec.name: next(rule.scheme for rule in rules if rule.matches(spec)) for spec in specs}


def layers_with(found: dict[str, str], part: str, scheme: str) -> list[int]:
    return [int(name.split(".")[2]) for name, value in found.items() if part in name and value == scheme]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(11, [0, 3, 6, 9, 10]), (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31])],
)
def test_layers_that_get_more_bits(layers: int, expected: list[int]) -> None:
    """As llama-quantize prints for models of so many layers."""
    info, specs = llama(layers)
    for mixture, rest in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")):
        found = types(mixture, info, specs)
        for part in ("v_proj", "down_proj"):
            assert layers_with(found, part, "Q6_K") == expected
            assert len(layers_with(found, part, rest)) == layers - len(expected)
        assert {found[f"model.layers.3.self_attn.{n}_proj.weight"] for n in "qko"} == {rest}


#: most tensors, attn_v by layer, ffn_down by layer, attn_output: of 32 layers, two heads of values
TABLE = {
    "Q2_K": ("Q2_K", {"Q4_K": 32}, {"Q3_K": 32}, "Q3_K"),
    "Q3_K_S": ("Q3_K", {"Q3_K": 32}, {"Q3_K": 32}, "Q3_K"),
    "Q3_K_M": ("Q3_K", {"Q5_K": 2, "Q4_K": 30}, {"Q5_K": 2, "Q4_K": 30}, "Q4_K"),
    "Q3_K_L": ("Q3_K", {"Q5_K": 32}, {"Q5_K": 32}, "Q5_K"),
    "Q4_K_S": ("Q4_K", {"Q5_K": 4, "Q4_K": 28}, {"Q5_K": 4, "Q4_K": 28}, "Q4_K"),
    "Q4_K_M": ("Q4_K", {"Q6_K": 16, "Q4_K": 16}, {"Q6_K": 16, "Q4_K": 16}, "Q4_K"),
    "Q5_K_S": ("Q5_K", {"Q5_K": 32}, {"Q5_K": 32}, "Q5_K"),
    "Q5_K_M": ("Q5_K", {"Q6_K": 16, "Q5_K": 16}, {"Q6_K": 16, "Q5_K": 16}, "Q5_K"),
    "Q6_K": ("Q6_K", {"Q6_K": 32}, {"Q6_K": 32}, "Q6_K"),
    "Q4_0": ("Q4_0", {"Q4_0": 32}, {"Q4_0": 32}, "Q4_0"),
    "Q8_0": ("Q8_0", {"Q8_0": 32}, {"Q8_0": 32}, "Q8_0"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_table(mixture: str, tied: bool) -> None:
    most, values, down, output = TABLE[mixture]
    info, specs = llama(32, tied=tied)
    found = types(mixture, info, specs)
    assert Counter(v for n, v in found.items() if "v_proj" in n) == values
    assert Counter(v for n, v in found.items() if "down_proj" in n) == down
    assert {v for n, v in found.items() if "o_proj" in n} == {output}
    assert {v for n, v in found.items() if ".q_proj" in n or "gate_proj" in n or "k_proj" in n} == {most}
    head = "Q8_0" if mixture == "Q8_0" else "Q6_K"
    assert found.get("lm_head.weight", head) == head
    assert found["model.embed_tokens.weight"] == (head if tied else most)
    assert {v for n, v in found.items() if "norm" in n} == {"keep"}


def test_layers_are_counted_in_order() -> None:
    """Not in the order of names, in which layer 10 comes before layer 2."""
    info, specs = llama(11)
    assert types("Q4_K_M", info, sorted(specs, key=lambda s: s.name)) == types("Q4_K_M", info, specs)


def test_values_of_few_heads() -> None:
    info, specs = llama(4, kv=8)
    assert {v for n, v in types("Q2_K", info, specs).items() if "v_proj" in n} == {"Q3_K"}
    info, specs = llama(80)
    found = types("Q4_K_M", info, specs)
    assert {v for n, v in found.items() if "v_proj" in n} == {"Q5_K", "Q6_K"}
    assert {v for n, v in found.items() if "down_proj" in n} == {"Q4_K", "Q6_K"}


def test_eight_experts() -> None:
    info, specs = llama(32, experts=8)
    found = types("Q4_K_M", info, specs)
    assert {v for n, v in found.items() if "v_proj" in n or "k_proj" in n} == {"Q8_0"}
    assert {v for n, v in found.items() if "o_proj" in n} == {"Q5_K"}
    down = {n: v for n, v in found.items() if n.endswith("w2.weight")}
    assert Counter(down.values()) == {"Q6_K": 16 * 8, "Q4_K": 16 * 8}  # the experts of a layer are one tensor
    assert {v for n, v in found.items() if n.endswith("moe.gate.weight")} == {"keep"}


def test_a_head_of_odd_rows() -> None:
    """llama-quantize gives it Q8_0 itself, where the default type would not fit."""
    info, specs = llama(2, width=384, heads=6)
    assert types("Q4_K_M", info, specs)["lm_head.weight"] == "Q8_0"
    assert types("Q4_0", info, specs)["lm_head.weight"] == "Q6_K"


def test_models_without_a_known_architecture() -> None:
    config = {"model_type": "unheard-of", "num_hidden_layers": 11, "num_attention_heads": 8}
    _, specs = llama(11)
    found = types("Q4_K_M", ModelInfo("model", config), list(specs))
    assert layers_with(found, "v_proj", "Q6_K") == [0, 3, 6, 9, 10]
    assert layers_with(found, "down_proj", "Q6_K") == [0, 3, 6, 9, 10]
    assert found["lm_head.weight"] == "Q6_K"
    assert found["model.norm.weight"] == "keep"


def test_options_reach_the_types() -> None:
    info, specs = llama(2)
    rules = Mixture("Q4_K_M", MixtureOptions("llama.cpp", allow_fallback=True)).rules(info, specs)
    assert {str(dict(rule.options)) for rule in rules if rule.scheme != "keep"} == {
        "{'rounding': 'llama.cpp', 'allow_fallback': True}"
    }
    assert all(not rule.options for rule in Mixture("Q4_K_M", MixtureOptions()).rules(info, specs))


#: 2-D types inside the files that llama-quantize writes of all-MiniLM-L6-v2
MINILM = {
    "Q8_0": {"Q8_0": 37},
    "Q6_K": {"Q8_0": 31, "Q6_K": 6},
    "Q5_K_M": {"Q5_1": 28, "Q5_K": 4, "Q6_K": 2, "Q8_0": 3},
    "Q4_K_M": {"Q5_0": 28, "Q4_K": 4, "Q6_K": 2, "Q8_0": 3},
    "Q4_0": {"Q4_0": 36, "Q8_0": 1},
}


@pytest.mark.parametrize("mixture", MINILM)
def test_types_of_minilm(mixture: str, minilm: Path) -> None:
    plan = mq.plan(minilm, scheme=mixture, format="", options={"allow_fallback": True}, keep=["*pooler*"])
    found = Counter(d.proposal.layout for d in plan.decisions if d.proposal is not None)
    assert found == MINILM[mixture]


def test_fallbacks_of_minilm_are_refused(minilm: Path) -> None:
    with pytest.raises(PlanError, match=r"falls back to Q5_0, 5.5 bits per weight instead of 4.5") as caught:
        mq.plan(minilm, scheme="Q4_K_M", format="")
    assert "--allow-fallback" in caught.value.hint


def test_a_saved_recipe_repeats_a_mixture_with_its_options(small_llama: Path, tmp_path: Path) -> None:
    with mq.quantize(small_llama, scheme="q4_k_m", options={"rounding": "llama.cpp"}) as model:
        first = model.plan("gguf")
    assert first.recipe == {"scheme": "Q4_K_M", "options": {"rounding": "llama.cpp"}}
    saved = tmp_path / "recipe.toml"
    save_recipe(first, saved)
    with mq.quantize(small_llama, recipe=saved) as model:
        again = model.plan("gguf")
    assert [(d.scheme, d.reason) for d in again.decisions] == [(d.scheme, d.reason) for d in first.decisions]
    assert any("rounding=llama.cpp" in d.scheme for d in again.decisions)

"""What the schemes write: llama.cpp's bytes where they are asked for, else values that are nearer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monoquant_gguf import blocks
from monoquant_gguf.kernels import lanes, search, searched
from monoquant_gguf.kernels.run import quantize
from monoquant_gguf.layouts import QUANTIZED, Layout, by_name
from monoquant_gguf.plugin import TYPES, TypeOptions
from monoquant_gguf.quantizer import GgmlQuantizer
from safetensors.torch import save_file

from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context, Proposal, Refusal
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor

Array = np.ndarray[Any, np.dtype[np.float32]]

WIDTH = 512

EACH_TYPE = pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)


def searches() -> Iterator[Any]:
    yield pytest.param("lanes", id="torch")
    missing = importlib.util.find_spec("numba") is None
    yield pytest.param("compiled", id="numba", marks=pytest.mark.skipif(missing, reason="pip install numba"))


@pytest.fixture(scope="module", params=searches())
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """Either implementation of the searches."""
    return importlib.import_module(f"monoquant_gguf.kernels.{request.param}")


def reference(llamacpp: ModuleType, layout: Layout, x: Array, importance: Array | None) -> np.ndarray[Any, Any]:
    return np.frombuffer(llamacpp.quantize(x, layout.name, importance), np.uint8).reshape(len(x), -1)


def written(layout: Layout, x: Array, importance: Array | None, backend: ModuleType) -> np.ndarray[Any, Any]:
    from monoquant_gguf.blocks.parts import to_tensor

    weights = None if importance is None else torch.from_numpy(importance)
    parts = searched.quantize(layout.name, torch.from_numpy(x), layout.block_size, weights, backend)
    return np.asarray(blocks.pack(to_tensor(parts, layout, x.shape), layout).numpy())


def matrices() -> dict[str, Array]:
    random = np.random.default_rng(0)
    signs = random.choice([-1.0, 1.0], (8, WIDTH))
    values = {
        "normal": random.normal(0, 0.02, (24, WIDTH)),
        "heavy tails": random.standard_t(3, (24, WIDTH)),
        "bf16": random.normal(0, 0.02, (24, WIDTH)).astype(np.float16),
        "zeros": np.zeros((2, WIDTH)),
        "constants": np.array([[0.37], [-0.37]]) * np.ones((2, WIDTH)),
        "ties": random.integers(-4, 5, (24, WIDTH)) * 0.25,
        "one magnitude": signs * 0.7,
        "negative zeros": random.normal(0, 1, (8, WIDTH)) * (random.random((8, WIDTH)) < 0.02),
        "positive": np.abs(random.normal(0, 1, (8, WIDTH))) + 3,
        "tiny": random.normal(0, 1e-30, (4, WIDTH)),
        "subnormal": random.normal(0, 1e-41, (4, WIDTH)),
        "huge": random.normal(0, 1e7, (4, WIDTH)),
        "below powers of two": signs * 2.0 ** random.integers(-30, 9, (8, WIDTH)) * (1 - 2.0**-24),
        "many scales": random.normal(0, 1, (16, WIDTH)) * 10.0 ** random.integers(-12, 3, (16, WIDTH)),
    }
    return {name: np.asarray(x, np.float32) for name, x in values.items()}


def importances() -> dict[str, Array | None]:
    random = np.random.default_rng(1)
    uneven = random.random(WIDTH) ** 8 * 1e3
    holes = random.random(WIDTH) * (random.random(WIDTH) > 0.3)
    return {"none": None, "uneven": uneven.astype(np.float32), "holes": holes.astype(np.float32)}


@EACH_TYPE
@pytest.mark.parametrize("weighting", importances())
def test_bytes_of_llama_cpp(layout: Layout, weighting: str, backend: ModuleType, llamacpp: ModuleType) -> None:
    importance = importances()[weighting]
    for name, x in matrices().items():
        expected = reference(llamacpp, layout, x, importance)
        different = int((written(layout, x, importance, backend) != expected).sum())
        assert different == 0, f"{name}: {different} of {expected.size} bytes differ"


ELEMENTS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30, 1e-20, 3.0e4]),
    st.floats(-10, 10, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
)


@st.composite
def rows(draw: st.DrawFn) -> Array:
    """Rows of few different values, in runs and repeated: ties everywhere."""
    palette = draw(st.lists(ELEMENTS, min_size=1, max_size=12))
    pattern = draw(st.lists(st.integers(0, len(palette) - 1), min_size=1, max_size=WIDTH))
    return np.resize(np.array(palette, np.float32)[pattern], (2, WIDTH))


@EACH_TYPE
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=rows(), weighted=st.booleans())
def test_bytes_of_llama_cpp_for_any_rows(
    layout: Layout, backend: ModuleType, llamacpp: ModuleType, x: Array, weighted: bool
) -> None:
    importance = importances()["uneven"] if weighted else None
    np.testing.assert_array_equal(written(layout, x, importance, backend), reference(llamacpp, layout, x, importance))


def context(x: torch.Tensor, importance: torch.Tensor | None = None) -> Context:
    spec = TensorSpec("layer.weight", tuple(x.shape), "float32")
    return Context(spec, range(len(x)), Scratch(), importance=importance)


def error(q: np.ndarray[Any, Any], x: Array, weights: Array | None) -> float:
    squares = (q.astype(np.float64) - x) ** 2
    return float((squares if weights is None else squares * weights).sum())


@EACH_TYPE
@pytest.mark.parametrize("weighting", ["none", "uneven"])
def test_search_is_never_worse(layout: Layout, weighting: str, llamacpp: ModuleType) -> None:
    importance = importances()[weighting]
    weights = None if importance is None else torch.from_numpy(importance)
    for name, x in matrices().items():
        if name == "huge":  # beyond float16 scales: refused, below
            continue
        encoding = layout.encoding_for(2)
        ours = quantize(layout, torch.from_numpy(x), encoding, context(torch.from_numpy(x), weights), search=True)
        kind = gguf.GGMLQuantizationType[layout.name]
        theirs = gguf.quants.dequantize(reference(llamacpp, layout, x, importance), kind)
        least = error(theirs, x, importance)
        found = error(ours.dequantize().numpy(), x, importance)
        assert found <= least * (1 + 1e-9), name
        assert found < least or name not in ("normal", "heavy tails"), name  # it is worth its time


@EACH_TYPE
def test_search_is_the_same_with_numba(layout: Layout) -> None:
    compiled = pytest.importorskip("monoquant_gguf.kernels.compiled")
    from monoquant_gguf.blocks.parts import to_tensor

    for weights in importances().values():
        importance = None if weights is None else torch.from_numpy(weights)
        for x in matrices().values():
            with_numba, without = (
                to_tensor(search.quantize(layout, torch.from_numpy(x), importance, searches), layout, x.shape)
                for searches in (compiled, lanes)
            )
            assert with_numba.equal(without)


@EACH_TYPE
@pytest.mark.parametrize("rounding", ["search", "llama.cpp"])
def test_chunks_change_nothing(layout: Layout, rounding: str) -> None:
    x = torch.from_numpy(matrices()["heavy tails"])
    quantizer, encoding = GgmlQuantizer(layout.name, TypeOptions(rounding)), layout.encoding_for(2)
    whole = quantizer.quantize(x, encoding, context(x))
    pieces = [quantizer.quantize(part, encoding, context(part)) for part in x.split([1, 7, 16])]
    raw = torch.cat([blocks.pack(piece, layout) for piece in pieces])
    assert torch.equal(blocks.pack(whole, layout), raw)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_minilm(name: str, minilm: Path, llamacpp: ModuleType) -> None:
    from safetensors import safe_open

    layout = by_name(name)
    with safe_open(minilm / "model.safetensors", "pt") as file:
        for key in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.5.output.dense.weight"):
            x = file.get_tensor(key)[:32].float()
            x = x[:, : x.shape[1] // layout.block_size * layout.block_size].contiguous()
            ours = quantize(layout, x, layout.encoding_for(2), context(x), search=True)
            raw = reference(llamacpp, layout, x.numpy(), None)
            theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
            assert error(ours.dequantize().numpy(), x.numpy(), None) < error(theirs, x.numpy(), None)
            same = quantize(layout, x, layout.encoding_for(2), context(x), search=False)
            np.testing.assert_array_equal(blocks.pack(same, layout).numpy(), raw)


@EACH_TYPE
def test_proposals(layout: Layout) -> None:
    quantizer = GgmlQuantizer(layout.name, TypeOptions())
    spec = TensorSpec("w", (4, 512), "bfloat16")
    proposal = quantizer.propose(spec)
    assert isinstance(proposal, Proposal)
    assert proposal.encoding == layout.encoding_for(2)
    assert proposal.layout == layout.name
    assert quantizer.accepts(spec, layout.encoding_for(2))
    assert not quantizer.accepts(spec, layout.encoding_for(3))
    assert not quantizer.accepts(TensorSpec("w", (4, 500), "float32"), layout.encoding_for(2))
    experts = quantizer.propose(TensorSpec("w", (2, 4, 256), "float32"))
    assert isinstance(experts, Proposal)
    assert experts.encoding == layout.encoding_for(3)
    refusal = quantizer.propose(TensorSpec("w", (4, 100), "float32"))
    assert isinstance(refusal, Refusal)
    assert f"blocks of {layout.block_size} do not divide" in refusal.reason
    assert isinstance(quantizer.propose(TensorSpec("b", (512,), "float32")), Refusal)


@pytest.mark.parametrize(
    ("name", "row", "fallback", "bits"),
    [
        ("Q4_K", 384, "Q5_0", "5.5"),
        ("Q6_K", 384, "Q8_0", "8.5"),
        ("Q2_K", 100, "F16", "16"),
        ("Q4_0", 100, "F16", "16"),
    ],
)
def test_fallbacks_are_refused_unless_allowed(name: str, row: int, fallback: str, bits: str) -> None:
    spec = TensorSpec("w", (4, row), "float32")
    refusal = GgmlQuantizer(name, TypeOptions()).propose(spec)
    assert isinstance(refusal, Refusal)
    assert f"falls back to {fallback}, {bits} bits per weight instead of" in refusal.reason
    assert "--allow-fallback" in refusal.hint
    assert refusal.instead == GgmlQuantizer(name, TypeOptions(allow_fallback=True)).propose(spec)
    quantizer = GgmlQuantizer(name, TypeOptions(allow_fallback=True))
    proposal = quantizer.propose(spec)
    assert isinstance(proposal, Proposal)
    assert proposal.layout == fallback
    if isinstance(proposal.encoding, str):
        assert proposal.encoding == "float16"
        return
    assert quantizer.accepts(spec, proposal.encoding)
    x = torch.randn(4, row)
    alone = GgmlQuantizer(fallback, TypeOptions()).quantize(x, proposal.encoding, context(x))
    assert quantizer.quantize(x, proposal.encoding, context(x)).equal(alone)


def test_the_error_says_what_fallbacks_come_to(run: Callable[..., Any], tmp_path: Path) -> None:
    """The tensors, the types they would get, and the bits per weight of the file that --allow-fallback then writes."""
    rows = {"q_proj": 96, "k_proj": 96, "up_proj": 512, "o_proj": 100}
    state = {f"layers.{i}.{name}.weight": torch.randn(64, n) for i in range(3) for name, n in rows.items()}
    save_file(state, tmp_path / "m.safetensors")
    choice = ("--format", "gguf", "--architecture", "generic", "--scheme", "Q4_K")
    command = ("quantize", tmp_path / "m.safetensors", "-o", tmp_path / "m.gguf", *choice)
    refused = run(*command)
    assert refused.returncode == 2
    for line in (
        "layers.{0-2}.q_proj.weight [64, 96]: Q4_K: blocks of 256 do not divide its rows of 96; "
        "llama-quantize falls back to Q5_0, 5.5 bits per weight instead of 4.5",
        "layers.{0-2}.o_proj.weight [64, 100]: Q4_K: blocks of 256 do not divide its rows of 100; "
        "llama-quantize falls back to F16, 16 bits per weight instead of 4.5",
    ):
        assert line in refused.stderr
    assert "hint: --allow-fallback accepts those types" in refused.stderr
    assert not (tmp_path / "m.gguf").exists()
    # 192 columns of Q5_0, 512 of Q4_K, 100 of F16
    total = (192 * 5.5 + 512 * 4.5 + 100 * 16) / 804
    assert (
        f"refuses 9 of the tensors chosen for it; with what they would get instead, all tensors take {total:.2f} "
        in (refused.stderr)
    )
    accepted = run(*command, "--allow-fallback")
    assert accepted.returncode == 0, accepted.stderr
    assert "the searches of ggml's types run in" in accepted.stdout
    assert f"{total:.2f} bits each, scales included: 6 Q5_0, 3 F16, 3 Q4_K" in " ".join(accepted.stdout.split())


@pytest.mark.parametrize("found", [True, False])
def test_what_the_searches_run_with_is_said(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    (note,) = GgmlQuantizer("Q4_K", TypeOptions()).notes([])
    assert ("run in numba" in note, "monoquant[gguf-fast]" in note) == (found, not found)
    assert not GgmlQuantizer("Q8_0", TypeOptions()).notes([])


def test_every_type_is_a_scheme() -> None:
    from monoquant_gguf import quantizer

    assert set(TYPES) == {layout.name for layout in QUANTIZED}
    for name in TYPES:
        assert getattr(quantizer, name)(TypeOptions()).layout is by_name(name)


@EACH_TYPE
def test_experts_and_halves(layout: Layout) -> None:
    """A third axis and bfloat16 input give the codes of the same values as a float32 matrix."""
    x = torch.from_numpy(matrices()["normal"]).to(torch.bfloat16)
    flat = quantize(layout, x.float(), layout.encoding_for(2), context(x), search=True)
    stacked = x.view(4, 6, WIDTH)
    deep = quantize(layout, stacked, layout.encoding_for(3), context(stacked), search=True)
    assert isinstance(deep, QuantizedTensor)
    assert deep.encoding == layout.encoding_for(3)
    assert torch.equal(deep.codes.flatten(0, 1), flat.codes)


def test_what_is_refused() -> None:
    layout = by_name("Q4_0")
    x = torch.randn(2, 64)
    for value, message in ((float("nan"), r"layer.weight\[1, 3\]: nan"), (1e30, "beyond what float16 scales hold")):
        bad = x.clone()
        bad[1, 3] = value
        for searching in (False, True):
            with pytest.raises(QuantizationError, match=message):
                quantize(layout, bad, layout.encoding_for(2), context(bad), search=searching)
    with pytest.raises(QuantizationError, match="importance of 3 inputs, where there are 64"):
        quantize(layout, x, layout.encoding_for(2), context(x, torch.ones(3)), search=True)


def test_memory_of_the_accelerator_is_predicted() -> None:
    numba = importlib.util.find_spec("numba") is not None
    for name, rounding, expected in (
        ("Q4_K", "search", True),
        ("Q6_K", "llama.cpp", True),
        ("Q8_0", "search", True),
        ("Q8_0", "llama.cpp", False),
        ("TQ1_0", "search", False),
    ):
        spec, encoding = TensorSpec("w", (1, 256), "float32"), by_name(name).encoding_for(2)
        taken = GgmlQuantizer(name, TypeOptions(rounding)).process_bytes(spec, encoding)
        assert bool(taken) == (expected and numba), name


@pytest.mark.parametrize("magnitude", [1e-36, 1e-3, 1.0, 1e20, 1e30, 1e38])
def test_mxfp4_of_any_magnitude_is_within_a_step(magnitude: float) -> None:
    """Up to the largest powers of two, as gguf decodes them: what is largest, 4 to 8 units, becomes at most 6."""
    x = torch.linspace(-1, 1, 32).mul_(magnitude).view(1, 32)
    layout = by_name("MXFP4")
    context = Context(TensorSpec("w", (1, 32), "float32"), range(1), Scratch())
    made = quantize(layout, x, layout.encoding_for(2), context, search=False)
    raw = blocks.pack(made, layout)
    decoded = gguf.quants.dequantize(raw.numpy().reshape(1, -1), gguf.GGMLQuantizationType.MXFP4)
    assert float((torch.from_numpy(decoded).double() - x.double()).abs().max()) <= 0.25 * magnitude

"""The search for a scale: its error against other people's rules, and that nothing but the block decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monoquant_int.plugin import IntOptions
from monoquant_int.quantizer import IntQuantizer
from safetensors import safe_open

from monoquant_core.encoding import FULL, INT4, Encoding, integer
from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("searches")

G128 = Encoding(INT4, (1, 128), "float32")


def run(
    x: torch.Tensor,
    encoding: Encoding,
    rounding: str = "search",
    *,
    rows: range | None = None,
    importance: torch.Tensor | None = None,
    kind: str = "linear",
    shape: tuple[int, ...] | None = None,
) -> QuantizedTensor:
    symmetric = encoding.zero_point is None
    granularity = "group" if max(encoding.block) > 1 else "channel"
    options = IntOptions(rounding=rounding, symmetric=symmetric, granularity=granularity)
    spec = TensorSpec("w", shape or tuple(x.shape), str(x.dtype).removeprefix("torch."), kind=kind)
    context = Context(spec, rows or range(x.shape[:-1].numel()), Scratch(), None, importance)
    return IntQuantizer(encoding.element.bits, options).quantize(x, encoding, context)


def error(x: torch.Tensor, made: QuantizedTensor, weight: torch.Tensor | float = 1.0) -> float:
    return float(((made.dequantize().double() - x.double()).square() * weight).sum())


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


def matrices(folder: Path) -> Iterator[torch.Tensor]:
    """The matrices of a model that are quantized by default, which embeddings are not."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".layers." in name or ".layer." in name:
                    tensor = file.get_tensor(name)
                    if tensor.ndim == 2 and tensor.shape[1] % 128 == 0:
                        yield tensor.float()


def relative_to_compressed_tensors(weights: Iterator[torch.Tensor]) -> float:
    """Squared error over that of compressed-tensors' own int4 rule, absmax / 7.5."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    args = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    ours = theirs = 0.0
    for x in weights:
        blocks = x.view(x.shape[0], -1, 128)
        scale, zero_point = helpers.calculate_qparams(blocks.amin(2), blocks.amax(2), args)
        peer = forward.fake_quantize(x, scale, zero_point, args)
        theirs += float((peer.double() - x.double()).square().sum())
        ours += error(x, run(x, G128))
    return ours / theirs


def test_error_on_minilm_against_compressed_tensors(minilm: Path) -> None:
    assert relative_to_compressed_tensors(matrices(minilm)) <= 0.78


def test_error_on_the_tiny_llama_against_compressed_tensors(shared: Path) -> None:
    assert relative_to_compressed_tensors(matrices(shared / "models" / "tiny-llama")) <= 0.78


def test_error_on_a_heavy_tailed_matrix_is_close_to_the_optimum() -> None:
    """The best of 200 scales of each sign, each with the codes nearest to it."""
    x = heavy_tailed(8, 512)
    blocks = x.view(-1, 128)
    extreme = blocks.abs().amax(1, keepdim=True)
    best = torch.full((len(blocks),), torch.inf)
    for factor in torch.linspace(5, 20, 200).tolist():
        for sign in (1, -1):
            scale = sign * extreme / factor
            values = (blocks / scale).round().clamp(-8, 7) * scale
            best = best.minimum((values - blocks).square().sum(1))
    assert error(x, run(x, G128)) <= 1.03 * float(best.sum())


ARRAYS = hnp.arrays(np.float32, (3, 32), elements=st.floats(-4, 4, width=32) | st.sampled_from([-1.0, 0.0, 1.0, 50.0]))


@given(ARRAYS, st.integers(2, 8), st.booleans(), st.sampled_from([32, 16]))
@settings(deadline=None, max_examples=150)
def test_never_worse_than_nearest(array: np.ndarray[Any, Any], bits: int, symmetric: bool, group: int) -> None:
    element = integer(bits, signed=symmetric)
    encoding = Encoding(element, (1, group), "float32", zero_point=None if symmetric else element)
    x = torch.from_numpy(array)
    nearest, searched = error(x, run(x, encoding, "nearest")), error(x, run(x, encoding))
    assert searched <= nearest * (1 + 1e-4) + 1e-6 * float(x.double().square().sum())


def test_grids_are_found_again() -> None:
    """Weights that are few levels times a scale, as ternary models have them, lose nothing."""
    levels = torch.randint(-1, 2, (16, 256)).float()
    for bits in (2, 3, 4, 8):
        made = run(levels * 0.037, Encoding(integer(bits), (1, 128), "float32"))
        assert torch.allclose(made.dequantize(), levels * 0.037, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_better_than_nearest_on_weights(bits: int, symmetric: bool) -> None:
    x, element = heavy_tailed(32, 512), integer(bits, signed=symmetric)
    encoding = Encoding(element, (1, 128), "float32", zero_point=None if symmetric else element)
    assert error(x, run(x, encoding)) < 0.995 * error(x, run(x, encoding, "nearest"))


def test_a_scale_may_be_negative() -> None:
    """So that the largest value of a block gets the code -8, which has no twin, whatever its sign."""
    x = heavy_tailed(64, 128)
    made = run(x, G128)
    assert isinstance(made.scale, torch.Tensor)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    negative = made.scale < 0
    assert 0.2 < float(negative.float().mean()) < 0.8
    assert bool((extreme[negative] > 0).all())
    assert int(made.codes.min()) == -8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_are_the_nearest_to_the_scale_as_stored(dtype: str) -> None:
    x = heavy_tailed(16, 256)
    made = run(x, Encoding(INT4, (1, 128), dtype))
    assert isinstance(made.scale, torch.Tensor)
    scale = made.scale.float().repeat_interleave(128, 1)
    assert torch.equal(made.codes, (x * (1 / scale)).round().clamp(-8, 7).to(torch.int8))


# Importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_weighs_the_error(symmetric: bool) -> None:
    x = heavy_tailed(64, 256)
    importance = torch.rand(256).square() * 100
    element = integer(3, signed=symmetric)
    encoding = Encoding(element, (1, 128), "float32", zero_point=None if symmetric else element)
    with_it, without = run(x, encoding, importance=importance), run(x, encoding)
    assert error(x, with_it, importance) < 0.98 * error(x, without, importance)
    assert error(x, without) < error(x, with_it)


def test_only_the_proportions_of_importance_matter() -> None:
    x = heavy_tailed(8, 256)
    expected = run(x, G128).clone()
    for value in (1e-30, 1.0, 1e30, 0.0):
        assert run(x, G128, importance=torch.full((256,), value)).equal(expected)


def test_columns_of_no_importance_do_not_count() -> None:
    x = heavy_tailed(8, 128)
    importance = torch.ones(128)
    importance[::4] = 0
    disturbed = x.clone()
    disturbed[:, ::4] *= 0.99
    first, second = (run(w, G128, importance=importance).clone() for w in (x, disturbed))
    assert torch.equal(first.codes[:, 1::4], second.codes[:, 1::4])


def test_importance_is_of_the_inputs_of_a_layer() -> None:
    x = heavy_tailed(128, 24)
    importance = torch.rand(128)
    transposed = run(x, Encoding(INT4, (32, 1), "float32"), importance=importance, kind="linear_transposed").clone()
    plain = run(x.t().contiguous(), Encoding(INT4, (1, 32), "float32"), importance=importance)
    assert torch.equal(transposed.codes, plain.codes.t())
    part = run(
        x[32:96],
        Encoding(INT4, (32, 1), "float32"),
        rows=range(32, 96),
        importance=importance,
        kind="linear_transposed",
        shape=(128, 24),
    )
    assert torch.equal(part.codes, transposed.codes[32:96])
    images = heavy_tailed(8, 4, 4, 4)
    of_images = torch.rand(64)
    convolution = run(images, Encoding(INT4, (1, 32), "float32"), importance=of_images, kind="conv").clone()
    flat = run(images.flatten(1), Encoding(INT4, (1, 32), "float32"), importance=of_images)
    assert torch.equal(convolution.codes.flatten(1), flat.codes)


def test_importance_of_another_model_is_refused() -> None:
    with pytest.raises(QuantizationError, match="^w: importance of 64 inputs, where there are 128"):
        run(heavy_tailed(4, 128), G128, importance=torch.ones(64))


# Only the block decides -------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((37, 4096), 64), ((5, 70_000), FULL), ((300, 288), 24)])
def test_rows_and_threads_do_not_change_a_bit(shape: tuple[int, int], group: int, symmetric: bool) -> None:
    x, element = heavy_tailed(*shape), integer(4, signed=symmetric)
    encoding = Encoding(element, (1, group), "float32", zero_point=None if symmetric else element)
    importance = torch.rand(shape[1])
    torch.set_num_threads(1)
    for weights in (None, importance):
        whole = run(x, encoding, importance=weights).clone()
        for count, step in ((1, 5), (2, shape[0]), (4, 17)):
            torch.set_num_threads(count)
            for start in range(0, shape[0], step):
                rows = range(start, min(start + step, shape[0]))
                part = run(x[rows.start : rows.stop], encoding, rows=rows, importance=weights, shape=shape)
                assert torch.equal(part.codes, whole.codes[rows.start : rows.stop])
                assert isinstance(part.scale, torch.Tensor)
                assert isinstance(whole.scale, torch.Tensor)
                assert torch.equal(part.scale, whole.scale[rows.start : rows.stop])


def test_neighbours_of_extreme_magnitude_do_not_change_a_bit() -> None:
    x = heavy_tailed(6, 128)
    for encoding in (G128, Encoding(integer(4, signed=False), (1, 128), "float32", integer(4, signed=False))):
        for rounding in ("search", "nearest"):
            alone = run(x[2:3], encoding, rounding).clone()
            for extreme in (1e-43, 1e36, 0.0):
                among = x * torch.tensor([extreme, extreme, 1, extreme, 1, extreme]).unsqueeze(1)
                beside = run(among, encoding, rounding)
                assert torch.equal(beside.codes[2:3], alone.codes)
                assert isinstance(beside.scale, torch.Tensor)
                assert isinstance(alone.scale, torch.Tensor)
                assert torch.equal(beside.scale[2:3], alone.scale)

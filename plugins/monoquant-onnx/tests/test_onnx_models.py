"""A trained convolutional net and a trained encoder: what quantization costs them, in onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from onnx_kit import Arrays, calibrated, cosine, operators, session

import monoquant_core as mq

Images = tuple[ModuleType, Arrays]
MEASURED = 12  #: sentences that embeddings are compared of


@pytest.fixture(scope="module")
def cifar(shared: Path) -> Images:
    spec = importlib.util.spec_from_file_location("resnet_cifar", shared / "models" / "resnet_cifar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, dict(np.load(shared / "data" / "cifar10_subset.npz"))


@pytest.fixture(scope="module")
def resnet(cifar: Images, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 graph, as --format onnx makes it of the module."""
    module = cifar[0].resnet20()
    module.load_state_dict(torch.load(shared / "models" / "resnet20_cifar10.pt", weights_only=True))
    path = tmp_path_factory.mktemp("resnet") / "resnet.onnx"
    mq.export(module.eval(), path, "onnx", example=torch.zeros(2, 3, 32, 32))
    return path


def scores(path: Path, images: np.ndarray[Any, Any], *, optimized: bool = True) -> np.ndarray[Any, Any]:
    made = session(path, optimized=optimized)
    name = made.get_inputs()[0].name
    return np.concatenate([made.run(None, {name: batch})[0] for batch in np.split(images, len(images) // 250)])


def test_a_static_resnet_keeps_its_accuracy(cifar: Images, resnet: Path, tmp_path: Path) -> None:
    module, data = cifar
    images, calibration = (module.preprocess(torch.from_numpy(data[key])).numpy() for key in ("test_x", "calib_x"))
    name = session(resnet).get_inputs()[0].name
    batches = [{name: calibration[start : start + 32]} for start in range(0, 256, 32)]
    path = tmp_path / "static.onnx"
    with mq.quantize(resnet, scheme="w8a8", stats=calibrated(resnet, batches, "percentile")) as model:
        model.save(path, "onnx")
    floats, fast = scores(resnet, images), scores(path, images)
    labels = data["test_y"]
    assert (floats.argmax(1) == labels).mean() == pytest.approx(0.8065)
    assert (fast.argmax(1) == labels).mean() >= 0.80
    assert (fast.argmax(1) == floats.argmax(1)).mean() >= 0.97
    assert cosine(fast[:250], scores(path, images[:250], optimized=False)) >= 0.999
    found = operators(path, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["Conv"], found["Add"]) == (19, 9, 0, 0), found
    assert path.stat().st_size < 0.3 * resnet.stat().st_size


def test_bad_calibration_data_are_warned_of_and_cost_accuracy(cifar: Images, resnet: Path, tmp_path: Path) -> None:
    """Noise in place of images, four images, and enough images: what is said, and what each is worth."""
    module, data = cifar
    images, good = (module.preprocess(torch.from_numpy(data[key])) for key in ("test_x", "calib_x"))
    noise = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 20
    floats = scores(resnet, images.numpy())
    said, error, right = {}, {}, {}
    for name, samples in {"noise": noise, "few": good[:4], "good": good[:256]}.items():
        stats = mq.calibrate(resnet, samples.split(32))
        said[name] = {finding.kind for finding in stats.findings}
        with mq.quantize(resnet, scheme="w8a8", stats=stats) as model:
            model.save(tmp_path / f"{name}.onnx", "onnx")
        found = scores(tmp_path / f"{name}.onnx", images.numpy())
        error[name] = float(np.square(found - floats).mean())
        right[name] = float((found.argmax(1) == data["test_y"]).mean())
    assert "alike" in said["noise"]
    assert "few" in said["few"]
    assert not said["good"] & {"alike", "few"}
    assert right["good"] >= 0.80
    assert right["noise"] < right["good"] - 0.05
    assert error["few"] > 1.3 * error["good"]
    assert error["noise"] > 10 * error["good"]


@pytest.fixture(scope="module")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 graph of all-MiniLM-L6-v2."""
    path = tmp_path_factory.mktemp("encoder") / "minilm.onnx"
    mq.export(minilm, path, "onnx")
    return path


@pytest.fixture(scope="module")
def sentences(minilm: Path, shared: Path) -> list[Arrays]:
    """Sentences of an encyclopedia as tokens, one at a time; the first ones are for measuring."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    lines = (shared / "data" / "wikitext2_test.txt").read_text().splitlines()
    chosen = [line.strip() for line in lines if len(line.split()) > 20][: MEASURED + 40]
    tokens = [tokenizer(line, truncation=True, max_length=128, return_tensors="np") for line in chosen]
    return [{name: np.asarray(values, np.int64) for name, values in found.items()} for found in tokens]


@pytest.fixture
def likeness(encoder: Path, sentences: list[Arrays]) -> Callable[..., float]:
    """Mean cosine of sentence embeddings to those of the float32 graph."""

    def embed(path: Path, *, optimized: bool) -> Iterator[np.ndarray[Any, Any]]:
        made = session(path, optimized=optimized)
        for feeds in sentences[:MEASURED]:
            yield made.run(None, feeds)[0].mean(1)

    def measure(path: Path, *, optimized: bool = True, against: Path = encoder) -> float:
        pairs = zip(embed(path, optimized=optimized), embed(against, optimized=True), strict=True)
        return float(np.mean([cosine(a, b) for a, b in pairs]))

    return measure


def quantized(source: Path, path: Path, scheme: str, **options: Any) -> Path:
    with mq.quantize(source, scheme=scheme, **options) as model:
        model.save(path, "onnx", force=True)
    return path


def products(path: Path) -> int:
    """Products with constant matrices."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    return sum(n.op_type in ("MatMul", "Gemm") and n.input[1] in constants for n in graph.node)


def test_an_encoder_with_dynamic_inputs_and_int8_embeddings(
    encoder: Path, likeness: Callable[..., float], tmp_path: Path
) -> None:
    path = quantized(encoder, tmp_path / "dynamic.onnx", "w8a8")
    assert path.stat().st_size <= 24_000_000
    assert likeness(path) >= 0.99
    assert likeness(path, optimized=False, against=path) >= 0.995
    found = operators(path, tmp_path)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == products(encoder) == 37, found


def test_an_encoder_with_four_bits_is_closer_than_onnxruntimes_own(
    encoder: Path, likeness: Callable[..., float], tmp_path: Path
) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    for symmetric in (True, False):
        options = {"group_size": 32, "symmetric": symmetric}
        path = quantized(encoder, tmp_path / "int4.onnx", "int4", options=options, keep=["*embeddings*"])
        found = operators(path, tmp_path)
        assert found["MatMulNBits"] == products(encoder), found
        peer = MatMulNBitsQuantizer(onnx.load(encoder), block_size=32, is_symmetric=symmetric)
        peer.process()
        onnx.save(peer.model.model, tmp_path / "peer.onnx")
        assert likeness(path) > likeness(tmp_path / "peer.onnx")
        assert likeness(path, optimized=False, against=path) >= 0.999


def test_an_encoder_with_calibrated_inputs(
    encoder: Path, sentences: list[Arrays], likeness: Callable[..., float], tmp_path: Path
) -> None:
    stats = calibrated(encoder, sentences[MEASURED:], "minmax")
    path = quantized(encoder, tmp_path / "static.onnx", "w8a8", stats=stats)
    assert likeness(path) >= 0.985
    found = operators(path, tmp_path)
    assert found["MatMulIntegerToFloat"] + found["QGemm"] == 37, found


def test_weights_alone_cost_next_to_nothing(encoder: Path, likeness: Callable[..., float], tmp_path: Path) -> None:
    path = quantized(encoder, tmp_path / "int8.onnx", "int8")
    assert likeness(path) >= 0.999

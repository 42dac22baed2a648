"""ONNX files in onnxruntime: speed, accuracy and size, against float32 and onnxruntime's own tools, in one run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import monoquant_core as mq
from benchmarks.accuracy import MISSING, models
from benchmarks.measure import MONOQUANT, Timing, interleaved, run_child
from benchmarks.results import Gate, Section, Table

Arrays = dict[str, np.ndarray[Any, Any]]

NOISE = 0.97  #: of a ratio that should be 1: what else runs on the machine moves it by more than two per cent
DYNAMIC_GATE, COSINE_GATE, STATIC_COSINE_GATE, SIZE_GATE, ACCURACY_GATE = 1.5, 0.99, 0.985, 24.0, 80.0
LARGE_GB, MEMORY_GATE = 2.3, 128.0

TOOLS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
"""Calibrations that both sides can do."""

logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)


def measure_cnn(temp: Path, *, rounds: int, images: int = 2000, rules: Sequence[str] = tuple(TOOLS)) -> Section:
    """ResNet-20 on CIFAR-10, static: both sides calibrate on the same 256 images with the same three rules."""
    title, text = (
        "ONNX: a convolutional net",
        """ResNet-20 on the 2000 test images of CIFAR-10 in onnxruntime on one core, activations calibrated on 256
training images. `quantize_static` is onnxruntime's own tool, with weights per channel and 7 bits, as ours; agreement is
with the classes that float32 predicts. Times are of single images and batches of 16, in turns. Where both tools write
what onnxruntime runs alike, the ratio is 1 but for noise, so the gate is a little below.""",
    )
    whats = ("accuracy, percent", "speed / float32", "speed / quantize_static", "best agreement / quantize_static's")
    if (found := _cifar()) is None:
        reason = MISSING["tiny Llama"]
        return Section(
            title, text, (), [Gate(f"ResNet-20 static: {w}", 1, "at least", "", None, reason=reason) for w in whats]
        )
    module, data, network = found
    source = temp / "resnet.onnx"
    mq.export(network, source, "onnx", example=torch.zeros(2, 3, 32, 32), force=True)
    name = _session(source).get_inputs()[0].name
    tests, calibration = (module.preprocess(torch.from_numpy(data[key])).numpy() for key in ("test_x", "calib_x"))
    tests, labels = tests[:images], data["test_y"][:images]
    batches = [{name: calibration[start : start + 32]} for start in range(0, 256, 32)]
    floats = _scores(source, tests)
    trials: dict[str, tuple[Path, float, float]] = {"float32": (source, _percent(floats, labels), 100.0)}
    for rule in rules:
        for tool, write in (("quantize_static", _ort_static), ("monoquant", _our_static)):
            path = temp / f"{tool}-{rule}.onnx"
            with _quiet():
                write(source, path, batches, rule)
            scores = _scores(path, tests)
            agreement = float((scores.argmax(1) == floats.argmax(1)).mean() * 100)
            trials[f"{tool}, {rule}"] = (path, _percent(scores, labels), agreement)
    rows, ratios = [], {}
    for batch in (1, 16):
        paths = {what: path for what, (path, _, _) in trials.items()}
        ratios[batch] = _times(paths, {name: tests[:batch]}, rounds)
    for what, (path, accuracy, agreement) in trials.items():
        speeds = [ratios[b]["float32"].best / ratios[b][what].best for b in (1, 16)]
        rows.append(
            (
                what,
                f"{path.stat().st_size / 1e6:.2f}",
                f"{accuracy:.2f}",
                f"{agreement:.2f}",
                *(f"{s:.2f}x" for s in speeds),
            )
        )
    chosen = "percentile" if "percentile" in rules else rules[0]
    ours, theirs = f"monoquant, {chosen}", f"quantize_static, {chosen}"
    best = {
        tool: max(a for what, (_, _, a) in trials.items() if what.startswith(tool))
        for tool in ("monoquant", "quantize")
    }
    gates = [
        Gate(f"ResNet-20 static: {whats[0]}", ACCURACY_GATE, "at least", " %", trials[ours][1]),
        _speed_gate(f"ResNet-20 static: {whats[1]}", 1.0, ratios[16]["float32"], ratios[16][ours]),
        _speed_gate(f"ResNet-20 static: {whats[2]}", NOISE, ratios[16][theirs], ratios[16][ours]),
        Gate(f"ResNet-20 static: {whats[3]}", 1.0, "at least", "x", best["monoquant"] / best["quantize"]),
    ]
    return Section(title, text, (Table(("file", "MB", "accuracy", "agreement", "1 image", "16 images"), rows),), gates)


def measure_encoder(temp: Path, *, rounds: int, sentences: int = 24) -> Section:
    """all-MiniLM-L6-v2: dynamic, static, and weights alone."""
    title, text = (
        "ONNX: an encoder",
        """all-MiniLM-L6-v2 in onnxruntime on one core: 128 tokens and one, in turns; cosines of mean-pooled embeddings
to float32's, of sentences of WikiText-2 one at a time. Files of ours have int8 embeddings unless it says otherwise.
The peers are onnxruntime's own tools: `quantize_dynamic` per channel, everything or matrix products alone, and
MatMulNBitsQuantizer.""",
    )
    whats = (
        "dynamic: speed / float32",
        "dynamic: speed / quantize_dynamic",
        "dynamic: cosine",
        "dynamic: size",
        "static: cosine",
    )
    folder, texts = models()["all-MiniLM-L6-v2"], _texts()
    if folder is None or texts is None:
        reason = MISSING["all-MiniLM-L6-v2" if folder is None else "tiny Llama"]
        return Section(title, text, (), [Gate(f"MiniLM {w}", 1, "at least", "", None, reason=reason) for w in whats])
    source = temp / "minilm.onnx"
    with _quiet():
        mq.export(folder, source, "onnx", force=True)
    feeds = _tokens(folder, texts, sentences + 60)
    measured, calibration = feeds[:sentences], feeds[sentences:]
    kept = ["*embeddings*"]
    stats = mq.calibrate(
        source,
        [{k: torch.from_numpy(v) for k, v in f.items()} for f in calibration],
        calibrator="minmax",
        format="onnx",
    )
    paths = {"float32": source}
    ours: dict[str, dict[str, Any]] = {
        "w8a8": {"scheme": "w8a8"},
        "w8a8, embeddings kept": {"scheme": "w8a8", "keep": kept},
        "w8a8, calibrated": {"scheme": "w8a8", "stats": stats},
        "int8": {"scheme": "int8"},
        "int4 g32": {"scheme": "int4", "options": {"group_size": 32}},
        "int4 g32, embeddings kept": {"scheme": "int4", "options": {"group_size": 32}, "keep": kept},
        "int4 g32 asymmetric, embeddings kept": {
            "scheme": "int4",
            "options": {"group_size": 32, "symmetric": False},
            "keep": kept,
        },
    }
    for what, how in ours.items():
        paths[what] = temp / f"{len(paths)}.onnx"
        with mq.quantize(source, **how) as model:
            model.save(paths[what], "onnx", force=True)
    with _quiet():
        paths |= _peers(source, temp)
    one = {key: values[:, :1] for key, values in measured[0].items()}
    long = {
        "input_ids": np.random.default_rng(0).integers(1000, 20000, (1, 128)),
        "attention_mask": np.ones((1, 128), np.int64),
        "token_type_ids": np.zeros((1, 128), np.int64),
    }
    times = {128: _times(paths, long, rounds), 1: _times(paths, one, rounds)}
    reference = _embeddings(source, measured)
    cosines = {
        what: float(np.mean([_cosine(a, b) for a, b in zip(_embeddings(path, measured), reference, strict=True)]))
        for what, path in paths.items()
    }
    sizes = {what: path.stat().st_size / 1e6 for what, path in paths.items()}
    rows = [
        (
            what,
            f"{sizes[what]:.1f}",
            f"{cosines[what]:.4f}",
            *(f"{times[n]['float32'].best / times[n][what].best:.2f}x" for n in (128, 1)),
        )
        for what in paths
    ]
    gates = [
        _speed_gate(f"MiniLM {whats[0]}", DYNAMIC_GATE, times[128]["float32"], times[128]["w8a8"]),
        _speed_gate(f"MiniLM {whats[1]}", NOISE, times[128]["quantize_dynamic"], times[128]["w8a8"]),
        Gate(f"MiniLM {whats[2]}", COSINE_GATE, "at least", "", cosines["w8a8"]),
        Gate(f"MiniLM {whats[3]}", SIZE_GATE, "at most", " MB", sizes["w8a8"]),
        Gate(f"MiniLM {whats[4]}", STATIC_COSINE_GATE, "at least", "", cosines["w8a8, calibrated"]),
    ]
    for kind in ("symmetric", "asymmetric"):
        mine = "int4 g32, embeddings kept" if kind == "symmetric" else "int4 g32 asymmetric, embeddings kept"
        gates.append(
            Gate(
                f"MiniLM int4 g32 {kind}: error of the cosine / MatMulNBitsQuantizer's",
                1.0,
                "at most",
                "x",
                (1 - cosines[mine]) / (1 - cosines[f"MatMulNBitsQuantizer, {kind}"]),
            )
        )
    return Section(title, text, (Table(("file", "MB", "cosine", "128 tokens", "1 token"), rows),), gates)


def measure_large(temp: Path, *, gigabytes: float) -> Section:
    """A file above what protobuf holds: written, loaded and run."""
    source, out = temp / "large.onnx", temp / "large-out.onnx"
    nbytes = _write_large(source, gigabytes)
    options = () if gigabytes > 2 else ("--max-inline", "0")
    plain = run_child(
        [*MONOQUANT, "export", source, "-o", out, "--format", "onnx", "--json", "--threads", "2", *options]
    )
    report = json.loads(plain.output)
    began = time.perf_counter()
    made = _session(out)
    loaded = time.perf_counter() - began
    width = made.get_inputs()[0].shape[1]
    began = time.perf_counter()
    made.run(None, {"x": np.ones((1, width), np.float32)})
    ran = time.perf_counter() - began
    written = out.stat().st_size + sum(path.stat().st_size for path in temp.glob("large-out.onnx.*.data"))
    peak = (report["peak_bytes"] - report["start_bytes"]) / 1e6
    rows = [
        (
            f"{nbytes / 1e9:.2f}",
            f"{written / 1e9:.2f}",
            f"{plain.wall:.1f} s",
            f"{peak:.0f} MB",
            f"{loaded:.2f} s",
            f"{ran:.2f} s",
        )
    ]
    return Section(
        "ONNX: more than 2 GB",
        """A graph with external data, written again with its data beside it: wall time of the command, its peak memory
above start-up, and the time onnxruntime takes to load the file and to run it once.""",
        (Table(("GB before", "GB after", "export", "peak", "load", "run"), rows),),
        [Gate("ONNX above 2 GB: peak above start-up", MEMORY_GATE, "at most", " MB", peak)],
    )


def _cifar() -> tuple[ModuleType, Arrays, torch.nn.Module] | None:
    shared = _shared()
    path = shared / "models" / "resnet_cifar.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("resnet_cifar", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.resnet20()
    network.load_state_dict(torch.load(shared / "models" / "resnet20_cifar10.pt", weights_only=True))
    return module, dict(np.load(shared / "data" / "cifar10_subset.npz")), network.eval()


def _shared() -> Path:
    return Path(os.environ.get("MONOQUANT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _texts() -> list[str] | None:
    path = _shared() / "data" / "wikitext2_test.txt"
    if not path.is_file():
        return None
    return [line.strip() for line in path.read_text().splitlines() if len(line.split()) > 20]


def _tokens(folder: Path, texts: list[str], count: int) -> list[Arrays]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [tokenizer(text, truncation=True, max_length=128, return_tensors="np") for text in texts[:count]]
    return [{name: np.asarray(values, np.int64) for name, values in tokens.items()} for tokens in found]


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Batches as onnxruntime's tool wants them."""

    def __init__(self, batches: list[Arrays]) -> None:
        self._left: Iterator[Arrays] = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def _ort_static(source: Path, path: Path, batches: list[Arrays], rule: str) -> None:
    quantize_static(
        str(source),
        str(path),
        _Batches(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        calibrate_method=TOOLS[rule],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _our_static(source: Path, path: Path, batches: list[Arrays], rule: str) -> None:
    tensors = [{name: torch.from_numpy(values) for name, values in batch.items()} for batch in batches]
    stats = mq.calibrate(source, tensors, calibrator=rule, format="onnx")
    with mq.quantize(source, scheme="w8a8", stats=stats) as model:
        model.save(path, "onnx", force=True)


def _peers(source: Path, temp: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for what, only in (("quantize_dynamic", None), ("quantize_dynamic, MatMul", ["MatMul"])):
        paths[what] = temp / f"dynamic-{len(paths)}.onnx"
        quantize_dynamic(
            str(source), str(paths[what]), weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=only
        )
    for what, symmetric in (("symmetric", True), ("asymmetric", False)):
        made = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=symmetric)
        made.process()
        paths[f"MatMulNBitsQuantizer, {what}"] = temp / f"nbits-{what}.onnx"
        onnx.save(made.model.model, paths[f"MatMulNBitsQuantizer, {what}"])
    return paths


def _session(path: Path) -> InferenceSession:
    options = SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _times(paths: Mapping[str, Path], feeds: Arrays, rounds: int) -> dict[str, Timing]:
    sessions = {what: _session(path) for what, path in paths.items()}

    def runs(made: InferenceSession) -> Callable[[], object]:
        return lambda: made.run(None, feeds)

    return interleaved({what: runs(made) for what, made in sessions.items()}, rounds, time.perf_counter)


def _scores(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    made = _session(path)
    name = made.get_inputs()[0].name
    return np.concatenate([made.run(None, {name: images[at : at + 250]})[0] for at in range(0, len(images), 250)])


def _embeddings(path: Path, feeds: list[Arrays]) -> list[np.ndarray[Any, Any]]:
    made = _session(path)
    return [made.run(None, one)[0].mean(1) for one in feeds]


def _percent(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    return float((scores.argmax(1) == labels).mean() * 100)


def _cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _speed_gate(what: str, bound: float, slow: Timing, fast: Timing) -> Gate:
    return Gate(what, bound, "at least", "x", slow.best / fast.best, slow.median / fast.median)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tools that print their progress."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)


def _write_large(path: Path, gigabytes: float) -> int:
    """A chain of equal products in float32, its data in a file beside it."""
    count = 8
    width = int((gigabytes * 1e9 / 4 / count) ** 0.5)
    block = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32) / width**0.5
    data = path.with_suffix(".weights")
    with data.open("wb") as file:
        for _ in range(count):
            file.write(block.data)
    weights = []
    for number in range(count):
        weight = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[width, width])
        weight.data_location = TensorProto.EXTERNAL
        place = {"location": data.name, "offset": number * block.nbytes, "length": block.nbytes}
        for key, value in place.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    names = ["x", *(f"h{number}" for number in range(count - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return data.stat().st_size

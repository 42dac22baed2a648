"""Small graphs, sessions of onnxruntime, and a check of every Q/DQ value: for tests of what is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")

Arrays = dict[str, np.ndarray[Any, Any]]


def normal(*shape: int, seed: int = 0, scale: float = 0.1) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: Arrays,
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: list[str],
    *,
    opset: int = 21,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *found) for name, found in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def encoder(path: Path, *, opset: int = 21) -> Path:
    """Embeddings, q, k and v of one input, a sum, a mean over tokens and a Gemm as the head of a classifier."""
    node = helper.make_node
    weights = {
        "embed.weight": normal(600, 64, seed=1),
        **{f"{n}.weight": normal(64, 96, seed=i) for i, n in enumerate(("query", "key", "value"), 2)},
        "down.weight": normal(96, 64, seed=5),
        "down.bias": normal(64, seed=6),
        "dense.weight": normal(32, 64, seed=7),
        "dense.bias": normal(32, seed=8),
    }
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [
        node("Gather", ["embed.weight", "ids"], ["rows"]),
        node("Tanh", ["rows"], ["x"]),
        *(node("MatMul", ["x", f"{n}.weight"], [n]) for n in ("query", "key", "value")),
        node("Add", ["query", "key"], ["sum"]),
        node("Mul", ["sum", "value"], ["product"]),
        node("MatMul", ["product", "down.weight"], ["down"]),
        node("Add", ["down", "down.bias"], ["biased"]),
        node("ReduceMean", ["biased", "axes"], ["mean"], keepdims=0),
        node("Gemm", ["mean", "dense.weight", "dense.bias"], ["y"], transB=1),
    ]
    ids = {"ids": (TensorProto.INT64, ["batch", "tokens"])}
    return save_model(path, nodes, {**weights, "axes": numpy_helper.to_array(axes)}, ids, ["y"], opset=opset)


def cnn(path: Path, *, opset: int = 21, width: int = 16) -> Path:
    """Convolutions with a residual sum, pooling, and a Gemm."""
    node = helper.make_node
    weights = {
        "stem.weight": normal(width, 3, 3, 3, seed=1, scale=0.3),
        "stem.bias": normal(width, seed=2),
        "a.weight": normal(width, width, 3, 3, seed=3),
        "a.bias": normal(width, seed=4),
        "b.weight": normal(width, width, 3, 3, seed=5),
        "b.bias": normal(width, seed=6),
        "fc.weight": normal(10, width, seed=7),
        "fc.bias": normal(10, seed=8),
    }
    nodes = [
        node("Conv", ["x", "stem.weight", "stem.bias"], ["stem"], pads=[1] * 4),
        node("Relu", ["stem"], ["stem_relu"]),
        node("MaxPool", ["stem_relu"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["pool", "a.weight", "a.bias"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["a_relu"]),
        node("Conv", ["a_relu", "b.weight", "b.bias"], ["b"], pads=[1] * 4),
        node("Add", ["b", "pool"], ["sum"]),
        node("Relu", ["sum"], ["sum_relu"]),
        node("GlobalAveragePool", ["sum_relu"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    return save_model(path, nodes, weights, {"x": (TensorProto.FLOAT, ["n", 3, 16, 16])}, ["y"], opset=opset)


def session(path: Path, *, optimized: bool = True, save: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, feeds: Arrays, *, optimized: bool = True) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = session(path, optimized=optimized).run(None, feeds)[0]
    return found


def operators(path: Path, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a file."""
    session(path, save=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def check_quantizing_nodes(path: Path, feeds: Arrays) -> int:
    """Every Q/DQ node, without optimizations, gives what onnx's reference implementation gives for the same inputs.

    :return: how many there are.
    """
    model = onnx.load(path)
    known = {t.name: t for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in QUANTIZING]
    # 4-bit values cannot be outputs of a session: transposed constants go into the node's own model.
    turned = {n.output[0]: n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in known}
    inside = {*known, *turned}
    wanted = dict.fromkeys(name for n in nodes for name in (*n.input, *n.output) if name not in inside)
    del model.graph.output[:]
    del model.graph.value_info[:]
    typed = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    typed |= {v.name: v for v in model.graph.input}
    model.graph.output.extend(typed[name] for name in wanted)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in made.get_outputs()]
    values = dict(zip(names, made.run(None, feeds), strict=True))
    for node in nodes:
        inputs = [n for n in node.input if n not in inside]
        before = [turned[n] for n in node.input if n in turned]
        constants = dict.fromkeys(n for one in (*before, node) for n in one.input if n in known)
        graph = helper.make_graph(
            [*before, node],
            "one",
            [typed[n] for n in inputs],
            [typed[n] for n in node.output],
            [known[n] for n in constants],
        )
        one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        for name, found in zip(
            node.output, ReferenceEvaluator(one).run(None, {n: values[n] for n in inputs}), strict=True
        ):
            assert values[name].dtype == found.dtype, name
            assert np.array_equal(values[name], found), f"{node.op_type} {name}"
    return len(nodes)


def calibrated(path: Path, batches: list[Arrays], calibrator: str = "minmax", points: list[str] | None = None) -> Any:
    """Statistics of a graph's values over batches."""
    import torch
    from monoquant_onnx.source import open_onnx

    from monoquant_core.observers import Observer
    from monoquant_core.plugins import load_registry

    declared = load_registry().calibrators[calibrator]
    observers: dict[str, Observer] = {}

    def observe(point: str, values: torch.Tensor, axis: int = -1) -> None:
        made = observers.setdefault(point, Observer(lambda: declared.load()(declared.options()), axis))
        made.observe(values)

    source = open_onnx(path)
    runner = source.info.graph.runner(points)
    try:
        for batch in batches:
            runner.run({name: torch.from_numpy(values) for name, values in batch.items()}, observe)
    finally:
        runner.close()
        source.close()
    return {point: observer.stats() for point, observer in observers.items()}

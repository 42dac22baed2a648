"""BatchNorms of .onnx files go into the layers before them, and the graph computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monoquant_onnx.source import open_onnx
from onnx import TensorProto, helper, numpy_helper

from monoquant_core import rows as r

RNG = np.random.default_rng(0)


def save(path: Path, layer: str, weight: tuple[int, ...], channels: int, *, bias: bool, **attributes: Any) -> Path:
    """A layer, a BatchNorm, another BatchNorm, a Relu."""
    arrays = {"layer.weight": RNG.normal(size=weight).astype(np.float32)}
    if bias:
        arrays["layer.bias"] = RNG.normal(size=channels).astype(np.float32)
    for n in ("bn1", "bn2"):
        for part in ("weight", "bias", "mean"):
            arrays[f"{n}.{part}"] = RNG.normal(size=channels).astype(np.float32)
        arrays[f"{n}.var"] = RNG.uniform(0.5, 2, channels).astype(np.float32)
    norms = [
        helper.make_node(
            "BatchNormalization",
            [source, *(f"{n}.{p}" for p in ("weight", "bias", "mean", "var"))],
            [made],
            epsilon=1e-3,
        )
        for n, source, made in (("bn1", "l", "n1"), ("bn2", "n1", "n2"))
    ]
    inputs = ["x", "layer.weight"] + (["layer.bias"] if bias else [])
    nodes = [helper.make_node(layer, inputs, ["l"], **attributes), *norms, helper.make_node("Relu", ["n2"], ["y"])]
    rank = len(weight)
    shape = ["n", weight[1 if layer == "Conv" or attributes.get("transB") else 0] * attributes.get("group", 1)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape + [7] * (rank - 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize(
    ("layer", "weight", "channels", "options"),
    [
        ("Conv", (6, 4, 3, 3), 6, {"bias": True}),
        ("Conv", (6, 4, 3), 6, {"bias": False}),
        ("Conv", (6, 2, 3, 3), 6, {"bias": False, "group": 2}),
        ("ConvTranspose", (4, 6, 3, 3), 6, {"bias": True}),
        ("Gemm", (6, 8), 6, {"bias": True, "transB": 1}),
        ("Gemm", (8, 6), 6, {"bias": False}),
    ],
)
def test_the_graph_computes_what_it_did(
    tmp_path: Path, layer: str, weight: tuple[int, ...], channels: int, options: dict[str, Any]
) -> None:
    path = save(tmp_path / "x.onnx", layer, weight, channels, **options)
    source = open_onnx(path)
    assert [n.op_type for n in source.graph.model.graph] == [layer, "Relu"]
    assert {s.name for s in source.specs()} == {"layer.weight", "layer.bias"}
    assert any("2 BatchNorm folded" in note for note in source.info.notes)
    session = onnxruntime.InferenceSession(str(path))
    shape = [3 if not isinstance(n, int) else n for n in session.get_inputs()[0].shape]
    x = torch.randn(shape)
    (expected,) = session.run(None, {"x": x.numpy()})
    with source.graph.runner(()) as runner:
        (found,) = runner.run(x).values()
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    spec = source.specs()[0]
    whole = source.read("layer.weight", r.all_rows(spec.shape))
    assert isinstance(whole, torch.Tensor)
    pieces = [source.read("layer.weight", rows) for rows in r.chunks(spec.shape, 1, 1)]
    assert torch.equal(torch.cat([p.flatten() for p in pieces if isinstance(p, torch.Tensor)]), whole.flatten())
    source.close()


@pytest.mark.parametrize("options", [{"group": 2}, {"shared": True}, {"output": True}])
def test_what_cannot_go_in_stays(tmp_path: Path, options: dict[str, bool]) -> None:
    """Groups of a transposed convolution; a weight, or a result, that something else uses as well."""
    group = {"group": 2} if "group" in options else {}
    path = save(tmp_path / "x.onnx", "ConvTranspose", (4, 3, 3, 3), 6 if group else 3, bias=True, **group)
    model = onnx.load(str(path))
    if "output" in options:
        model.graph.output.append(helper.make_tensor_value_info("l", TensorProto.FLOAT, None))
    if "shared" in options:
        model.graph.node.append(helper.make_node("ReduceSum", ["layer.weight"], ["w"]))
        model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, None))
    onnx.save_model(model, str(path))
    source = open_onnx(path)
    assert [n.op_type for n in source.graph.model.graph].count("BatchNormalization") == 2
    assert not source.graph.folded
    source.close()

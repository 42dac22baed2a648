"""Files that onnxruntime runs: every mode on small graphs, read back exactly, and what ONNX cannot hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from onnx_kit import (
    calibrated,
    check_quantizing_nodes,
    cnn,
    cosine,
    encoder,
    normal,
    operators,
    run,
    save_model,
    session,
)

import monoquant_core as mq
from monoquant_core.encoding import FULL, INT4, INT8, UINT8, Encoding
from monoquant_core.errors import PlanError, UnsupportedEncodingError
from monoquant_core.tensor import QuantizedTensor, same_bits

IDS = {"ids": np.random.default_rng(0).integers(0, 600, (3, 7))}
IMAGES = {"x": normal(8, 3, 16, 16, seed=9, scale=1.0)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder(tmp_path_factory.mktemp("text") / "encoder.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cnn(tmp_path_factory.mktemp("images") / "cnn.onnx")


def save(source: Path, path: Path, scheme: str, **options: Any) -> mq.Report:
    settings = {key: options.pop(key) for key in ("format_options", "force") if key in options}
    with mq.quantize(source, scheme=scheme, **options) as model:
        return model.save(path, "onnx", **settings)


def tensors(path: Path) -> dict[str, QuantizedTensor | torch.Tensor]:
    with mq.load(path) as model:
        return dict(model.tensors())


def assert_reads_back(source: Path, path: Path, scheme: str, **options: Any) -> None:
    """What is read from the file is what the IR has, bit for bit, parameters and all."""
    found = tensors(path)
    with mq.quantize(source, scheme=scheme, **options) as model:
        plan = model.plan("onnx", destination=path.name)
        for step in plan.steps:
            name = step.placed.output.name
            if step.placed.output.transform is None:
                from monoquant_core.engine import compute

                wanted, back = compute(step, model.source), found[name]
                if isinstance(wanted, QuantizedTensor):
                    assert isinstance(back, QuantizedTensor), name
                    assert back.equal(wanted), name
                else:
                    assert isinstance(back, torch.Tensor), name
                    assert same_bits(back, wanted), name


def test_weights_only_are_the_irs_in_onnxruntime_and_the_reference(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    report = save(text, path, "int8")
    assert report.nbytes == path.stat().st_size
    onnx.checker.check_model(path, full_check=True)
    assert check_quantizing_nodes(path, IDS) == 6
    exact, fast, floats = (run(path, IDS, optimized=False), run(path, IDS), run(text, IDS))
    assert cosine(exact, floats) > 0.999
    assert cosine(exact, fast) > 0.999
    model = onnx.load(path)
    assert {n.op_type for n in model.graph.node} - {n.op_type for n in onnx.load(text).graph.node} == {
        "DequantizeLinear"
    }
    assert_reads_back(text, path, "int8")


def test_blocks_go_straight_into_products_so_that_onnxruntime_joins_them(text: Path, tmp_path: Path) -> None:
    for options in ({"group_size": 32}, {"group_size": 16, "symmetric": False}):
        path = tmp_path / "q.onnx"
        save(text, path, "int4", options=options, force=True)
        found = operators(path, tmp_path)
        assert found["MatMulNBits"] == 5, found  # four MatMuls and the Gemm, whose weight is transposed
        assert not {"MatMul", "Gemm", "Transpose"} & set(found)
        assert check_quantizing_nodes(path, IDS) == 6
        assert cosine(run(path, IDS, optimized=False), run(text, IDS)) > 0.97
        assert cosine(run(path, IDS, optimized=False), run(path, IDS)) > 0.999
        assert_reads_back(text, path, "int4", options=options)


def test_inputs_are_quantized_once_at_run_time(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    report = save(text, path, "w8a8")
    nodes = [n.op_type for n in onnx.load(path).graph.node]
    assert nodes.count("MatMulInteger") == 5
    assert nodes.count("DynamicQuantizeLinear") == 3, "query, key and value share one"
    assert any("DynamicQuantizeLinear" in note for note in report.notes)
    assert check_quantizing_nodes(path, IDS) == 4
    found = operators(path, tmp_path)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 5
    assert cosine(run(path, IDS), run(text, IDS)) > 0.995
    assert cosine(run(path, IDS), run(path, IDS, optimized=False)) > 0.9999
    assert_reads_back(text, path, "w8a8")
    with mq.load(path) as model:
        activations = {s.name: s.activation for s in model.source.specs() if s.activation is not None}
    assert set(activations) == {f"{n}.weight" for n in ("query", "key", "value", "down", "dense")}
    assert all(a.dynamic and a.granularity == "tensor" for a in activations.values())


def test_rows_of_embeddings_are_dequantized_when_they_are_looked_up(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    save(text, path, "int4", options={"group_size": 32})
    model = onnx.load(path)
    (gather,) = [n for n in model.graph.node if n.op_type == "Gather" and "embed.weight" in n.input]
    (dequantize,) = [n for n in model.graph.node if n.input[0] == gather.output[0]]
    assert dequantize.op_type == "DequantizeLinear"
    assert next(t for t in model.graph.initializer if t.name == "embed.weight").data_type == TensorProto.INT8
    kept = tmp_path / "kept.onnx"
    save(text, kept, "int4", options={"group_size": 32}, keep=["embed*"])
    assert kept.stat().st_size - path.stat().st_size > 600 * 64 * 2.8
    rule = {"match": "embed*", "scheme": "int8", "options": {"granularity": "tensor"}}
    recipe = {"base": "none", "rules": [rule, {"match": "*", "scheme": "keep"}]}
    save(text, path, "", recipe=recipe, force=True)
    assert check_quantizing_nodes(path, IDS) == 1
    assert_reads_back(text, path, "", recipe=recipe)


def test_a_table_that_is_looked_up_and_multiplied_with(tmp_path: Path) -> None:
    """As where an output layer is tied to the embeddings: rows are looked up, the product takes all of it."""
    node = helper.make_node
    nodes = [
        node("Gather", ["e", "ids"], ["x"]),
        node("Transpose", ["e"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["y"]),
    ]
    ids = {"ids": (TensorProto.INT64, ["batch", "tokens"])}
    source = save_model(tmp_path / "m.onnx", nodes, {"e": normal(600, 64, seed=1)}, ids, ["y"])
    for granularity, options in (("channel", {}), ("group", {"group_size": 32}), ("tensor", {})):
        path = tmp_path / f"{granularity}.onnx"
        rule = {"match": "e", "scheme": "int8", "options": {"granularity": granularity, **options}}
        recipe = {"base": "none", "rules": [rule]}
        save(source, path, "", recipe=recipe)
        onnx.checker.check_model(path, full_check=True)
        assert check_quantizing_nodes(path, IDS) == 2
        assert cosine(run(path, IDS), run(source, IDS)) > 0.999
        assert_reads_back(source, path, "", recipe=recipe)


def test_a_finished_file_is_written_again_with_the_same_codes(text: Path, tmp_path: Path) -> None:
    for scheme in ("w8a8", "int4"):
        first, again = tmp_path / f"{scheme}.onnx", tmp_path / f"{scheme}-again.onnx"
        save(text, first, scheme, options={"group_size": 32} if scheme == "int4" else {})
        mq.export(first, again, "onnx")
        ours, theirs = tensors(first), tensors(again)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            other = theirs[name]
            assert value.equal(other) if isinstance(value, QuantizedTensor) else same_bits(value, other), name
        assert np.array_equal(run(first, IDS, optimized=False), run(again, IDS, optimized=False))


def test_data_lie_beside_the_file_where_it_would_be_too_large(text: Path, tmp_path: Path) -> None:
    inline, outside = tmp_path / "one.onnx", tmp_path / "two.onnx"
    save(text, inline, "int8")
    report = save(text, outside, "int8", format_options={"max_inline": 0})
    (data,) = tmp_path.glob("two.onnx.*.data")
    assert report.nbytes == outside.stat().st_size + data.stat().st_size
    assert outside.stat().st_size < 8_000
    onnx.checker.check_model(outside, full_check=True)
    assert np.array_equal(run(inline, IDS), run(outside, IDS))
    assert_reads_back(text, outside, "int8")
    save(text, outside, "int4", options={"group_size": 32}, format_options={"max_inline": 0}, force=True)
    (other,) = tmp_path.glob("two.onnx.*.data")
    assert other != data
    save(text, outside, "int8", force=True)
    assert list(tmp_path.glob("two.onnx.*.data")) == []
    assert outside.read_bytes() == inline.read_bytes()


def test_opsets_are_raised_only_where_an_encoding_needs_it(tmp_path: Path) -> None:
    old = cnn(tmp_path / "old.onnx", opset=13)
    found = {}
    for scheme, options in (("int8", {}), ("int4", {"granularity": "channel"})):
        path = tmp_path / f"{scheme}.onnx"
        save(old, path, scheme, options=options)
        found[scheme] = onnx.load(path).opset_import[0].version
        onnx.checker.check_model(path, full_check=True)
        assert cosine(run(path, IMAGES, optimized=False), run(old, IMAGES)) > 0.8
        assert_reads_back(old, path, scheme, options=options)
    assert found == {"int8": 13, "int4": 21}


def test_graphs_of_half_floats_compute_in_them(tmp_path: Path) -> None:
    weight = normal(64, 32).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 32])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    source, path = tmp_path / "half.onnx", tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), source)
    report = save(source, path, "w8a8")
    assert any("left out" in note for note in report.notes), "DynamicQuantizeLinear takes float32 only"
    feeds = {"x": normal(4, 64, seed=3, scale=1.0).astype(np.float16)}
    report = save(source, path, "w8a8", stats=calibrated(source, [feeds]), force=True)
    assert any("left out" in note for note in report.notes), "so do integer products"
    assert run(path, feeds).dtype == np.float16
    assert cosine(run(path, feeds), run(source, feeds)) > 0.999
    assert_reads_back(source, path, "int8")


REFUSED = {
    "int5": "w: int5[128x1]*float32: ONNX has no integers of 5 bits",
    "Q4_1": "DequantizeLinear has zero points and no offsets",
    "IQ4_NL": "ONNX has no codebooks",
    "Q6_K": "ONNX has no integers of 6 bits",
}


@pytest.mark.parametrize("scheme", sorted(REFUSED))
def test_what_onnx_cannot_hold_is_refused_by_name(scheme: str, tmp_path: Path) -> None:
    node = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = {"x": (TensorProto.FLOAT, ["n", 256])}
    source = save_model(tmp_path / "m.onnx", node, {"w": normal(256, 256)}, inputs, ["y"])
    if f"monoquant-{'gguf' if scheme != 'int5' else 'int'}" not in {p.distribution for p in mq.load_registry().loaded}:
        pytest.skip(f"no plugin has {scheme}")
    with pytest.raises(UnsupportedEncodingError) as refused:
        # As a rule: a recipe of the same name would take its place as --scheme.
        save(source, tmp_path / "q.onnx", "", recipe={"base": "none", "rules": [{"match": "w", "scheme": scheme}]})
    assert REFUSED[scheme] in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_blocks_along_two_axes_and_half_scales_become_finer_and_float32(tmp_path: Path) -> None:
    """As DeepSeek's fp8 has them; values stay the same, and onnxruntime computes them."""
    from monoquant_onnx.exporter import OnnxExporter
    from monoquant_onnx.plugin import OnnxOptions

    from monoquant_core.exporters import Output, Repacks
    from monoquant_core.schemes import Proposal

    out = Output("w", (64, 96), "float32", ("w",))
    cases = {
        Encoding(INT8, (32, 32), "float32"): Encoding(INT8, (1, 32), "float32"),
        Encoding(INT4, (1, 32), "float16"): Encoding(INT4, (1, 32), "float32"),
        Encoding(UINT8, (1, FULL), "bfloat16", zero_point=UINT8): Encoding(
            UINT8, (1, FULL), "float32", zero_point=UINT8
        ),
    }
    for encoding, wanted in cases.items():
        verdict = OnnxExporter(OnnxOptions()).verdict(out, Proposal(encoding))
        assert isinstance(verdict, Repacks), encoding
        assert (verdict.encoding, verdict.exact) == (wanted, True)


def test_convolutions_stay_weights_without_calibration(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    report = save(images, path, "w8a8")
    assert any("activations are left out" in note for note in report.notes)
    assert cosine(run(path, IMAGES), run(images, IMAGES)) > 0.999
    assert_reads_back(images, path, "w8a8")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "monoquant_core.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=120)


def as_torch_has_it(path: Path) -> dict[str, torch.Tensor]:
    """The graph's weights as a checkpoint of the same model: matrices as ``[outputs, inputs]``."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    turned = ("query.weight", "key.weight", "value.weight", "down.weight")
    floats = {name: a.T if name in turned else a for name, a in arrays.items() if a.dtype == np.float32}
    return {name: torch.from_numpy(array.copy()) for name, array in floats.items()}


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {}), ("int4", {"group_size": 32}), ("int4", {"group_size": 32, "symmetric": False})],
)
def test_a_finished_checkpoint_goes_onto_a_graph_with_its_codes(
    text: Path, tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    finished, path = tmp_path / "finished.safetensors", tmp_path / "q.onnx"
    with mq.quantize(as_torch_has_it(text), scheme=scheme, options=options) as model:
        model.save(finished, "safetensors")
    report = mq.export(finished, path, "onnx", format_options={"graph": str(text)})
    assert report.nbytes == path.stat().st_size
    before, after = tensors(finished), tensors(path)
    for name in ("query.weight", "key.weight", "value.weight", "down.weight", "dense.weight"):
        ours, theirs = before[name], after[name]
        assert isinstance(ours, QuantizedTensor)
        assert isinstance(theirs, QuantizedTensor)
        turned = name != "dense.weight"
        assert torch.equal(theirs.codes, ours.codes.T if turned else ours.codes)
        assert torch.equal(theirs.dequantize(), ours.dequantize().T if turned else ours.dequantize())
    found = operators(path, tmp_path)
    assert found["MatMulNBits"] == (5 if scheme == "int4" else 4), found
    assert cosine(run(path, IDS), run(text, IDS)) > 0.97


def test_what_has_no_graph_says_how_to_get_one(text: Path, tmp_path: Path) -> None:
    state, out = as_torch_has_it(text), tmp_path / "q.onnx"
    floats, finished = tmp_path / "floats.safetensors", tmp_path / "finished.safetensors"
    save_file(state, floats)
    with mq.quantize(state, scheme="int8") as model:
        model.save(finished, "safetensors")
    cases = [
        (floats, str(text), "--graph is for finished files"),
        (finished, "", "is quantized already, and ONNX needs the graph of its model"),
        (finished, str(tmp_path / "none.onnx"), "none.onnx: no such file"),
    ]
    for source, graph, message in cases:
        with pytest.raises(PlanError, match=message) as refused, mq.load(source) as model:
            model.save(out, "onnx", format_options={"graph": graph})
        assert not out.exists()
        assert graph or "--graph model.onnx" in refused.value.hint


def test_the_command_plans_and_writes_the_same_sizes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    with mq.quantize(text, scheme="w8a8") as model:
        planned = model.plan("onnx").bytes_after
    done = command("quantize", text, "-o", out, "--format", "onnx", "--scheme", "w8a8", "--json")
    assert done.returncode == 0, done.stderr
    assert planned == json.loads(done.stdout)["bytes"] == out.stat().st_size
    again = command("quantize", text, "-o", out, "--format", "onnx", "--scheme", "w8a8")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)


def test_weights_in_branches_and_weights_that_are_outputs(tmp_path: Path) -> None:
    """Products within an If take what is dequantized outside of it; what the graph gives out is not quantized."""

    def branch(name: str, weight: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("MatMul", ["x", weight], [f"{name}_y"])], name, [], [out])

    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch("then", "a"), else_branch=branch("else", "b")),
        helper.make_node("MatMul", ["x", "o"], ["z"]),
    ]
    weights = {name: normal(64, 32, seed=i) for i, name in enumerate("abo")}
    inputs = {"x": (TensorProto.FLOAT, ["n", 64]), "c": (TensorProto.BOOL, [])}
    source = save_model(tmp_path / "m.onnx", nodes, weights, inputs, ["y", "z", "o"])
    for scheme in ("int8", "w8a8"):
        path = tmp_path / f"{scheme}.onnx"
        with pytest.raises(UnsupportedEncodingError, match="o: the graph gives it out as it is"):
            save(source, path, scheme)
        save(source, path, scheme, keep=["o"])
        for condition in (True, False):
            feeds = {"x": normal(5, 64, seed=7, scale=1.0), "c": np.array(condition)}
            exact, floats = (session(p, optimized=False).run(None, feeds) for p in (path, source))
            for ours, theirs in zip(exact, floats, strict=True):
                assert ours.dtype == np.float32
                assert cosine(ours, theirs) > 0.999
        assert_reads_back(source, path, scheme, keep=["o"])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("scheme", ["int4 --no-symmetric", "fp8", "int8"])
def test_memory_of_blocks_along_the_first_axis_is_predicted(scheme: str, tmp_path: Path) -> None:
    """Their elements do not follow one another, so that searches work on copies."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    save_model(tmp_path / "m.onnx", nodes, {"w": normal(2048, 2048)}, {"x": (TensorProto.FLOAT, ["n", 2048])}, ["y"])
    words = ["quantize", tmp_path / "m.onnx", "-o", tmp_path / "q.onnx", "--scheme", *scheme.split(), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "monoquant_core.cli", *map(str, words), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 < report["peak_bytes"] - report["start_bytes"] <= report["predicted_bytes"]

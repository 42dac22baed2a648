"""ONNX files that are wrong in every way, each refused in one line; and good ones of every kind, read exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monoquant_onnx.fold
import monoquant_onnx.parsing
import monoquant_onnx.recognise  # noqa: F401 - memory is measured without imports
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monoquant_onnx.source import open_onnx
from monoquant_onnx.wire import INLINE
from onnx import TensorProto, helper, numpy_helper

from monoquant_core import rows as r
from monoquant_core.errors import SourceError

W = np.arange(32 * 40, dtype=np.float32).reshape(32, 40)


def _tag(number: int) -> bytes:
    return bytes([number << 3 | 2])


def _length(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensor(array: np.ndarray[Any, Any] = W, name: str = "w", **fields: Any) -> TensorProto:
    proto = numpy_helper.from_array(array, name)
    for key, value in fields.items():
        if key == "dims":
            proto.dims[:] = value
        else:
            setattr(proto, key, value)
    return proto


def external(location: str, offset: object = 0, length: object = W.nbytes, **fields: Any) -> TensorProto:
    proto = tensor(**fields)
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            proto.external_data.add(key=key, value=str(value))
    return proto


def model(*initializers: TensorProto, nodes: list[onnx.NodeProto] | None = None, **graph: Any) -> onnx.ModelProto:
    nodes = nodes if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40])],
            list(initializers),
            **graph,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )


def deep(levels: int) -> onnx.ModelProto:
    """Ifs in Ifs, built as bytes: protobuf itself would not make them."""
    proto = model(tensor(), nodes=[])
    body = proto.graph.SerializeToString()
    for _ in range(levels):
        attribute = b"\x0a\x01b" + field(6, body)  # AttributeProto.name, .g
        node = b"\x12\x01y" + b"\x22\x02If" + field(5, attribute)
        body = field(1, node) + b"\x12\x01g"
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    whole.ClearField("graph")
    return whole.SerializeToString() + field(7, body)  # type: ignore[return-value]


def field(number: int, data: bytes) -> bytes:
    return _tag(number) + _length(len(data)) + data


def cyclic() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "one"), helper.make_node("Neg", ["a"], ["b"], "two")]
    return model(tensor(), nodes=[*nodes, helper.make_node("MatMul", ["b", "w"], ["y"])])


def in_subgraph(inner: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", inner.name], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [inner],
    )
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=branch)
    return model(numpy_helper.from_array(np.array(True), "c"), nodes=[node])


def sparse() -> onnx.ModelProto:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    return model(tensor(), sparse_initializer=[helper.make_sparse_tensor(values, indices, [4])])


GOOD = model(tensor()).SerializeToString()

HOSTILE: dict[str, tuple[onnx.ModelProto | bytes, str]] = {
    "empty": (b"", "not an ONNX model"),
    "text": (b"hello world, this is not a protobuf", "not an ONNX model|truncated or damaged"),
    "zip": (b"PK\x03\x04" + bytes(100), "not an ONNX model|truncated or damaged"),
    "truncated": (GOOD[:-200], "truncated or damaged"),
    "truncated in the weights": (GOOD[:2000], "truncated or damaged"),
    "a length of 2**63": (b"\x3a" + b"\xff" * 8 + b"\x7f", "truncated or damaged"),
    "an endless number": (b"\x08" + b"\xff" * 20, "has no end"),
    "no opset": (b"\x08\x0a" + field(7, model(tensor()).graph.SerializeToString()), "no opset"),
    "1 TB": (model(tensor(dims=[1 << 20, 1 << 18])), "tensor 'w': .*1099511627776"),
    "2**64 elements": (model(tensor(dims=[1 << 32, 1 << 32])), "tensor 'w': impossible shape"),
    "negative": (model(tensor(dims=[-32, -40])), "tensor 'w': a shape is"),
    "65 dimensions": (model(tensor(dims=[1] * 65)), "tensor 'w': impossible shape"),
    "short raw data": (model(tensor(dims=[32, 41])), "tensor 'w': 5120 bytes of data; float32 .32, 41. has 5248"),
    "no data": (model(TensorProto(name="w", data_type=1, dims=[32, 40])), "tensor 'w': has no data"),
    "data twice": (
        model(TensorProto(name="w", data_type=1, dims=[1], raw_data=b"1234", float_data=[1.0])),
        "data twice",
    ),
    "few numbers": (model(TensorProto(name="w", data_type=6, dims=[32, 40], int32_data=[1])), "fewer numbers"),
    "long numbers": (
        model(TensorProto(name="w", data_type=6, dims=[32, 40], int32_data=[1 << 30] * 300)),
        "tensor 'w': 300 numbers; .32, 40. has 1280",
    ),
    "many numbers": (
        model(TensorProto(name="w", data_type=6, dims=[2], int32_data=[1] * 300)),
        "300 numbers; .2. has 2",
    ),
    "many numbers in a constant": (
        model(
            nodes=[
                helper.make_node(
                    "Constant", [], ["w"], value=TensorProto(name="v", data_type=7, dims=[2], int64_data=[1] * 3)
                ),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ]
        ),
        "3 numbers; .2. has 2",
    ),
    "few floats": (model(TensorProto(name="w", data_type=1, dims=[32, 40], float_data=[1.0])), "4 bytes of data"),
    "unknown type": (model(tensor(data_type=99)), "tensor 'w': data type 99"),
    "no type": (model(tensor(data_type=0)), "tensor 'w': data type 0"),
    "strings": (model(TensorProto(name="w", data_type=8, dims=[1], string_data=[b"rm -rf"])), "a tensor of strings"),
    "a segment": (model(TensorProto(name="w", data_type=1, dims=[0], segment=TensorProto.Segment())), "a segment"),
    "name twice": (model(tensor(), tensor()), "tensor 'w': occurs twice"),
    "no name": (model(tensor(name="")), "without a name|which nothing before it makes"),
    "name with an escape": (model(tensor(name="w\x1b[31m")), "impossible tensor name"),
    "cyclic": (cyclic(), "node 'one': takes 'b', which nothing before it makes: the graph is cyclic"),
    "made twice": (
        model(tensor(), nodes=[helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]),
        "node 'Abs': makes 'y', which is there already",
    ),
    "output from nowhere": (model(tensor(), nodes=[]), "output 'y': nothing makes it"),
    "sparse": (sparse(), "sparse"),
    "nested 30 deep": (deep(30), "nested|not an ONNX model"),
    "nested 300 deep": (deep(300), "nested more than"),
    "subgraph 1 TB": (in_subgraph(tensor(dims=[1 << 20, 1 << 18], name="v")), "tensor 'v': .*1099511627776"),
    "subgraph twice": (
        model(
            numpy_helper.from_array(np.array(True), "c"),
            nodes=[
                helper.make_node(
                    "If",
                    ["c"],
                    ["y"],
                    then_branch=helper.make_graph([], "b", [], [], [tensor(), tensor()]),
                    else_branch=helper.make_graph([], "b", [], [], []),
                )
            ],
        ),
        "tensor 'w': occurs twice",
    ),
    "int4 that nothing dequantizes": (
        model(
            tensor(),
            helper.make_tensor("q", TensorProto.INT4, [4], [1, 2, 3, 4]),
            nodes=[
                helper.make_node("Cast", ["q"], ["f"], to=1),
                helper.make_node("MatMul", ["x", "w"], ["z"]),
                helper.make_node("Sum", ["z", "f"], ["y"]),
            ],
        ),
        "tensor 'q': int4 that no DequantizeLinear takes",
    ),
    "external: absent": (model(external("weights.bin")), "tensor 'w': external data: .*missing"),
    "external: absolute": (model(external("/etc/passwd")), "tensor 'w': external data at '/etc/passwd'"),
    "external: ..": (model(external("../outside.bin")), "which is not a path inside the folder"),
    "external: sub/..": (model(external("sub/../../outside.bin")), "which is not a path inside the folder"),
    "external: backslash": (model(external("..\\outside.bin")), "which is not a path inside the folder"),
    "external: drive": (model(external("C:outside.bin")), "which is not a path inside the folder"),
    "external: empty": (model(external("")), "which is not a path inside the folder"),
    "external: NUL": (model(external("a\0b")), "no name of a file"),
    "external: symlink": (model(external("link.bin")), "a link that leaves the model folder"),
    "external: folder link": (model(external("linked/outside.bin")), "a link that leaves the model folder"),
    "external: hard link": (model(external("hard.bin")), "several hard links"),
    "external: folder": (model(external("sub")), "not a regular file"),
    "external: pipe": (model(external("pipe")), "not a regular file"),
    "external: offset past the end": (model(external("good.bin", 1 << 40)), "bytes 1099511627776 to .* wanted"),
    "external: one byte past the end": (model(external("good.bin", 1)), "bytes 1 to 5121 .* which has 5120"),
    "external: offset of 5000 digits": (model(external("good.bin", "9" * 5000)), "offset of its external data"),
    "external: negative": (model(external("good.bin", -8)), "offset of its external data"),
    "external: other length": (model(external("good.bin", 0, 8)), "external data of 8 bytes; float32"),
    "external: 1 TB": (
        model(external("good.bin", 0, 1 << 40, dims=[1 << 20, 1 << 18])),
        "bytes 0 to 1099511627776 of good.bin wanted",
    ),
    "external in a subgraph": (in_subgraph(external("/etc/passwd", name="v")), "tensor 'v': external data at"),
    "external in a constant": (
        model(
            nodes=[
                helper.make_node("Constant", [], ["w"], value=external("../outside.bin")),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ]
        ),
        "which is not a path inside the folder",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside.bin").write_bytes(W.tobytes())
    (tmp_path / "outside2.bin").write_bytes(W.tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.bin").write_bytes(W.tobytes())
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "linked").symlink_to("..")
    os.link(tmp_path / "outside2.bin", folder / "hard.bin")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case: str, folder: Path) -> None:
    content, message = HOSTILE[case]
    data = content if isinstance(content, bytes) else content.SerializeToString()
    path = folder / "x.onnx"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=message) as caught:
            open_onnx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak < 4_000_000 + 64 * len(data)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_an_error_message_or_another_model(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(GOOD)
    structure = [*range(80), *range(len(GOOD) - 80, len(GOOD))]
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.sampled_from(structure))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.onnx"
    path.write_bytes(damaged[: data.draw(st.integers(len(GOOD) - 40, len(GOOD)))])
    message = ""
    try:
        source = open_onnx(path)
        for spec in source.specs():
            source.read(spec.name, r.all_rows(spec.shape))
        source.close()
    except SourceError as exc:
        message = str(exc)
    assert "\n" not in message


def typed(**data: Any) -> Callable[[np.ndarray[Any, Any], str], TensorProto]:
    def make(array: np.ndarray[Any, Any], name: str) -> TensorProto:
        return TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            **{next(iter(data)): array.ravel().tolist()},
        )

    return make


STORED: dict[str, tuple[np.ndarray[Any, Any], Callable[[np.ndarray[Any, Any], str], TensorProto]]] = {
    "raw": (W, tensor),
    "float_data": (W, typed(float_data=0)),
    "double_data": (W.astype(np.float64), typed(double_data=0)),
    "int32_data": (W.astype(np.int32), typed(int32_data=0)),
    "int64_data": (W.astype(np.int64) - 600, typed(int64_data=0)),
    "int8 in int32_data": ((W % 128).astype(np.int8) - 64, typed(int32_data=0)),
    "float16": (W.astype(np.float16), tensor),
    "external": (W, lambda array, name: external("good.bin", name=name)),
    "external without a length": (W, lambda array, name: external("good.bin", length=None, name=name)),
}


@pytest.mark.parametrize("case", STORED)
def test_however_a_tensor_is_stored_its_rows_are_read_exactly(case: str, folder: Path) -> None:
    array, make = STORED[case]
    nodes = [
        helper.make_node("Cast", ["v"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    path = folder / "x.onnx"
    onnx.save_model(model(make(array, "v"), nodes=nodes), str(path))
    source = open_onnx(path)
    (spec,) = source.specs()
    assert (spec.name, spec.shape, spec.kind) == ("v", array.shape, "linear_transposed")
    got = source.read("v", range(8, 24))
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), array[8:24])
    assert np.array_equal(source.graph.model.graph.initializers["v"].const_value.numpy(), array)
    source.close()


def test_memory_goes_with_the_structure_and_not_with_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    large = np.zeros((4096, 4096), np.float32)
    onnx.save_model(model(tensor(large)), str(path))
    open_onnx(path).close()  # imports
    tracemalloc.start()
    try:
        source = open_onnx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert source.bytes_read == 0 or source.bytes_read < 2_000_000
    source.close()


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save_model(model(tensor()), str(path))
    source = open_onnx(path)
    os.truncate(path, 3000)
    with pytest.raises(SourceError, match="tensor 'w': .*shorter"):
        source.read("w", range(32))
    source.close()


def test_constants_and_subgraphs_give_their_weights_to_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor()),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    onnx.save_model(model(nodes=nodes), str(path))
    source = open_onnx(path)
    assert [(s.name, s.kind) for s in source.specs()] == [("w", "linear_transposed")]
    assert np.array_equal(source.read("w", range(32)).numpy(), W)
    source.close()
    onnx.save_model(in_subgraph(tensor(name="v")), str(path))
    source = open_onnx(path)
    assert len(W.tobytes()) > INLINE
    assert source.specs()[0].name == "v"
    source.close()


def test_what_nothing_uses_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save_model(model(tensor(), tensor(name="unused")), str(path))
    source = open_onnx(path)
    assert [s.name for s in source.specs()] == ["w"]
    assert any("unused" in note for note in source.info.notes)
    source.close()


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_more_than_2_gb(where: str, tmp_path: Path) -> None:
    """Protobuf's limit is none of ours: the file is walked, also where the weights are in it. Files here are sparse."""
    rows, columns = 300_000, 2048
    nbytes = rows * columns * 4
    shape = {"data_type": TensorProto.FLOAT, "dims": [rows, columns], "name": "w"}
    path = tmp_path / "x.onnx"
    if where == "beside":
        large = TensorProto(**shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("length", str(nbytes))):
            large.external_data.add(key=key, value=value)
        onnx.save_model(model(large), str(path))
        data, start = tmp_path / "w.bin", 0
    else:
        small, marker = model(), TensorProto(**shape)
        raw = _tag(9) + _length(nbytes)
        tensor_size = len(marker.SerializeToString()) + len(raw) + nbytes
        graph = small.graph.SerializeToString()
        small.ClearField("graph")
        head = small.SerializeToString() + _tag(7)
        inner = graph + _tag(5) + _length(tensor_size) + marker.SerializeToString() + raw
        head += _length(len(inner) + nbytes) + inner
        path.write_bytes(head)
        data, start = path, len(head)
    with data.open("ab") as file:
        file.truncate(start + nbytes)
    with data.open("r+b") as file:
        file.seek(start + nbytes - 4 * columns)
        file.write(np.arange(columns, dtype=np.float32).tobytes())
    source = open_onnx(path)
    (spec,) = source.specs()
    assert spec.nbytes == nbytes > 1 << 31
    last = source.read("w", range(rows - 1, rows))
    assert isinstance(last, torch.Tensor)
    assert torch.equal(last, torch.arange(columns, dtype=torch.float32)[None])
    source.close()


def test_looking_at_a_file_needs_no_torch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    codes = tensor((W % 100).astype(np.int8), "q")
    scale, zeros = tensor(np.ones(40, np.float32), "s"), tensor(np.zeros(40, np.int8), "z")
    onnx.save_model(model(codes, scale, zeros, tensor(W[0], "b"), nodes=nodes), str(tmp_path / "x.onnx"))
    code = (
        "import sys; from pathlib import Path; from monoquant_onnx.source import open_onnx; "
        f"specs = open_onnx(Path({str(tmp_path / 'x.onnx')!r})).specs(); "
        "assert [str(s.encoding) for s in specs] == ['int8[*x1]*float32', 'None'], specs; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    path = folder / "x.onnx"
    path.write_bytes(model(external("../outside.bin")).SerializeToString())
    run = subprocess.run(
        [sys.executable, "-m", "monoquant_core.cli", "inspect", str(path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith(f"error: {path}: tensor 'w': external data at '../outside.bin'")
    assert "Traceback" not in run.stderr


def test_snapshots_of_the_hubs_cache_are_links_to_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_bytes(model(external("model.onnx_data")).SerializeToString())
    (blobs / "2").write_bytes(W.tobytes())
    (snapshot / "model.onnx").symlink_to("../../../blobs/1")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/2")
    source = open_onnx(snapshot / "model.onnx")
    got = source.read("w", range(32))
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), W)
    source.close()

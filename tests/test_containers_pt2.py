"""Programs of torch.export: their weights, read from JSON and raw bytes; no pickle in them is ever touched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from monoquant_core.containers import pt2
from monoquant_core.errors import SourceError
from monoquant_core.rows import all_rows, chunks
from monoquant_core.sources import Pt2Source, open_source
from monoquant_core.tensor import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:No complete tensor found")


class Own(nn.Module):
    """Weights of its own, used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv_transpose1d(x, self.weight)


class Model(nn.Module):
    """Ties, views, strides, buffers that are stored and not, a constant, and layers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)
        self.up = nn.ConvTranspose1d(8, 8, 3)
        self.own = Own()
        self.turned = nn.Parameter(torch.randn(8, 6).t())
        fused = torch.randn(4, 8)
        self.q, self.k = nn.Parameter(fused[:2]), nn.Parameter(fused[2:])
        self.narrow = nn.Parameter(torch.randn(8).to(torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("empty", torch.empty(0, 8))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool), persistent=False)
        self.constant = torch.ones(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids)) * self.mask + self.constant
        x = self.own(self.up(x.t().unsqueeze(0)))[0].t()
        both = x.new_zeros(()) + self.q.sum() + self.k.sum() + self.narrow.float().sum() + self.steps.sum()
        return x.sum() + both + self.turned.sum() + self.scalar + self.head(self.embed(ids)).sum() + self.empty.sum()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Model(), (torch.tensor([1, 2, 3]),)), path)
    return path


@pytest.fixture
def archive(exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    path.write_bytes(exported.read_bytes())
    return path


def refused(path: Path, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 700
    return caught.value


def test_tensors_equal_those_that_torch_loads(exported: Path) -> None:
    state = torch.export.load(exported).state_dict
    source = open_source(exported)
    assert isinstance(source, Pt2Source)
    specs = {spec.name: spec for spec in source.specs()}
    assert set(specs) == set(state)
    for name, spec in specs.items():
        assert (spec.shape, spec.dtype) == (tuple(state[name].shape), str(state[name].dtype)[6:])
        for rows in chunks(spec.shape, 1, 9):
            whole = state[name].detach().contiguous()
            flat = whole.reshape(-1, spec.shape[-1]) if spec.shape else whole.reshape(1, 1)
            part = source.read(name, rows)
            assert same_bits(part.reshape(-1), flat[rows.start : rows.stop].reshape(-1)), name
        assert same_bits(source.read(name, all_rows(spec.shape)), state[name].detach().contiguous())


def test_ties_modules_and_notes(exported: Path) -> None:
    source = open_source(exported)
    specs = {spec.name: spec for spec in source.specs()}
    assert {s.name: s.tied_to for s in specs.values() if s.tied_to} == {"head.weight": "embed.weight"}
    classes = {
        **{
            "embed.weight": "Embedding",
            "head.weight": "Linear",
            "norm.weight": "LayerNorm",
            "up.weight": "ConvTranspose1d",
        },
        **{"own.weight": "ConvTranspose1d", "turned": "Model"},
    }
    assert {name: specs[name].module for name in classes} == classes
    assert specs["own.weight"].kind == specs["up.weight"].kind == "conv_transpose"
    assert specs["embed.weight"].kind == "embedding"
    assert specs["head.weight"].kind == "head"
    assert source.info.notes == (f"{exported}: left out, constants and no part of the state: mask, constant",)
    assert source.info.paths == (exported,)


def test_a_program_in_memory_has_the_same_modules(exported: Path) -> None:
    found = [
        sorted((spec.name, spec.shape, spec.module, spec.kind) for spec in open_source(source).specs())
        for source in (exported, torch.export.load(exported))
    ]
    assert found[0] == found[1]


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "big.pt2"
    torch.export.save(torch.export.export(nn.Linear(1024, 1024), (torch.ones(1, 1024),)), path)
    source = open_source(path)
    assert isinstance(source, Pt2Source)
    assert source.specs()[0].module == "Linear"
    assert source.bytes_read < 50_000 < path.stat().st_size


def test_dtypes_and_layouts_are_torchs() -> None:
    from torch._export.serde import schema
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE

    theirs = {int(code): str(dtype)[6:] for dtype, code in _TORCH_TO_SERIALIZE_DTYPE.items()}
    assert theirs == pt2.DTYPES
    assert schema.Layout.Strided == pt2._STRIDED


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    kept = records(path) | changes
    with zipfile.ZipFile(path, "w") as new:
        for name, data in kept.items():
            if data is not None:
                new.writestr(f"archive/{name}", data)


def edit(record: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        value = json.loads(records(path)[record])
        rewrite(path, {record: json.dumps(change(value) or value).encode()})

    return apply


def at(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


class Runs:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def evil(flag: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Runs(flag), buffer)
    return buffer.getvalue()


WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def test_sample_inputs_are_not_looked_at(archive: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    for content in (evil(flag), pickle.dumps(Runs(flag)), b"garbage", None):
        rewrite(archive, {"data/sample_inputs/model.pt": content})
        source = open_source(archive)
        assert source.read("turned", range(6)).shape == (6, 8)  # type: ignore[union-attr]
        assert not flag.exists()
    rewrite(archive, {"data/sample_inputs/model.pt": evil(flag)})
    with contextlib.suppress(Exception):
        torch.export.load(archive)  # which is why it is not used
    assert flag.exists()


def test_weights_that_are_pickles_are_refused_unless_asked_for(archive: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    table = json.loads(records(archive)[WEIGHTS])
    table["config"]["turned"]["use_pickle"] = True
    record = "data/weights/" + table["config"]["turned"]["path_name"]
    rewrite(archive, {WEIGHTS: json.dumps(table).encode(), record: evil(flag)})
    error = refused(archive)
    assert str(error) == f"{archive}: tensor 'turned': stored as a pickle, which may run code"
    assert "--unsafe-pickle" in error.hint
    assert not flag.exists()
    assert "tensor 'turned': its pickle is a int" in str(refused(archive, unsafe_pickle=True))
    assert flag.exists()
    buffer = io.BytesIO()
    torch.save(torch.full((6, 8), 7.0), buffer)
    rewrite(archive, {record: buffer.getvalue()})
    source = open_source(archive, unsafe_pickle=True)
    assert torch.equal(source.read("turned", range(6)), torch.full((6, 8), 7.0))  # type: ignore[arg-type]
    assert f"{archive}: {record}: unpickled with --unsafe-pickle; code in it has run" in source.info.notes
    assert source.read("norm.weight", range(1)).tolist() == [1.0] * 8  # type: ignore[union-attr]


def test_pickled_constants_are_refused_and_never_read(archive: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    table = json.loads(records(archive)[CONSTANTS])
    table["config"]["object"] = {
        "path_name": "opaque_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    rewrite(archive, {CONSTANTS: json.dumps(table).encode(), "data/constants/opaque_obj_0": pickle.dumps(Runs(flag))})
    assert str(refused(archive)) == f"{archive}: constant 'object': stored as a pickle, which may run code"
    notes = open_source(archive, unsafe_pickle=True).info.notes
    assert f"{archive}: left out, pickled and not read: 'object'" in notes
    assert not flag.exists()


def test_weights_of_older_torch_are_one_pickle(archive: Path) -> None:
    state = {"turned": torch.ones(6, 8)} | {n: torch.ones(2) for n in json.loads(records(archive)[WEIGHTS])["config"]}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    rewrite(archive, {WEIGHTS: None, "data/weights/model.pt": buffer.getvalue()})
    assert "data/weights/model.pt: weights stored as a pickle, which may run code" in str(refused(archive))
    source = open_source(archive, unsafe_pickle=True)
    assert torch.equal(source.read("embed.weight", range(1)), torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: rewrite(p, {"archive_format": None}), "torch.export.save did not write: it has no archive_format"),
        (
            lambda p: rewrite(p, {"archive_format": b"pt3"}),
            "archive format b'pt3' version b'0', b'pt2' and b'0' are known",
        ),
        (lambda p: rewrite(p, {"archive_version": b"9"}), "archive format b'pt2' version b'9'"),
        (
            lambda p: rewrite(p, {"archive_format": None, "serialized_state_dict.pt": b""}),
            "written by torch before 2.8, with pickled weights",
        ),
        (
            lambda p: rewrite(p, {"models/model.json": None}),
            "an archive with one exported program expected, it has none",
        ),
        (lambda p: rewrite(p, {"models/b.json": b"{}"}), "one exported program expected, it has model, b"),
        (lambda p: rewrite(p, {"models/model.json": b"[]"}), "models/model.json: a JSON object expected, got list"),
        (
            lambda p: rewrite(p, {"models/model.json": b"{}"}),
            "models/model.json: not a graph of torch.export: KeyError",
        ),
        (
            edit("models/model.json", at("graph_module", "signature", "input_specs", value=[3])),
            "models/model.json: not a graph of torch.export: AttributeError",
        ),
        (lambda p: rewrite(p, {"byteorder": b"big"}), "byte order b'big', only little-endian files are read"),
        (lambda p: rewrite(p, {WEIGHTS: None}), f"it has no record '{WEIGHTS}'"),
        (lambda p: rewrite(p, {WEIGHTS: b"{}"}), f"{WEIGHTS}: it has no 'config'"),
        (
            lambda p: rewrite(p, {WEIGHTS: b'{"config": {"a": 1}}'}),
            f"{WEIGHTS}: 'a': path_name and use_pickle expected",
        ),
        (edit(WEIGHTS, lambda t: t["config"].pop("turned") and None), "tensor 'turned': the program uses it, and the"),
        (edit(WEIGHTS, at("config", "turned", "path_name", value="../x")), "it has no record 'data/weights/../x'"),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", value=None)),
            "tensor 'turned': not a description of a plain",
        ),
        (edit(WEIGHTS, at("config", "turned", "tensor_meta", "dtype", value=99)), "tensor 'turned': unknown dtype 99"),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "dtype", value=[7])),
            "tensor 'turned': not a description",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "layout", value=1)),
            "tensor 'turned': is not a dense tensor",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "sizes", value=[{"as_expr": {"expr_str": "s0"}}])),
            "tensor 'turned': not a description of a plain tensor",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "sizes", value=[{"as_int": 9}, {"as_int": 8}])),
            "tensor 'turned': needs 204 bytes of a storage of 192",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "storage_offset", value={"as_int": 1})),
            "tensor 'turned': needs 196 bytes of a storage of 192",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "storage_offset", value={"as_int": -1})),
            "tensor 'turned': impossible strides (1, 6) at -1 for shape (6, 8)",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "strides", value=[{"as_int": -1}, {"as_int": 6}])),
            "tensor 'turned': impossible strides (-1, 6)",
        ),
        (
            edit(WEIGHTS, at("config", "turned", "tensor_meta", "strides", value=[{"as_int": 1}])),
            "tensor 'turned': impossible strides (1,) at 0 for shape (6, 8)",
        ),
        (
            edit(WEIGHTS, at("config", "scalar", "tensor_meta", "sizes", value=[{"as_int": 2**62}, {"as_int": 2**62}])),
            "tensor 'scalar': impossible shape",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged zip archive: it does not end with its directory"),
        (lambda p: p.write_bytes(b"#!/bin/sh\n" + p.read_bytes()), "it does not start with its first record"),
        (lambda p: p.write_bytes(b""), "damaged zip archive: it does not end with its directory"),
    ],
)
def test_damaged_and_foreign_archives(archive: Path, change: Callable[[Path], None], message: str) -> None:
    change(archive)
    assert message in str(refused(archive))


def test_a_program_without_weights(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(Nothing(), (torch.ones(2),)), path)
    assert str(refused(path)) == f"{path}: holds no parameters and no buffers"


def test_a_file_of_torch_save_and_one_of_torch_export_are_told_apart(archive: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt2")
    assert "it has no archive_format" in str(refused(tmp_path / "a.pt2"))
    archive.rename(tmp_path / "b.pt")
    error = refused(tmp_path / "b.pt")
    assert "an archive of torch.export" in str(error)
    assert error.hint == "give it the suffix .pt2"


def test_a_file_that_changes_while_it_is_read(archive: Path) -> None:
    os.utime(archive, ns=(0, 0))
    source = open_source(archive)
    source.read("turned", range(6))
    os.utime(archive, ns=(1, 1))
    with pytest.raises(SourceError, match=rf"^{archive}: tensor 'turned': the file has changed"):
        source.read("turned", range(6))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_give_tensors_within_the_file(
    exported: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(exported.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flip.pt2"
    path.write_bytes(content)
    try:
        source = open_source(path)
    except SourceError as exc:
        message = str(exc)
    else:
        message = ""
        for spec in source.specs():
            assert spec.nbytes <= len(content)
            source.read(spec.name, all_rows(spec.shape))
    assert "\n" not in message

"""Model folders: which weights are taken, what goes along, and that nothing outside is ever read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from monoquant_core.containers import folder as folders
from monoquant_core.errors import SourceError
from monoquant_core.sources import SafetensorsSource, TorchSource, open_source


def save(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def refused(folder: Path, *, kind: Any = SafetensorsSource) -> str:
    with pytest.raises(SourceError) as caught:
        kind(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shards_are_one_model(model: Path) -> None:
    save(model / "m-00001-of-00002.safetensors", "a", "b")
    save(model / "m-00002-of-00002.safetensors", "c")
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    index(model, {"a": first, "b": first, "c": second})
    source = open_source(model)
    assert [s.name for s in source.specs()] == ["a", "b", "c"]
    assert source.info.paths == (model / first, model / second)
    assert source.info.notes == ()
    assert source.read("b", range(2)).tolist() == [[1.0] * 3] * 2
    assert source.read("c", range(1, 2)).tolist() == [[0.0] * 3]


@pytest.mark.parametrize(
    "shard",
    [
        *("../other/s.safetensors", "/etc/s.safetensors", "sub/s.safetensors", "./s.safetensors", "..", ".", ""),
        *("..\\other\\s.safetensors", "C:s.safetensors", "s.safetensors/", "a\0.safetensors", 7, None, ["s"]),
    ],
)
def test_a_shard_name_is_a_name_in_the_folder_and_nothing_else(tmp_path: Path, model: Path, shard: Any) -> None:
    save(tmp_path / "other" / "s.safetensors", "a")
    save(model / "s.safetensors", "a")
    save(model / "sub" / "s.safetensors", "a")
    path = index(model, {"a": shard})
    message = refused(model)
    assert message.startswith(f"{path}: tensor 'a': its shard ")
    assert message.endswith("is not the name of a file in the folder")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "s1.safetensors", "x": "s1.safetensors"}, "{i}: tensor 'x': 's1.safetensors' does not contain it"),
        ({"a": "s2.safetensors", "b": "s1.safetensors"}, "{i}: tensor 'a': in s1.safetensors, not in 's2.safetensors'"),
        ({"a": "s1.safetensors", "c": "s3.safetensors"}, "{m}/s3.safetensors: tensor 'a': also in s1.safetensors"),
        ({"a": "none.safetensors"}, "{m}/none.safetensors: missing, or a link to nothing"),
        ({"a": "config.json"}, "{i}: tensor 'a': its shard 'config.json' is not a .safetensors file"),
        ({"": "s1.safetensors"}, "{i}: impossible tensor name ''"),
        ({}, "{i}: it has no weight_map"),
        ([], "{i}: it has no weight_map"),
        ("s1.safetensors", "{i}: it has no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(model: Path, weight_map: Any, message: str) -> None:
    save(model / "s1.safetensors", "a", "b")
    save(model / "s2.safetensors", "c")
    save(model / "s3.safetensors", "a", "c")
    path = index(model, weight_map)
    assert refused(model) == message.format(i=path, m=model)


def test_tensors_that_the_index_does_not_name_are_read_and_said(model: Path) -> None:
    save(model / "s1.safetensors", "a", "b")
    path = index(model, {"a": "s1.safetensors"})
    source = open_source(model)
    assert [s.name for s in source.specs()] == ["a", "b"]
    assert source.info.notes == (f"{path}: does not name b, which the shards contain: read too",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a JSON object expected, got list"),
        ("{", "not valid JSON"),
        ('{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}', "key 'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"metadata": {}}', "it has no weight_map"),
    ],
)
def test_an_index_that_is_no_index(model: Path, text: str, message: str) -> None:
    path = model / "model.safetensors.index.json"
    path.write_text(text)
    answer = refused(model)
    assert answer.startswith(f"{path}: ")
    assert message in answer


def test_json_files_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model / "model.safetensors", "a")
    with (model / "config.json").open("wb") as file:
        file.truncate(folders.MAX_CONFIG + 1)  # sparse
    assert refused(model) == f"{model}/config.json: 67108865 bytes, at most 67108864 are read"
    (model / "model.safetensors").unlink()
    with (model / "model.safetensors.index.json").open("wb") as file:
        file.truncate(folders.MAX_HEADER + 1)
    assert refused(model).endswith("100000001 bytes, at most 100000000 are read")


@pytest.mark.parametrize("text", ["[1]", "{", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object(model: Path, text: str) -> None:
    save(model / "model.safetensors", "a")
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert refused(model).startswith(f"{model}/config.json: ")


def test_the_config_may_be_as_lax_as_those_of_others(model: Path) -> None:
    save(model / "model.safetensors", "a")
    (model / "config.json").write_text('{"model_type": "bert", "x": Infinity, "x": 2}')
    source = open_source(model)
    assert source.info.config == {"model_type": "bert", "x": 2}
    assert source.info.model_type == "bert"


@pytest.mark.parametrize(
    ("files", "taken", "said"),
    [
        (["model.safetensors", "other.safetensors", "pytorch_model.bin"], "model.safetensors", ["other.safetensors"]),
        (["diffusion_pytorch_model.safetensors", "scheduler.bin"], "diffusion_pytorch_model.safetensors", []),
        (["adapter_model.safetensors", "pytorch_model.bin"], "pytorch_model.bin", ["adapter_model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin", ["training_args.bin"]),
        (["model.safetensors", "._model.safetensors", ".model.safetensors.partial"], "model.safetensors", []),
    ],
)
def test_the_files_that_transformers_would_take(model: Path, files: list[str], taken: str, said: list[str]) -> None:
    for file in files:
        save(model / file, "a")
    source = open_source(model)
    assert source.info.paths == (model / taken,)
    assert source.info.notes == ((f"{model}: not read: {', '.join(said)}",) if said else ())


def test_sharded_pickles(model: Path) -> None:
    save(model / "p-00001-of-00002.bin", "a")
    save(model / "p-00002-of-00002.bin", "b", "c")
    shards = {"a": "p-00001-of-00002.bin", "b": "p-00002-of-00002.bin", "c": "p-00002-of-00002.bin"}
    path = index(model, shards, "pytorch_model.bin.index.json")
    source = open_source(model)
    assert isinstance(source, TorchSource)
    assert [s.name for s in source.specs()] == ["a", "b", "c"]
    assert source.read("c", range(2)).tolist() == [[1.0] * 3] * 2
    index(model, {**shards, "d": "p-00001-of-00002.bin"}, "pytorch_model.bin.index.json")
    assert refused(model, kind=TorchSource) == f"{path}: tensor 'd': 'p-00001-of-00002.bin' does not contain it"


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "an empty folder", "expected: model.safetensors"),
        (["config.json", "README.md"], "no weights in this folder", "expected: model.safetensors"),
        (["weights.pt", "x.ckpt"], "no weights in this folder", "give the file itself: weights.pt, x.ckpt"),
        (["a.safetensors", "b.safetensors"], "2 .safetensors files and no index", "give one of them: a.safetensors"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "several shard indices: a.safetensors", ""),
    ],
)
def test_folders_without_a_model(model: Path, files: list[str], message: str, hint: str) -> None:
    for file in files:
        (model / file).write_text("{}")
    with pytest.raises(SourceError) as caught:
        open_source(model)
    assert str(caught.value).startswith(f"{model}: {message}")
    assert hint in caught.value.hint


SIDE = [
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "modules.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"),
    *("2_Dense/model.safetensors", "additional_chat_templates/tool_use.jinja"),
]
NOT_SIDE = [
    *("config.json", "README.md", "model.safetensors", "training_args.bin", "modeling_custom.py", "onnx/model.onnx"),
    *("1_Pooling/notes.txt", ".gitattributes", "pytorch_model.bin", "additional_chat_templates/run.py"),
]


def test_side_files_are_what_a_model_needs_beside_its_weights(model: Path) -> None:
    for name in SIDE + NOT_SIDE:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    save(model / "model.safetensors", "a")
    source = open_source(model)
    assert dict(source.info.side_files) == {name: model / name for name in SIDE}


def link(path: Path, target: Path | str) -> None:
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")


def test_links_within_the_folder_are_followed(model: Path) -> None:
    save(model / "weights" / "real.safetensors", "a")
    (model / "weights" / "t.json").write_text("{}")
    link(model / "model.safetensors", "weights/real.safetensors")
    link(model / "tokenizer.json", model / "weights" / "t.json")
    source = open_source(model)
    assert [s.name for s in source.specs()] == ["a"]
    assert list(source.info.side_files) == ["tokenizer.json"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json", "1_Pooling"]
)
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, model: Path, name: str) -> None:
    save(model / "other.safetensors", "a")
    outside = tmp_path / "outside" / "config.json"
    save(outside.with_suffix(".safetensors"), "secret")
    outside.write_text('{"model_type": "secret"}')
    target = outside.with_suffix(".safetensors") if name.endswith(".safetensors") else outside
    if name == "1_Pooling":
        target = outside.parent
    (model / name).parent.mkdir(exist_ok=True)
    link(model / name, os.path.relpath(target, (model / name).parent))
    assert refused(model) == f"{model / name}: a link that leaves the model folder"


def test_links_to_themselves_and_to_nothing(model: Path) -> None:
    link(model / "model.safetensors", "model.safetensors")
    assert refused(model) == f"{model}/model.safetensors: missing, or a link to nothing"
    (model / "model.safetensors").unlink()
    link(model / "model.safetensors", "gone")
    assert refused(model) == f"{model}/model.safetensors: missing, or a link to nothing"


def hub(tmp_path: Path) -> Path:
    """A model as huggingface_hub keeps it: snapshots link to blobs beside them."""
    root = tmp_path / "models--org--name"
    save(root / "blobs" / "w.safetensors", "a").rename(root / "blobs" / "0a1b")
    (root / "blobs" / "2c3d").write_text('{"model_type": "bert"}')
    snapshot = root / "snapshots" / "rev"
    (snapshot / "1_Pooling").mkdir(parents=True)
    link(snapshot / "model.safetensors", "../../blobs/0a1b")
    link(snapshot / "config.json", "../../blobs/2c3d")
    link(snapshot / "1_Pooling" / "config.json", "../../../blobs/2c3d")
    return snapshot


def test_snapshots_of_the_hub_are_read(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    for folder in (snapshot, tmp_path / "link"):
        if folder != snapshot:
            link(folder, snapshot)
        source = open_source(folder)
        assert source.info.model_type == "bert"
        assert list(source.info.side_files) == ["1_Pooling/config.json"]
        assert source.read("a", range(2)).shape == (2, 3)


def test_a_folder_that_poses_as_a_snapshot_gets_no_further(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    secret = tmp_path / "secret"
    save(secret / "0a1b.safetensors", "s").rename(secret / "0a1b")
    blobs = snapshot.parent.parent / "blobs"
    (snapshot / "model.safetensors").unlink()
    link(snapshot / "model.safetensors", "../../other/0a1b")
    (snapshot.parent.parent / "other").mkdir()
    save(snapshot.parent.parent / "other" / "o.safetensors", "s").rename(snapshot.parent.parent / "other" / "0a1b")
    assert refused(snapshot) == f"{snapshot}/model.safetensors: a link that leaves the model folder"
    blobs.rename(blobs.with_name("b"))
    link(blobs, secret)  # blobs/ itself leads elsewhere
    (snapshot / "model.safetensors").unlink()
    link(snapshot / "model.safetensors", "../../blobs/0a1b")
    assert refused(snapshot) == f"{snapshot}/model.safetensors: a link that leaves the model folder"


def test_nothing_in_the_folder_is_imported(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model / "model.safetensors", "a")
    flag = model / "ran"
    for name in ("modeling_custom.py", "configuration_custom.py", "__init__.py", "conftest.py"):
        (model / name).write_text(f"open({str(flag)!r}, 'w')")
    (model / "config.json").write_text(
        json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "configuration_custom.C"}})
    )
    monkeypatch.chdir(model)
    assert [s.name for s in open_source(model).specs()] == ["a"]
    assert not flag.exists()

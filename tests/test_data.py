"""Calibration data from files and code: what is taken, and that nothing in it is run or believed."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monoquant_core.data import DataOptions, Recipient, open_data
from monoquant_core.errors import CalibrationError, MonoquantError, SourceError
from monoquant_core.runners import Input

MODEL = Recipient("net", [Input("x"), Input("mask", required=False)])


def rows(data: Any, name: str = "x") -> torch.Tensor:
    return torch.cat([batch[name] if isinstance(batch, dict) else batch for batch in data])


X = np.arange(40, dtype=np.float32).reshape(10, 4)


def save_npz(path: Path) -> None:
    np.savez(path, X)


def save_compressed(path: Path) -> None:
    np.savez_compressed(path, x=X, mask=X + 1, labels=np.arange(3))


def save_npy(path: Path) -> None:
    np.save(path, X)


def save_torch(path: Path) -> None:
    torch.save(torch.from_numpy(X), path)


def save_torch_dict(path: Path) -> None:
    torch.save({"x": torch.from_numpy(X), "epoch": 3}, path)


def save_safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": X}, path)


FILES: dict[str, Callable[[Path], None]] = {
    "a.npz": save_npz,
    "b.npz": save_compressed,
    "c.npy": save_npy,
    "d.pt": save_torch,
    "e.pt": save_torch_dict,
    "f.safetensors": save_safetensors,
}


@pytest.mark.parametrize("name", FILES)
def test_arrays(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    data = open_data(str(tmp_path / name), MODEL, DataOptions(samples=7, batch_size=3))
    batches = list(data)
    assert [len(b["x"]) for b in batches] == [3, 3, 1]  # type: ignore[call-overload,index]
    taken = rows(batches)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:7]
    assert torch.equal(taken, torch.from_numpy(X)[order])
    assert torch.equal(taken, rows(data))  # as often as one asks
    other = open_data(str(tmp_path / name), MODEL, DataOptions(samples=7, seed=1))
    assert not torch.equal(taken, rows(other))


def test_names_of_arrays_are_inputs(tmp_path: Path) -> None:
    save_compressed(tmp_path / "b.npz")
    data = open_data(str(tmp_path / "b.npz"), MODEL)
    (batch,) = list(data)
    assert isinstance(batch, dict)
    assert sorted(batch) == ["mask", "x"]
    assert torch.equal(batch["mask"], batch["x"] + 1)  # of the same samples
    assert "not read, no inputs of the model: labels" in data.notes[0]
    (one,) = list(open_data(f"{tmp_path / 'b.npz'}:mask", Recipient("net", [Input("image")])))
    assert isinstance(one, dict)
    assert list(one) == ["image"]


def test_labels_go_along_where_they_are_asked_for(code: Path) -> None:
    np.savez(code / "x.npz", images=X, labels=np.arange(10))
    target = Recipient("net", [Input("x")], extra=("labels",))
    for where in (str(code / "x.npz"), f"{code / 'x.npz'}:images"):
        (batch,) = list(open_data(where, target, DataOptions(preprocess="users_data:scaled")))
        assert isinstance(batch, dict)
        assert sorted(batch) == ["labels", "x"]
        assert torch.equal(batch["x"][:, 0] * 10, batch["labels"] * 4.0)
    (batch,) = list(open_data(str(code / "x.npz"), Recipient("net", [Input("labels")])))
    assert isinstance(batch, dict)
    assert list(batch) == ["labels"]


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float64", "bool", ">f4"])
def test_dtypes_are_left_to_the_model(dtype: str, tmp_path: Path) -> None:
    x = (X % 2).astype(dtype)
    np.savez(tmp_path / "x.npz", x=x)
    taken = rows(open_data(str(tmp_path / "x.npz"), MODEL))
    assert taken.dtype == torch.from_numpy(x.astype(x.dtype.newbyteorder("="))).dtype
    assert taken.sum().item() == x.sum()


# --- hostile ---


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


def zipped(**records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(f"{name}.npy", data)
    return out.getvalue()


def objects() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Bomb()], dtype=object), allow_pickle=True)
    return out.getvalue()


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


HUGE = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }\n")
HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "objects": ("x.npz", zipped(x=objects()), "holds Python objects as a pickle"),
    "objects alone": ("x.npy", objects(), "holds Python objects as a pickle"),
    "a pickle as .pt": ("x.pt", pickle.dumps(Bomb()), "a pickle, which may run code"),
    "a terabyte": ("x.npy", HUGE, "its header says float32[1000000000000, 4], and it has 0 bytes"),
    "a terabyte in a zip": ("x.npz", zipped(x=HUGE), "and it has 0 bytes"),
    "negative": ("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n"), "an impossible shape"),
    "code as header": ("x.npy", npy("__import__('os').system('touch ran')\n"), "a damaged header"),
    "long header": ("x.npy", npy(" " * 70000, version=2), "a header of 70000 bytes"),
    "text": ("x.npy", b"hello", "not an array in numpy's format"),
    "not a zip": ("x.npz", b"hello", "not an .npz file"),
    "cut": ("x.npz", cut_short(zipped(x=npy("{}", bytes(4000)))), "not an .npz file"),
    "strings": ("x.npy", npy("{'descr': '<U3', 'fortran_order': False, 'shape': (1,), }\n", bytes(12)), "numbers are"),
    "columns": (
        "x.npy",
        npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }\n", bytes(16)),
        "is stored column by column",
    ),
    "a number": (
        "x.npy",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (), }\n", bytes(4)),
        "a single number",
    ),
    "no samples": ("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }\n"), "holds no samples"),
    "safetensors": ("x.safetensors", b"\xff" * 16, "x.safetensors"),
    "unknown": ("x.csv", b"1,2", "no reader for .csv"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, message = HOSTILE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MonoquantError) as caught:
        list(open_data(str(tmp_path / name), MODEL))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=X, labels=X)
    with pytest.raises(CalibrationError, match="none of its arrays is an input of net: images, labels") as caught:
        open_data(str(tmp_path / "x.npz"), MODEL)
    assert f"{tmp_path / 'x.npz'}:KEY" in caught.value.hint
    with pytest.raises(CalibrationError, match="has no array 'y'"):
        open_data(f"{tmp_path / 'x.npz'}:y", MODEL)
    np.savez(tmp_path / "y.npz", x=X, mask=X[:3])
    with pytest.raises(CalibrationError, match="different numbers of samples: x has 10, mask has 3"):
        open_data(str(tmp_path / "y.npz"), MODEL)
    with pytest.raises(SourceError, match="no such file or folder"):
        open_data(str(tmp_path / "none.npz"), MODEL)


def test_a_model_with_a_fixed_batch_gets_whole_ones(tmp_path: Path) -> None:
    save_npy(tmp_path / "x.npy")
    fixed = Recipient("net", [Input("x", "float32", (4, 4))])
    assert [len(b["x"]) for b in open_data(str(tmp_path / "x.npy"), fixed)] == [4, 4]  # type: ignore[call-overload,index]
    with pytest.raises(CalibrationError, match="takes batches of 16 samples, and the data has 10"):
        list(open_data(str(tmp_path / "x.npy"), Recipient("net", [Input("x", "float32", (16, 4))])))


# --- code ---


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_data.py").write_text(
        "import torch\n"
        "def batches():\n    for i in range(5):\n        yield {'x': torch.full((4, 2), float(i))}\n"
        "def fails():\n    yield torch.ones(2, 2)\n    raise ValueError('no disk')\n"
        "def number():\n    return 3\n"
        "def scaled(x):\n    return x / 10\n"
        "def red(image):\n    return torch.tensor(image.getpixel((0, 0))[0] / 255).expand(1, 2, 2)\n"
    )
    yield tmp_path
    sys.modules.pop("users_data", None)


def test_a_function_that_yields_batches(code: Path) -> None:
    data = open_data("users_data:batches", MODEL, DataOptions(samples=10))
    assert [len(b["x"]) for b in data] == [4, 4, 2]  # type: ignore[call-overload,index]
    assert rows(data)[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    with pytest.raises(SourceError, match="users_data:fails: it failed: ValueError: no disk"):
        list(open_data("users_data:fails", MODEL))
    with pytest.raises(SourceError, match="gives a int, and batches are wanted"):
        list(open_data("users_data:number", MODEL))
    with pytest.raises(SourceError, match="users_data has no 'nothing'"):
        list(open_data("users_data:nothing", MODEL))
    with pytest.raises(SourceError, match="there is no module 'no_such_module'"):
        list(open_data("no_such_module:batches", MODEL))
    assert str(code) not in sys.path


def test_arrays_are_preprocessed(code: Path) -> None:
    np.savez(code / "x.npz", x=X)
    data = open_data(str(code / "x.npz"), MODEL, DataOptions(samples=3, preprocess="users_data:scaled"))
    plain = open_data(str(code / "x.npz"), MODEL, DataOptions(samples=3))
    assert torch.equal(rows(data), rows(plain) / 10)


def test_images(code: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (code / "images" / "sub").mkdir(parents=True)
    for i in range(6):
        image.new("L" if i % 2 else "RGB", (4, 4), 255 if i % 2 else (255, 0, 0)).save(
            code / "images" / ("sub" if i % 3 else "") / f"{i}.png"
        )
    options = DataOptions(samples=5, batch_size=2, preprocess="users_data:red")
    batches = list(open_data(str(code / "images"), MODEL, options))
    assert [tuple(b["x"].shape) for b in batches] == [(2, 1, 2, 2), (2, 1, 2, 2), (1, 1, 2, 2)]  # type: ignore[call-overload,index]
    assert rows(batches).unique().tolist() == [1.0]
    with pytest.raises(CalibrationError, match="images need --preprocess"):
        open_data(str(code / "images"), MODEL)
    (code / "images" / "z.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"z.png: cannot be opened as an image"):
        list(open_data(str(code / "images"), MODEL, DataOptions(preprocess="users_data:red")))
    (code / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no images"):
        open_data(str(code / "empty"), MODEL)


# --- text ---

TEXT_MODEL = [Input("input_ids"), Input("attention_mask", required=False), Input("token_type_ids", required=False)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(200))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=64)  # as folders of sentence transformers have it
    made.enable_truncation(max_length=12)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_windows_of_a_text(tokenizer: Path) -> None:
    (tokenizer / "text.txt").write_text(" ".join(f"w{i}" for i in range(100)))
    model = Recipient("net", TEXT_MODEL, {"tokenizer.json": tokenizer / "tokenizer.json"})
    data = open_data(str(tokenizer / "text.txt"), model, DataOptions(samples=4))
    (batch,) = list(data)
    assert isinstance(batch, dict)
    ids = batch["input_ids"]
    assert ids.shape == (4, 12)  # the tokenizer's own length, its padding left out
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    assert torch.equal(ids[:, 2:-1] - ids[:, 1:-2], torch.ones(4, 9, dtype=torch.long))  # words one after another
    assert batch["attention_mask"].all()
    assert not batch["token_type_ids"].any()
    (longer,) = list(open_data(str(tokenizer / "text.txt"), model, DataOptions(samples=2, length=20)))
    assert isinstance(longer, dict)
    assert longer["input_ids"].shape == (2, 20)


def test_lines_of_json_are_never_padded(tokenizer: Path) -> None:
    texts = ["w1 w2", "w3 w4 w5", "w6 w7", "w8"]
    (tokenizer / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    model = Recipient("net", [Input("ids")])
    options = DataOptions(tokenizer=str(tokenizer))
    batches = list(open_data(str(tokenizer / "text.jsonl"), model, options))
    assert sorted(tuple(b["ids"].shape) for b in batches) == [(1, 3), (1, 5), (2, 4)]  # type: ignore[call-overload,index]


def test_text_that_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    model = Recipient("net", TEXT_MODEL)
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(CalibrationError, match="text needs a tokenizer, and net has no tokenizer.json"):
        open_data(str(tmp_path / "a.txt"), model)
    with pytest.raises(SourceError, match="no such tokenizer"):
        open_data(str(tmp_path / "a.txt"), model, DataOptions(tokenizer=str(tmp_path / "none.json")))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SourceError, match=r"bad.json: not a tokenizer"):
        open_data(str(tmp_path / "a.txt"), model, DataOptions(tokenizer=str(tmp_path / "bad.json")))
    options = DataOptions(tokenizer=str(tokenizer / "tokenizer.json"))
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(CalibrationError, match=r"empty.txt: holds no text"):
        open_data(str(tmp_path / "empty.txt"), model, options)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe w1")
    with pytest.raises(SourceError, match=r"latin.txt: not UTF-8"):
        open_data(str(tmp_path / "latin.txt"), model, options)
    for content, message in (
        ("{", "line 1: not JSON"),
        ('"w1"\n{"body": "w1"}', "line 2: no text under the key 'text': it has 'body'"),
        ("[" * 100_000, "line 1: not JSON"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(SourceError) as caught:
            list(open_data(str(tmp_path / "bad.jsonl"), model, options))
        assert message in str(caught.value)


def test_without_the_tokenizers_library(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tokenizer / "a.txt").write_text("w1")
    with pytest.raises(CalibrationError, match="reading text needs the tokenizers library") as caught:
        open_data(str(tokenizer / "a.txt"), MODEL, DataOptions(tokenizer=str(tokenizer)))
    assert caught.value.hint == "pip install tokenizers"

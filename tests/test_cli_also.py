"""``--also`` and ``mq.save_all``: several outputs of one pass, from the command and the API."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import monoquant_core as mq
from monoquant_core.errors import OptionError, OutputError, PlanError, RecipeError, UnknownNameError

Run = Callable[..., Any]
UP, DOWN, NORM = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.norm.weight"
GENERIC = ("--architecture", "generic")  # of --format gguf: tensors under their own names, without a tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    made = torch.Generator().manual_seed(0)
    shapes = {UP: (96, 64), DOWN: (64, 96), NORM: (64,), "embed_tokens.weight": (40, 64)}
    save_file(
        {name: torch.randn(shape, generator=made) * 0.05 for name, shape in shapes.items()}, path / "m.safetensors"
    )
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def content(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_the_outputs_are_those_of_separate_runs(folder: Path, tmp_path: Path, run: Run) -> None:
    source, together, apart = folder / "m.safetensors", tmp_path / "together", tmp_path / "apart"
    together.mkdir()
    apart.mkdir()
    done = run(
        "quantize", source, "-o", together / "a.gguf", *GENERIC, "--scheme", "Q8_0", "--keep", "*down*",
        "--also", f"Q4_0:allow_fallback=yes={together / 'b,c=d.gguf'}",
        "--also", f"int8:granularity=tensor,format=safetensors,max_shard_size=1={together / 'folder'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("wrote ")] == [
        f"wrote {together / name}" for name in ("a.gguf", "b,c=d.gguf", "folder")
    ]
    assert done.stdout.count("  time ") == done.stdout.count("  memory ") == 1
    kept = ("--keep", "*down*", "-q")
    for args in (
        ("a.gguf", "--scheme", "Q8_0", "--format", "gguf", *GENERIC),
        ("b,c=d.gguf", "--scheme", "Q4_0", "--allow-fallback", "--format", "gguf", *GENERIC),
        ("folder", "--scheme", "int8", "--granularity", "tensor", "--max-shard-size", "1"),
    ):
        alone = run("quantize", source, "-o", apart / args[0], *args[1:], *kept)
        assert alone.returncode == 0, alone.stderr
    assert content(together) == content(apart)
    assert sorted(p.name for p in together.iterdir()) == ["a.gguf", "b,c=d.gguf", "folder"]


def test_json_has_a_report_for_each(folder: Path, tmp_path: Path, run: Run) -> None:
    done = run(
        "quantize", folder / "m.safetensors", "-o", tmp_path / "a", "--scheme", "int8", "--json",
        "--also", f"int4:group_size=32={tmp_path / 'b'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)["outputs"]
    assert [r["destination"] for r in reports] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [r["bytes"] for r in reports] == [sum(map(len, content(tmp_path / n).values())) for n in "ab"]
    assert reports[0]["sqnr_db"] > reports[1]["sqnr_db"] + 10


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_plans_have_a_table_and_totals_each(folder: Path, tmp_path: Path, run: Run, command: str) -> None:
    args = [
        folder / "m.safetensors",
        "--scheme",
        "Q8_0",
        "--format",
        "gguf",
        *GENERIC,
        "--also",
        f"int8:format=safetensors={tmp_path / 'b'}",
    ]
    extra = ["--dry-run", "-o", tmp_path / "a.gguf"] if command == "quantize" else []
    text = run(command, *args, *extra).stdout
    first = str(tmp_path / "a.gguf") if extra else "gguf"
    assert f"{first}, output 1 of 2" in text
    assert f"{tmp_path / 'b'}, output 2 of 2" in text
    tables = text.split("output 2 of 2")
    assert "int8[1x32]*float16" in tables[0]
    assert "int8[1x*]*float32" in tables[1]
    assert text.count("\n  before ") == text.count("\n  after ") == 2
    assert text.count("\n  memory ") == 1
    data = json.loads(run(command, *args, *extra, "--json").stdout)
    assert [(o["format"], o["output"]) for o in data["outputs"]] == [
        ("gguf", first),
        ("safetensors", str(tmp_path / "b")),
    ]
    alone = [
        json.loads(run("plan", folder / "m.safetensors", "--json", *choice).stdout)
        for choice in (("--scheme", "Q8_0", "--format", "gguf", *GENERIC), ("--scheme", "int8"))
    ]
    assert [o["bytes_after"] for o in data["outputs"]] == [plan["bytes_after"] for plan in alone]
    assert data["working_memory_bytes"] > max(plan["working_memory_bytes"] for plan in alone)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("also", "message", "hint"),
    [
        ("Q8_0", "--also 'Q8_0'", "SCHEME=PATH"),
        ("int8:group_size=x", "--also 'int8:group_size=x'", "SCHEME=PATH"),
        ("int88=x", "--also 'int88=x': no scheme 'int88'", "did you mean 'int8'?"),
        ("int8:format=ggu=x", "--also 'int8:format=ggu=x': no format 'ggu'", "did you mean 'gguf'?"),
        ("int4:grop_size=32=x", "--scheme int4 and --format safetensors: no option 'grop_size'", "group_size"),
        ("int4:group_size=-1=x", "--also 'int4:group_size=-1=x': --scheme int4: group_size is at least", ""),
        ("int8=out", "out: two outputs of this run have this name", ""),
        ("int8=out/inside", "one of it and out is inside the other", ""),
        ("int8=m.safetensors", "m.safetensors: ", ""),
        ("int8:format=safetensors,convention=generic=m.safetensors", "m.safetensors: is the input", ""),
        ("Q4_K:architecture=generic=x.gguf", "x.gguf: m.safetensors: the scheme refuses", "blocks of 256"),
        ("int3=x", "error: x: m.safetensors: the scheme refuses", "groups of 128 do not divide"),
    ],
)
def test_one_refusal_stops_all(folder: Path, run: Run, also: str, message: str, hint: str) -> None:
    before = content(folder)
    options = ["--scheme", "int8", "--convention", "generic", "--force"]
    done = run("quantize", "m.safetensors", "-o", "out", *options, "--also", also, cwd=folder)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert lines[0].startswith("error: ")
    assert message in done.stderr.partition("hint: ")[0]
    assert hint in done.stderr
    assert content(folder) == before


def test_a_refusal_names_its_output_once(folder: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes((folder / "m.safetensors").read_bytes())
    (model / "config.json").write_text('{"model_type": "llama"}')
    found = run("quantize", model, "-o", tmp_path / "a", "--also", f"int8={tmp_path / 'b.safetensors'}")
    assert found.returncode == 2
    assert found.stderr.count("b.safetensors") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_dry_run_refuses_what_the_run_would(folder: Path, run: Run) -> None:
    done = run("quantize", "m.safetensors", "-o", "a", "--scheme", "int8", "--dry-run", "--also", "int8=a", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "a: two outputs of this run have this name" in done.stderr


def test_the_suffix_says_the_format(folder: Path, tmp_path: Path, run: Run) -> None:
    done = run("quantize", folder / "m.safetensors", "-o", tmp_path / "a.GGUF", *GENERIC, "--scheme", "Q8_0", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.GGUF").read_bytes()[:4] == b"GGUF"
    with mq.quantize(folder / "m.safetensors", scheme="int8") as model:
        model.save(tmp_path / "b.gguf", format_options={"architecture": "generic"})
        model.save(tmp_path / "c.safetensors")
    assert (tmp_path / "b.gguf").read_bytes()[:4] == b"GGUF"
    assert mq.load(tmp_path / "c.safetensors").source.specs()


def test_save_all_reads_every_byte_once(folder: Path, tmp_path: Path) -> None:
    generic = {"architecture": "generic"}
    with mq.quantize(folder / "m.safetensors", scheme="Q8_0", keep=["*embed*"]) as model:
        other = model.variant("int4", {"group_size": 32})
        headers = model.source.bytes_read
        reports = mq.save_all(
            [
                mq.Target(model, tmp_path / "a.gguf", format_options=generic),
                mq.Target(other, tmp_path / "b", "safetensors"),
            ]
        )
        tensors = sum(spec.nbytes for spec in model.source.specs())
        assert model.source.bytes_read - headers == tensors
        model.save(tmp_path / "c.gguf", format_options=generic)
        other.save(tmp_path / "d")
        assert model.source.bytes_read - headers == 3 * tensors
        assert other.plan("safetensors").decisions[0].spec == model.plan("safetensors").decisions[0].spec
        assert [d.action for d in other.plan("safetensors").decisions if "embed" in d.spec.name] == ["keep"]
    assert [r.destination for r in reports] == [tmp_path / "a.gguf", tmp_path / "b"]
    assert content(tmp_path / "a.gguf") == content(tmp_path / "c.gguf")
    assert content(tmp_path / "b") == content(tmp_path / "d")


def test_a_recipe_and_rules_hold_for_every_variant(folder: Path) -> None:
    recipe = {
        "scheme": "int4",
        "options": {"group_size": 32},
        "rules": [{"match": "*down*", "scheme": "int3", "options": {"group_size": 32}}],
    }
    with mq.quantize(folder / "m.safetensors", recipe=recipe) as model:
        labels = {d.spec.name: d.scheme for d in model.variant("int8").plan().decisions}
    assert labels[UP] == "int8"
    assert labels[DOWN] == "int3 group_size=32"


def test_what_save_all_refuses(folder: Path, tmp_path: Path) -> None:
    with mq.quantize(folder / "m.safetensors", scheme="int8") as model, mq.load(folder / "m.safetensors") as other:
        with pytest.raises(UnknownNameError, match="no scheme 'int88'"):
            model.variant("int88")
        with pytest.raises(OptionError, match="int8 has no option 'bits'"):
            model.variant("int8", {"bits": 3})
        with pytest.raises(PlanError, match="no outputs"):
            mq.save_all([])
        with pytest.raises(PlanError, match="b: safetensors reads another source than .*a, so one pass"):
            mq.save_all([mq.Target(model, tmp_path / "a"), mq.Target(other, tmp_path / "b")])
        with pytest.raises(OutputError, match="a: two outputs"):
            mq.save_all([mq.Target(model, tmp_path / "a")] * 2)
    with pytest.raises(RecipeError, match="matches none"):
        mq.quantize(folder / "m.safetensors", scheme="int8", keep=["*gate*"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no symbolic links without rights")
def test_a_llama_in_two_mixtures(shared: Path, tmp_path: Path) -> None:
    with mq.quantize(shared / "models" / "tiny-llama", scheme="Q4_K_M") as model:
        targets = [mq.Target(model, tmp_path / "a.gguf"), mq.Target(model.variant("Q8_0"), tmp_path / "b.gguf")]
        before = model.source.bytes_read
        mq.save_all([*targets, mq.Target(model.variant("int8"), tmp_path / "hf")], threads=2)
        assert model.source.bytes_read - before == sum(s.nbytes for s in model.source.specs() if s.tied_to is None)
        for target in targets:
            target.model.save(tmp_path / "alone.gguf", force=True, threads=1)
            assert (tmp_path / "alone.gguf").read_bytes() == Path(target.path).read_bytes()

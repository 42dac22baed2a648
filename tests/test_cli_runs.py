"""Whole runs of the command on small checkpoints: bytes on disk, what is printed, and every refusal in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., "subprocess.CompletedProcess[str]"]

UP, DOWN, NORM = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.norm.weight"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        UP: torch.randn(96, 64, generator=generator),
        DOWN: torch.randn(64, 96, generator=generator),
        NORM: torch.ones(64),
        "layers.0.mlp.up_proj.bias": torch.randn(96, generator=generator),
        "embed_tokens.weight": torch.randn(100, 64, generator=generator),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in two containers, and broken ones beside it."""
    path = tmp_path_factory.mktemp("models")
    save_file(weights(), path / "model.safetensors")
    torch.save(weights(), path / "model.pt")
    save_file({NORM: torch.ones(64)}, path / "norm.safetensors")
    save_file({UP: torch.full((8, 64), torch.nan)}, path / "nan.safetensors")
    (path / "empty.safetensors").touch()
    (path / "nothing").mkdir()
    (path / "cut.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-10])
    return path


@pytest.fixture(scope="module")
def finished(folder: Path, run: Run) -> subprocess.CompletedProcess[str]:
    """``quantize model.safetensors -o int8.safetensors --json`` at default options."""
    return run("quantize", folder / "model.safetensors", "-o", folder / "int8", "--json")


def on_disk(path: Path) -> dict[str, int]:
    if path.is_file():
        return {"": path.stat().st_size}
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}


def test_quantize_reports_what_is_on_disk(folder: Path, finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["files"] == on_disk(folder / "int8")
    assert report["source_bytes"] == sum(t.numel() * 4 for t in weights().values())
    noisy = {t["name"]: t["sqnr_db"] for t in report["tensors"] if t["sqnr_db"] != "inf"}
    assert len(noisy) == 2
    assert all(30 < sqnr < 60 for sqnr in noisy.values()), "8 bits of a normal distribution: about 43 dB"


def test_plan_predicts_the_bytes_exactly(folder: Path, run: Run, finished: subprocess.CompletedProcess[str]) -> None:
    plan = json.loads(run("plan", folder / "model.safetensors", "--json").stdout)
    assert {f["path"]: f["bytes"] for f in plan["files"]} == on_disk(folder / "int8")
    assert plan["bytes_after"] == json.loads(finished.stdout)["bytes"]
    assert plan["working_memory_bytes"] > 0


@pytest.mark.parametrize("more", [[], ["--json"], ["--scheme", "int4", "--group-size", "32", "--keep", "*down*"]])
def test_dry_run_prints_what_plan_prints(folder: Path, run: Run, more: list[str]) -> None:
    planned = run("plan", folder / "model.safetensors", *more)
    dry = run("quantize", folder / "model.safetensors", "-o", folder / "not-written", "--dry-run", *more)
    assert (planned.returncode, dry.returncode) == (0, 0)
    assert planned.stdout == dry.stdout
    assert planned.stdout
    assert not (folder / "not-written").exists()


def test_plan_has_a_row_for_every_tensor_and_totals(folder: Path, run: Run) -> None:
    result = run("plan", folder / "model.safetensors", "--scheme", "int8", "--keep", "*down*")
    assert (result.returncode, result.stderr) == (0, "")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith(("layers", "embed"))}
    assert set(rows) == set(weights())
    assert rows[UP].split()[1:4] == ["96x64", "float32", "int8[1x*]*float32"]
    assert "--keep '*down*'" in rows[DOWN]
    assert "embedding" in rows["embed_tokens.weight"]
    assert "1 quantized" in result.stdout


def test_plan_and_inspect_say_how_inputs_are_quantized(folder: Path, run: Run, tmp_path: Path) -> None:
    model = folder / "model.safetensors"
    assert run("quantize", model, "-o", tmp_path / "w8a8.safetensors", "--scheme", "w8a8").returncode == 0
    for args in (["plan", model, "--scheme", "w8a8"], ["inspect", tmp_path / "w8a8.safetensors"]):
        assert re.search(r"(?m)^  inputs +dynamic int8 per token: 2 layers$", run(*args).stdout)
        tensors = {t["name"]: t["activation"] for t in json.loads(run(*args, "--json").stdout)["tensors"]}
        assert {name for name, activation in tensors.items() if activation is not None} == {UP, DOWN}
    assert "  inputs " not in run("plan", model, "--scheme", "int8").stdout


def test_plan_and_inspect_of_safetensors_import_neither_torch_nor_numpy(folder: Path) -> None:
    for args in (["plan", str(folder / "model.safetensors")], ["inspect", str(folder / "model.safetensors")]):
        code = (
            "import sys; from monoquant_core.cli import main; status = main(sys.argv[1:]); "
            "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), status)"
        )
        result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == "[] 0"


def test_the_default_scheme_is_said(folder: Path, run: Run) -> None:
    assert run("plan", folder / "model.safetensors").stderr == "no --scheme given: int8\n"


def test_a_saved_recipe_repeats_the_plan(folder: Path, run: Run, tmp_path: Path) -> None:
    choice = ["--scheme", "int4", "--group-size", "32", "--set", f"{DOWN}=int8:granularity=channel"]
    first = run("plan", folder / "model.safetensors", *choice, "--save", tmp_path / "recipe.toml")
    assert first.stderr == f"wrote {tmp_path / 'recipe.toml'}\n"
    again = run("plan", folder / "model.safetensors", "--recipe", tmp_path / "recipe.toml", "--json")
    once = run("plan", folder / "model.safetensors", *choice, "--json")
    stored = [[(t["name"], t["to"], t["bytes_after"]) for t in json.loads(r.stdout)["tensors"]] for r in (once, again)]
    assert stored[0] == stored[1]


def test_quiet_prints_nothing_and_a_state_dict_works(folder: Path, run: Run) -> None:
    result = run("quantize", folder / "model.pt", "-o", folder / "quiet", "--scheme", "int8", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    first, second = on_disk(folder / "quiet"), on_disk(folder / "int8")
    assert set(first) == set(second)
    result = run("quantize", folder / "model.pt", "-o", folder / "quiet", "--scheme", "int8", "--force", "-q", "--json")
    assert (result.stderr, json.loads(result.stdout)["files"]) == ("", on_disk(folder / "quiet"))


def test_summary_and_finished_files_are_sources(folder: Path, run: Run, finished: object) -> None:
    shown = json.loads(run("inspect", folder / "int8", "--json").stdout)
    stored = {t["name"]: t["stored"] for t in shown["tensors"]}
    assert stored[UP] == "int8[1x*]*float32"
    assert stored[NORM] == "float32"
    assert shown["quantized"] == 2
    text = run("inspect", folder / "int8").stdout
    assert "int8[1x*]*float32" in text
    assert "bits each" in text

    again = run("export", folder / "int8", "-o", folder / "again", "--format", "safetensors")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"wrote {folder / 'again'}\n")
    assert "exact: no value changed" in again.stdout
    for path in (p for p in on_disk(folder / "int8") if p.endswith(".safetensors")):
        ours, theirs = load_file(folder / "int8" / path), load_file(folder / "again" / path)
        assert {n: t.tolist() for n, t in ours.items()} == {n: t.tolist() for n, t in theirs.items()}


def test_compare_puts_the_worst_first(folder: Path, run: Run, finished: object) -> None:
    result = run("compare", folder / "model.safetensors", folder / "int8", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    levels = [float(t["sqnr_db"]) for t in found["tensors"]]
    assert levels == sorted(levels)
    assert {t["name"] for t in found["tensors"][:2]} == {UP, DOWN}
    assert found["counts"] == {"compared": 5, "identical": 3}
    text = run("compare", folder / "model.safetensors", folder / "norm.safetensors", "--limit", "2").stdout
    assert "only in A" in text
    assert "3 more; --limit 0 shows all" in text


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["plan", "missing.safetensors"], "missing.safetensors", ""),
        (["plan", "empty.safetensors"], "empty.safetensors", ""),
        (["plan", "cut.safetensors"], "cut.safetensors", ""),
        (["inspect", "nothing"], "nothing", ""),
        (["plan", "model.safetensors", "--scheme", "int88"], "no scheme 'int88'", "did you mean 'int8'?"),
        (
            ["plan", "model.safetensors", "--format", "safetensor"],
            "no format 'safetensor'",
            "did you mean 'safetensors'?",
        ),
        (["plan", "model.safetensors", "--group-size", "-1"], "--scheme int8: group_size is at least", ""),
        (["plan", "model.safetensors", "--rounding", "up"], "--scheme int8: rounding is one of", ""),
        (["plan", "model.safetensors", "--set", "*.gate_proj.*=int8"], "--set '*.gate_proj.*=int8'", "proj"),
        (["plan", "model.safetensors", "--keep", "nothing*"], "--keep 'nothing*'", ""),
        (["plan", "model.safetensors", "--recipe", "missing.toml"], "missing.toml", ""),
        (["quantize", "norm.safetensors", "-o", "x"], "norm.safetensors: nothing would be quantized", "--set"),
        (["export", "model.safetensors", "-o", "x", "--format", "gguf2"], "no format 'gguf2'", "did you mean 'gguf'?"),
        (
            ["export", "model.safetensors", "-o", "x", "--format", "safetensors", "--scheme", "int8"],
            "export does not",
            "",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_refusals_before_anything_is_read(folder: Path, run: Run, args: list[str], message: str, hint: str) -> None:
    before = on_disk(folder)
    result = run(*args, cwd=folder)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("no --scheme given")]
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ") and hint in lines[1])
    assert on_disk(folder) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantize", "nan.safetensors", "-o", "x"], f"nan.safetensors: {UP}"),
        (["quantize", "model.safetensors", "-o", "norm.safetensors/x"], "norm.safetensors"),
    ],
)
def test_refusals_while_running(folder: Path, run: Run, args: list[str], message: str) -> None:
    before = on_disk(folder)
    result = run(*args, "--scheme", "int8", cwd=folder)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.splitlines()[0].startswith("error: ")
    assert message in result.stderr.splitlines()[0]
    assert len(result.stderr.splitlines()) <= 2
    assert on_disk(folder) == before


def test_an_existing_output_is_replaced_with_force_only(
    folder: Path, run: Run, tmp_path: Path, finished: object
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    command = ["quantize", folder / "model.safetensors", "-o", out, "--scheme", "int8", "-q"]
    refused = run(*command)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert str(out) in refused.stderr.splitlines()[0]
    assert "--force" in refused.stderr.splitlines()[1]
    assert on_disk(out) == {"model.safetensors": 4}
    assert run(*command, "--force").returncode == 0
    assert on_disk(out) == on_disk(folder / "int8")


def test_names_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"\x1b[2Ja\nb": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    result = run("inspect", path)
    assert "\x1b" not in result.stdout + result.stderr


def test_a_pickle_that_carries_code_is_refused(run: Run, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"weight": Attack()}, tmp_path / "evil.pt")
    result = run("quantize", tmp_path / "evil.pt", "-o", tmp_path / "out")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert len(errors) == 1
    assert "evil.pt" in errors[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_no_output(tmp_path: Path, number: int, status: int) -> None:
    source = tmp_path / "zeros.safetensors"
    nbytes = 8 << 30  # a sparse file: it takes no room, and quantizing it takes longer than the test
    header = json.dumps({UP: {"dtype": "F32", "shape": [nbytes >> 14, 4096], "data_offsets": [0, nbytes]}}).encode()
    with source.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + nbytes)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "monoquant_core.cli", "quantize", source, "-o", tmp_path / "out", "--scheme", "int8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, ignored)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_blocks for p in tmp_path.rglob("*") if p.is_file() and p != source):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    said = [line for line in err.splitlines() if not line.startswith("writing: ")]  # progress, on a slow machine
    assert (process.returncode, out, said) == (status, "", [])
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} == {source.name}


def test_export_takes_the_format_from_the_suffix(folder: Path, run: Run, finished: object) -> None:
    done = run(
        "export", folder / "int8", "-o", folder / "small.gguf", "--architecture", "generic", "--tokenizer", "none"
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "small.gguf").read_bytes()[:4] == b"GGUF"

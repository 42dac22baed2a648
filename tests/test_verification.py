"""Finished files in their runtimes: what is compared, what is measured, and what is out of tolerance."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import monoquant_core as mq
from monoquant_core.agreement import Agreement, Quality
from monoquant_core.declarations import RuntimeDeclaration
from monoquant_core.errors import CalibrationError, ExecutionError, SourceError
from monoquant_core.verification import accuracy, compare, named, perplexity

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monoquant_core.cli", "verify", *map(str, words)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "int4"
    with mq.quantize(llama, scheme="int4", options={"group_size": 32}) as model:
        model.save(path)
    return path


# --- sums ---


def test_agreement_is_that_of_float64_formulas() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 5, 7), torch.randn(6, 5, 7)
    found = compare("logits", "IR", a.split(4), b.split(4), 0.1)
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosines = torch.nn.functional.cosine_similarity(x, y)
    assert found.samples == 6
    assert found.cosine == pytest.approx(float(cosines.mean()))
    assert found.worst_cosine == pytest.approx(float(cosines.min()))
    assert found.relative_error == pytest.approx(float((x - y).norm() / x.norm()))
    assert found.max_error == pytest.approx(float((x - y).abs().max()))
    assert found.same_top == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert not found.passed


def test_only_positions_that_both_have_are_compared() -> None:
    a = torch.randn(2, 9, 3)
    found = compare("log_probabilities", "IR", [a], [a[:, -4:]], 0.0)
    assert (found.relative_error, found.same_top, found.passed) == (0.0, 1.0, True)


def test_nan_is_out_of_any_tolerance() -> None:
    found = compare("x", "IR", [torch.ones(2, 3)], [torch.full((2, 3), math.nan)], 1e9)
    assert not found.passed


def test_perplexity_is_that_of_cross_entropy() -> None:
    torch.manual_seed(1)
    logits, ids = torch.randn(3, 8, 11), torch.randint(0, 11, (3, 8))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    value, count = perplexity([logits], [{"input_ids": ids}])
    assert (value, count) == (pytest.approx(math.exp(expected)), 21)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    _, count = perplexity([logits], [{"input_ids": ids, "attention_mask": mask}])
    assert count == 18
    last, _ = perplexity([logits[:, -4:].log_softmax(-1)], [{"input_ids": ids}])
    expected = torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1).double(), ids[:, 5:].flatten())
    assert last == pytest.approx(math.exp(expected), rel=1e-6)


def test_accuracy_counts_labels() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert accuracy([scores], [torch.tensor([1, 0, 0])]) == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize(
    ("metric", "before", "after", "worse"), [("perplexity", 10, 11, 0.1), ("accuracy", 0.8, 0.76, 0.05)]
)
def test_degradation_is_relative(metric: str, before: float, after: float, worse: float) -> None:
    assert Quality(metric, 1, before, after).degradation == pytest.approx(worse)


def test_batches_are_named_by_the_inputs_of_the_model() -> None:
    from monoquant_core.runners import Input

    inputs = [Input("x"), Input("y")]
    a, b = torch.zeros(1), torch.ones(1)
    assert named((a, b), inputs) == {"x": a, "y": b}
    assert named(a, inputs) == {"x": a}
    with pytest.raises(ExecutionError, match="3 inputs"):
        named((a, b, a), inputs)


def test_an_agreement_without_a_bound_passes() -> None:
    assert Agreement("x", "original", 1, 0.1, 0.1, 5.0, 5.0).passed


# --- transformers ---


def test_a_folder_gives_what_it_holds(llama: Path, quantized: Path) -> None:
    found = mq.verify(quantized, llama)
    assert found.runtime == "transformers"
    ir, original = found.agreements
    assert (ir.output, ir.against, original.against) == ("logits", "IR", "original")
    assert ir.relative_error < 1e-5
    assert 1e-3 < original.relative_error < 0.5
    assert found.passed
    assert found.qualities == ()  # inputs were made up


def test_quality_is_measured_on_data(llama: Path, quantized: Path) -> None:
    torch.manual_seed(3)
    data = [{"input_ids": torch.randint(0, 96, (3, 12))} for _ in range(2)]
    found = mq.verify(quantized, llama, data)
    (quality,) = found.qualities
    assert (quality.metric, quality.count, found.samples) == ("perplexity", 66, 6)
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    total = sum(float(model(**batch, labels=batch["input_ids"]).loss.detach()) for batch in data)
    assert quality.before == pytest.approx(math.exp(total / 2), rel=1e-4)


def test_data_of_a_file(llama: Path, quantized: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    ids = torch.randint(0, 96, (6, 12))
    torch.save({"input_ids": ids}, tmp_path / "ids.pt")
    from_file = mq.verify(quantized, llama, tmp_path / "ids.pt", batch_size=3)
    (expected,) = mq.verify(quantized, llama, [{"input_ids": ids}]).qualities
    (found,) = from_file.qualities
    assert from_file.samples == 6
    assert found.before == pytest.approx(expected.before, rel=1e-6)


def test_batches_are_what_calibrate_takes(llama: Path, quantized: Path) -> None:
    ids = torch.arange(3, 15)[None]
    expected = mq.verify(quantized, llama, [{"input_ids": ids}])
    for batch in (ids, [ids], {"input_ids": ids.numpy()}):  # a list, as loaders give
        assert mq.verify(quantized, llama, [batch]).agreements == expected.agreements
    with pytest.raises(CalibrationError, match="a list of batches, and this is one Tensor"):
        mq.verify(quantized, llama, ids)
    for nothing in ([], [{"input_ids": ids[:0]}]):
        with pytest.raises(CalibrationError, match="there are no samples"):
            mq.verify(quantized, llama, nothing)


def test_two_percent_worse_is_warned_of(llama: Path, tmp_path: Path) -> None:
    """A model that has learned its data by heart, then 2 bits."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    torch.manual_seed(0)
    ids = torch.randint(0, 96, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    with mq.quantize(
        tmp_path / "trained", scheme="int2", options={"granularity": "tensor", "rounding": "nearest"}
    ) as rough:
        rough.save(tmp_path / "int2")
    found = mq.verify(tmp_path / "int2", tmp_path / "trained", [{"input_ids": ids}])
    assert found.passed  # the file gives what it holds; it is the values that are poor
    assert found.qualities[0].degradation > 0.02
    assert any("worse than the original" in note for note in found.notes)


def test_a_file_that_does_not_hold_what_it_should_is_out_of_tolerance(
    llama: Path, quantized: Path, tmp_path: Path
) -> None:
    """transformers multiplies with other scales than the reader gives: as after a change of the reader."""
    other = tmp_path / "other"
    with mq.quantize(llama, scheme="w8a8") as model:
        model.save(other)
    done = command(other, "--against", llama, "--tolerance", "1e-7", "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert not said["passed"]
    assert said["agreements"][0]["relative_error"] > 1e-7
    assert mq.verify(other, llama).passed


def test_the_command_shows_a_table(llama: Path, quantized: Path) -> None:
    done = command(quantized, "--against", llama)
    assert (done.returncode, done.stderr) == (0, "")  # no bars of the libraries
    assert "in transformers, 4 samples, made up" in done.stdout
    row = next(line for line in done.stdout.splitlines() if " IR " in line)
    assert "within" in row


def test_a_model_of_another_shape_is_refused(quantized: Path, pretrained: Callable[..., Path], tmp_path: Path) -> None:
    pretrained(tmp_path / "small", "LlamaForCausalLM", intermediate_size=128)
    with pytest.raises(
        SourceError, match=r"does not fit .* other shapes: .*down_proj\.weight \[128, 384\] for \[128, 128\]"
    ):
        mq.verify(quantized, tmp_path / "small")


def test_an_original_without_a_model_is_refused(quantized: Path, llama: Path, tmp_path: Path) -> None:
    save_file(load_file(llama / "model.safetensors"), tmp_path / "weights.safetensors")
    with pytest.raises(mq.MonoquantError, match="nothing that says how to run them"):
        mq.verify(quantized, tmp_path / "weights.safetensors")


class Broken:
    """A runtime that fails."""

    def __init__(self, options: object) -> None:
        raise ValueError("no engine")


def test_a_broken_runtime_takes_no_other_down(llama: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = copy.copy(mq.load_registry())
    monkeypatch.setitem(sys.modules, "broken_runtime", types.SimpleNamespace(Broken=Broken))
    broken = RuntimeDeclaration("broken", "one", "broken_runtime:Broken")
    registry.runtimes = {"broken": broken, **registry.runtimes}
    assert mq.verify(quantized, llama, registry=registry).runtime == "transformers"
    with pytest.raises(ExecutionError, match=r"no runtime .* broken: ValueError\('no engine'\)"):
        mq.verify(quantized, llama, runtime="broken", registry=registry)


def test_a_file_that_no_runtime_runs_is_refused(llama: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    done = command(tmp_path / "a.safetensors", "--against", llama)
    assert done.returncode == 2
    assert "no runtime runs files of this kind; known:" in done.stderr
    with pytest.raises(mq.MonoquantError, match="no runtime 'nothing'"):
        mq.verify(llama, llama, runtime="nothing")

"""GGUF files verified in llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from monoquant_gguf.llamacpp import POSITIONS
from monoquant_gguf.runtime import LlamaCppRuntime

import monoquant_core as mq
from monoquant_core.declarations import NoOptions
from monoquant_core.errors import ExecutionError

transformers = pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")


def save(source: Path, path: Path, scheme: str = "", **options: object) -> Path:
    if scheme:
        with mq.quantize(source, scheme=scheme, options=options) as model:
            model.save(path, "gguf")
    else:
        mq.export(source, path, "gguf", format_options={"outtype": "f32"})
    return path


def test_scores_are_those_of_transformers(small_llama: Path, tmp_path: Path, llamacpp: ModuleType) -> None:
    """By requests to a server, the same as by llama.cpp's own functions and as transformers computes."""
    path = save(small_llama, tmp_path / "f32.gguf")
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (2, 20))
    model = transformers.LlamaForCausalLM.from_pretrained(small_llama).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits, -1)[:, -POSITIONS:]
    with LlamaCppRuntime(NoOptions()).open(path) as runner:
        (found,) = runner.run({"input_ids": ids}).values()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    own = torch.from_numpy(llamacpp.logits(path, ids[0].tolist(), flash=0, kv_f32=True)).log_softmax(-1)[-POSITIONS:]
    torch.testing.assert_close(found[0], own, atol=1e-4, rtol=0)


def test_padding_is_left_out(small_llama: Path, tmp_path: Path) -> None:
    path = save(small_llama, tmp_path / "f32.gguf")
    ids = torch.arange(5, 25)[None]
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 4)), "attention_mask": torch.ones(1, 24).long()}
    padded["attention_mask"][:, 20:] = 0
    with LlamaCppRuntime(NoOptions()).open(path) as runner:
        (found,), (same,) = runner.run({"input_ids": ids}).values(), runner.run(padded).values()
    torch.testing.assert_close(found, same, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scheme", "most"), [("", 1e-4), ("Q8_0", 0.02), ("Q4_K", 0.02)])
def test_a_llama_gives_what_the_file_holds(small_llama: Path, tmp_path: Path, scheme: str, most: float) -> None:
    path = save(small_llama, tmp_path / "out.gguf", scheme)
    torch.manual_seed(1)
    found = mq.verify(path, small_llama, [{"input_ids": torch.randint(3, 1000, (2, 24))}])
    assert (found.runtime, found.passed) == ("llama.cpp", True)
    ir, original = found.agreements
    assert ir.relative_error < most
    assert ir.relative_error <= original.relative_error * 1.01 + 1e-9  # nearer to its own values than to the original's
    (quality,) = found.qualities
    assert quality.metric == "perplexity"
    assert quality.count == 2 * (POSITIONS - 1)
    assert math.isfinite(quality.after)


def test_a_file_of_other_weights_differs_from_the_original(small_llama: Path, tmp_path: Path) -> None:
    """llama.cpp gives what the file holds, and that is not the original."""
    model = transformers.LlamaForCausalLM.from_pretrained(small_llama)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    other = tmp_path / "other"
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (other / name).write_bytes((small_llama / name).read_bytes())
    path = save(other, tmp_path / "other.gguf")
    ir, original = mq.verify(path, small_llama).agreements
    assert ir.passed
    assert original.relative_error > 100 * ir.relative_error


def test_embeddings_of_minilm(minilm: Path, tmp_path: Path) -> None:
    path = save(minilm, tmp_path / "minilm.gguf", "Q8_0")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    batch = dict(
        tokenizer(["A short one.", "And a sentence that is a little longer."], padding=True, return_tensors="pt")
    )
    found = mq.verify(path, minilm, [batch])
    assert found.passed
    assert found.qualities == ()
    (ir, _) = found.agreements
    assert ir.output == "embedding"
    assert ir.worst_cosine > 0.998


def test_refusals(small_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "generic.gguf"
    mq.export(small_llama, broken, "gguf", format_options={"architecture": "generic", "tokenizer": "none"})
    with pytest.raises(ExecutionError, match=r"generic\.gguf: has no vocabulary"):
        mq.verify(broken, small_llama)
    path = save(small_llama, tmp_path / "f32.gguf")
    with pytest.raises(ExecutionError, match="takes input_ids"):
        mq.verify(path, small_llama, [{"inputs_embeds": torch.zeros(1, 3, 256)}])

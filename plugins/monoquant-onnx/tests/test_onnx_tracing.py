"""A zoo of modules: each becomes a graph that onnxruntime runs as torch does, its tensors under their own names."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from monoquant_onnx import tracing
from monoquant_onnx.sameness import TOLERANCE, distance
from monoquant_onnx.source import OnnxSource
from torch import nn
from torch.nn import functional as F

from monoquant_core import rows as r
from monoquant_core.api import QuantizedModel, installed
from monoquant_core.errors import CalibrationError, MonoquantError, PlanError, SourceError
from monoquant_core.sources import StateDictSource, open_source


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(self.embed(ids)))


class Conv1dNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.out = nn.Linear(16 if options.get("bidirectional") else 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0])


class CellLoop(nn.Module):
    """Unrolled by the exporter: the number of steps is in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8))
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 8, mode="mean")
        self.out = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.bag(ids))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(11, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.silu(self.norm(self.down(x)))
        return self.out(torch.cat([x, self.up_norm(self.up(low))], 1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.mha(x, x, x)[0])


class Functional(nn.Module):
    """Weights that no module owns, used in ways that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 16))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.gate = nn.Parameter(torch.randn(16))
        self.register_buffer("table", torch.randn(32, 12))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.einsum("btf,fh->bth", x, self.w) * torch.sigmoid(self.gate)
        h = h + F.softmax(h @ h.transpose(1, 2) / math.sqrt(16), -1) @ h
        c = F.conv1d(h.mean(-1, keepdim=True).transpose(1, 2), self.kernel, padding=1)
        return {"hidden": h, "conv": torch.where(c > 0, c, c.exp() - 1), "nearest": (x @ self.table.T).argmax(-1)}


@dataclass
class Case:
    make: Callable[[], nn.Module]
    example: Any
    kinds: dict[str, str]  #: every matrix and kernel, with its kind
    shapes: tuple[tuple[int | None, ...], ...]  #: of the inputs; None varies
    notes: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)


ZOO = {
    "tied": Case(
        Tied,
        torch.tensor([[1, 2, 3, 4, 5]]),
        {"embed.weight": "embedding", "proj.weight": "linear_transposed", "head.weight": "embedding"},
        ((None, None),),
        tied={"head.weight": "embed.weight"},
    ),
    "conv1d": Case(
        Conv1dNet,
        torch.randn(2, 4, 12),
        {"1.weight": "conv", "4.weight": "conv"},
        ((None, 4, None),),
        ("1 BatchNorm folded",),
    ),
    "bilstm": Case(
        lambda: Recurrent(nn.LSTM, bidirectional=True),
        torch.randn(3, 7, 6),
        {"out.weight": "head_transposed", "*": "recurrent"},
        ((None, None, 6),),
        ("another order, so rnn.bias_hh_l0",),
    ),
    "gru": Case(
        lambda: Recurrent(nn.GRU),
        torch.randn(2, 5, 6),
        {"out.weight": "head_transposed", "*": "recurrent"},
        ((None, None, 6),),
        ("another order, so rnn.bias_hh_l0",),
    ),
    "cell loop": Case(
        CellLoop,
        torch.randn(2, 5, 6),
        {"cell.weight_ih": "linear", "cell.weight_hh": "linear"},
        ((None, 5, 6),),
        ("axis 1 of 'x' is fixed at 5",),
    ),
    "bag": Case(
        Bag,
        torch.randint(0, 40, (3, 6)),
        {"bag.weight": "embedding", "out.weight": "linear"},
        ((None, None),),
    ),
    "unet": Case(
        UNet,
        torch.randn(1, 3, 16, 16),
        {"down.weight": "conv", "up.weight": "conv_transpose", "out.weight": "head"},
        ((None, 3, 16, 16),),
        ("BatchNorm folded", "'x' is fixed at 16x16, the size of the example"),
    ),
    "weight norm": Case(
        Normed, torch.randn(2, 4, 9), {"conv.parametrizations.weight.original1": "conv"}, ((None, 4, None),)
    ),
    "attention": Case(
        Attention,
        torch.randn(2, 6, 16),
        {"mha.in_proj_weight": "linear_transposed", "mha.out_proj.weight": "linear"},
        ((None, None, 16),),
    ),
    "functional": Case(
        Functional,
        {"x": torch.randn(2, 5, 12)},
        {"w": "linear_transposed", "kernel": "conv", "table": "linear_transposed"},
        ((None, None, 12),),
    ),
}


@functools.cache
def traced(case: str) -> tuple[nn.Module, OnnxSource]:
    torch.manual_seed(0)
    module = ZOO[case].make().eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            child.running_mean.normal_()  # type: ignore[union-attr]
            child.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(child.weight, -1.5, 1.5)
            nn.init.normal_(child.bias)
        elif isinstance(child, nn.MultiheadAttention):
            nn.init.normal_(child.in_proj_bias)
    return module, tracing.trace(open_source(module), ZOO[case].example)


def compare(module: nn.Module, source: OnnxSource, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = module(**inputs) if isinstance(module, Functional) else module(*inputs.values())
    leaves = list(expected.values()) if isinstance(expected, dict) else [expected]
    with source.graph.runner(()) as runner:
        found = runner.run(inputs)
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        leaves = [expected[name] for name in found]
    for ours, theirs in zip(found.values(), leaves, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ZOO)
def test_it_runs_as_torch_does_with_other_extents_too(case: str) -> None:
    module, source = traced(case)
    wanted, example = ZOO[case], ZOO[case].example
    assert [i.shape for i in source.graph.inputs] == list(wanted.shapes)
    example = next(iter(example.values())) if isinstance(example, dict) else example
    for batch, length in ((2, 9), (5, 7)):
        free = iter([batch, length])
        shape = [next(free) if n is None else n for n in wanted.shapes[0]]
        x = torch.randn(shape) if example.is_floating_point() else torch.randint(0, 40, shape)
        compare(module, source, {source.graph.inputs[0].name: x})


@pytest.mark.parametrize("case", ZOO)
def test_tensors_have_the_models_names_and_the_kind_of_their_use(case: str) -> None:
    module, source = traced(case)
    state, wanted = module.state_dict(), ZOO[case]
    found = {spec.name: spec.kind for spec in source.specs() if len(spec.shape) >= 2 and spec.kind != "bias"}
    assert {k: v for k, v in found.items() if k in state} == {k: v for k, v in wanted.kinds.items() if k != "*"}
    assert {v for k, v in found.items() if k not in state} <= {wanted.kinds.get("*")}
    assert {s.name: s.tied_to for s in source.specs() if s.tied_to} == wanted.tied
    for note in wanted.notes:
        assert any(note in n for n in source.info.notes), source.info.notes
    assert all("\n" not in n for n in source.info.notes)


@pytest.mark.parametrize("case", ZOO)
def test_values_are_the_models_own_transposed_where_the_kind_says_so(case: str) -> None:
    module, source = traced(case)
    state = module.state_dict()
    for spec in source.specs():
        if spec.name not in state or spec.name in source.graph.folded:
            continue
        value = source.read(spec.name, r.all_rows(spec.shape))
        assert isinstance(value, torch.Tensor)
        lies = spec.transposed and spec.name != "w"  # which lies so in the module, too
        original = state[spec.name].T if lies else state[spec.name]
        if spec.kind == "bias" and not torch.equal(value, original):
            assert any("BatchNorm" in n for n in source.info.notes)
            continue
        assert torch.equal(value, original), spec.name


@pytest.mark.parametrize("scheme", ["w8a8", "int8"])
@pytest.mark.parametrize("case", ZOO)
def test_quantized_it_gives_nearly_the_same(case: str, scheme: str, tmp_path: Path) -> None:
    module, source = traced(case)
    model = QuantizedModel(source, installed(), scheme)
    if "*" in ZOO[case].kinds:
        with pytest.raises(PlanError, match="nothing would be quantized: 2 x LSTM or GRU"):
            model.save(tmp_path / "q.onnx", "onnx")
        return
    model.save(tmp_path / "q.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"))
    example = ZOO[case].example
    x = torch.cat([next(iter(example.values())) if isinstance(example, dict) else example] * 2)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = module(x)
    expected = expected["hidden"] if isinstance(expected, dict) else expected
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999


def test_a_batch_norm_is_folded_into_the_weights_before_it() -> None:
    module, source = traced("conv1d")
    assert isinstance(module, nn.Sequential)
    factor, axis = source.graph.folded["1.weight"]
    norm = module[2]
    expected = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(factor.float(), expected.detach())
    got = source.read("1.weight", range(8 * 4))
    torch.testing.assert_close(got, (module[1].weight * expected[:, None, None]).detach())
    assert axis == 0
    ops = [node.op_type for node in source.graph.model.graph]
    assert ops.count("BatchNormalization") == 1, "the first has nothing before it"


def test_tied_weights_are_stored_once() -> None:
    _, source = traced("tied")
    assert sum(math.prod(d.shape) for d in source.graph.data.values()) == 50 * 16 + 16 * 16 + 16
    uses = {node.op_type for node, _ in source.graph.uses("embed.weight")}
    assert uses == {"Gather", "Transpose"}


def test_points_are_reported_as_torch_sees_them() -> None:
    module, source = traced("conv1d")
    assert isinstance(module, nn.Sequential)
    x = torch.randn(3, 4, 20)
    seen: dict[str, tuple[torch.Tensor, int]] = {}
    with source.graph.runner(["1:input", "4:input", "4:output"]) as runner:
        assert runner.points == ("1:input", "4:input", "4:output")
        runner.run(x, lambda point, values, axis=-1: seen.__setitem__(point, (values.clone(), axis)))
    with torch.no_grad():
        before = nn.Sequential(*(module[i] for i in range(4)))(x)
        torch.testing.assert_close(seen["1:input"][0], module[0](x))
        torch.testing.assert_close(seen["4:input"][0], before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["4:output"][0], module(x), rtol=1e-4, atol=1e-5)
    assert {axis for _, axis in seen.values()} == {1}
    with pytest.raises(CalibrationError, match="no point 'nowhere:input'"):
        source.graph.runner(["nowhere:input"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(3, 5, 20), r"input input is \[any, 4, any\], the batch has \[3, 5, 20\]"),
        ((torch.randn(3, 4, 20), torch.randn(1)), "a batch of 2 values for 1 inputs"),
        ({"other": torch.randn(3, 4, 20)}, "the batch has no input; it has other"),
        (torch.ones(3, 4, 20, dtype=torch.int64), "input input takes float32, the batch has torch.int64"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: Any, message: str) -> None:
    _, source = traced("conv1d")
    with source.graph.runner(()) as runner, pytest.raises(CalibrationError, match=message):
        runner.run(batch)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if x.sum() > 0 else x


def test_what_torch_cannot_export_is_refused_with_the_reason() -> None:
    with pytest.raises(SourceError, match="Branch: torch.export does not take it: ") as caught:
        tracing.trace(open_source(Branch()), torch.randn(2, 4))
    assert "\n" not in str(caught.value)
    assert "torch.cond" in caught.value.hint
    with pytest.raises(MonoquantError, match="does not run on float32 .2, 5."):
        tracing.trace(open_source(nn.Linear(4, 4)), torch.randn(2, 5))


def test_without_an_example_the_model_must_say_what_it_takes() -> None:
    with pytest.raises(CalibrationError) as caught:
        tracing.trace(open_source(Branch()))
    assert "--data" in caught.value.hint
    with pytest.raises(CalibrationError):
        tracing.trace(StateDictSource({"w": torch.randn(4, 4)}), torch.randn(2, 4))


def test_a_graph_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporters do get models wrong (pytorch/pytorch#169178): such a graph must not be quantized."""
    translate = tracing._translate

    def wrong(*args: Any) -> Any:
        model = translate(*args)
        next(node for node in model.graph if node.op_type == "Relu").op_type = "Sigmoid"
        return model

    monkeypatch.setattr(tracing, "_translate", wrong)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(SourceError, match=r"output '.*' of the exported graph differs from the module's by") as caught:
        tracing.trace(open_source(module), torch.randn(2, 4))
    assert "\n" not in str(caught.value)


class Through(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, unused: torch.Tensor, flag: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.lin(x)


def test_inputs_have_the_names_of_arguments() -> None:
    source = tracing.trace(open_source(Through()), {"x": torch.randn(2, 4), "unused": torch.randn(2, 3), "flag": True})
    assert [i.name for i in source.graph.inputs] == ["x", "unused"]
    x = torch.randn(5, 4)
    with source.graph.runner(()) as runner:
        first, _ = runner.run({"x": x, "unused": torch.zeros(5, 3)}).values()
    assert torch.equal(first, x)


def test_half_precision_becomes_float32_and_is_said() -> None:
    module = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    source = tracing.trace(open_source(module), torch.randn(2, 3, 8))
    assert any("bfloat16 weights become float32" in n for n in source.info.notes)
    assert {s.dtype for s in source.specs()} == {"float32"}
    assert next(module.parameters()).dtype == torch.bfloat16


def test_a_program_of_a_pt2_file_needs_no_example(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = torch.export.Dim("n", min=2)
    program = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes={"input": {0: batch}})
    torch.export.save(program, tmp_path / "m.pt2")
    source = tracing.trace(open_source(tmp_path / "m.pt2"))
    assert {s.name for s in source.specs()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert source.graph.inputs[0].shape == (None, 8)
    compare(module, source, {source.graph.inputs[0].name: torch.randn(7, 8)})


def test_resnet20_of_cifar(shared: Path) -> None:
    spec = importlib.util.spec_from_file_location("resnet_cifar", shared / "models" / "resnet_cifar.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    module = code.resnet20()
    module.load_state_dict(torch.load(shared / "models" / "resnet20_cifar10.pt", weights_only=True))
    module.eval()
    images = np.load(shared / "data" / "cifar10_subset.npz")["test_x"][:32]
    x = torch.as_tensor(code.preprocess(images))
    source = tracing.trace(open_source(module), x)
    assert len(source.graph.folded) == 19
    assert not [n for n in source.graph.model.graph if n.op_type == "BatchNormalization"]
    with torch.no_grad(), source.graph.runner(()) as runner:
        (found,) = runner.run(x).values()
        assert distance(found, module(x)) < 1e-5
    kinds = [s.kind for s in source.specs() if len(s.shape) > 1]
    assert kinds.count("conv") == 19
    assert kinds[-1] == "head"


def test_minilm_from_its_folder(minilm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tracing.trace(open_source(minilm))
    names = {s.name for s in open_source(minilm).specs()}
    ours = {s.name: s.kind for s in source.specs()}
    # torch.onnx drops a bias of zeros; token types are part of the graph where they are inputs.
    assert names - set(ours) <= {"embeddings.position_ids", "pooler.dense.bias"}
    assert set(ours) <= names
    assert list(ours.values()).count("linear_transposed") == 36
    assert [i.name for i in source.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {i.shape for i in source.graph.inputs} == {(None, None)}
    model = transformers.BertModel.from_pretrained(minilm).eval()
    ids = torch.randint(0, 30000, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad(), source.graph.runner(()) as runner:
        expected, found = model(**batch), runner.run(batch)
    assert list(found) == ["last_hidden_state", "pooler_output"]
    assert any("zeros, which the exporter left out of the graph: pooler.dense.bias" in n for n in source.info.notes)
    for name, value in found.items():
        assert distance(value, expected[name]) < 1e-5 < TOLERANCE


def test_an_encoder_and_its_decoder_have_lengths_of_their_own() -> None:
    """And one table of embeddings for three modules."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=32, vocab_size=60, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    module = transformers.T5ForConditionalGeneration(config).eval()
    source = tracing.trace(open_source(module))
    tied = {s.name: s.tied_to for s in source.specs() if s.tied_to}
    assert tied == dict.fromkeys(
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"
    )
    assert module.config.use_cache
    ids = torch.randint(0, 60, (3, 11))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    with torch.no_grad(), source.graph.runner(()) as runner:
        found, expected = runner.run(batch), module(**batch, use_cache=False)
    assert list(found) == ["logits", "encoder_last_hidden_state"]
    for name, value in found.items():
        assert distance(value, expected[name]) < 1e-5

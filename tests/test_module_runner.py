"""Runners of modules and programs: that every weight's input is seen, and that the module is left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from monoquant_core.errors import CalibrationError
from monoquant_core.graphs import made_up_batch, module_of, runnable_of
from monoquant_core.module_runner import ModuleGraph, ProgramGraph
from monoquant_core.runners import Batch, Runnable
from monoquant_core.sources import open_source


class Watched:
    """What a runner told: for each point the values, flattened to [rows, channels]."""

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}

    def __call__(self, point: str, values: torch.Tensor, axis: int = -1) -> None:
        self.values.setdefault(point, []).append(values.movedim(axis, -1).flatten(0, -2).clone())

    def __getitem__(self, point: str) -> torch.Tensor:
        return torch.cat(self.values[point])


def watch(graph: Runnable, *batches: Batch, points: list[str] | None = None) -> Watched:
    seen = Watched()
    with graph.runner(points) as runner:
        for batch in batches:
            runner.run(batch, seen)
    return seen


class Cnn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))
        return y


def test_inputs_and_outputs_of_a_cnn() -> None:
    torch.manual_seed(0)
    module, x = Cnn(), torch.randn(2, 3, 5, 5)
    seen = watch(ModuleGraph(module), x)
    module.eval()
    with torch.no_grad():
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        conv = module.conv(x)
        pooled = module.bn(conv).relu().mean((2, 3))
    assert set(seen.values) == {"conv:input", "conv:output", "fc:input", "fc:output"}
    assert torch.equal(seen["conv:input"], padded.movedim(1, -1).flatten(0, -2))  # what the weight is applied to
    assert torch.equal(seen["conv:output"], conv.movedim(1, -1).flatten(0, -2))
    assert torch.equal(seen["fc:input"], pooled)


def test_a_program_tells_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Cnn().eval(), torch.randn(2, 3, 5, 5)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "cnn.pt2")
    expected = watch(ModuleGraph(module), x)
    for source in (open_source(tmp_path / "cnn.pt2"), open_source(program)):
        graph = runnable_of(source)
        assert [(i.name, i.dtype, i.shape) for i in graph.inputs] == [("x", "float32", (None, 3, 5, 5))]
        found = watch(graph, {"x": x})
        assert found.values.keys() == expected.values.keys()
        assert all(torch.equal(found[point], expected[point]) for point in expected.values)


class Odd(torch.nn.Module):
    """Weights that no module of their own multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = torch.nn.Parameter(torch.randn(5, 8))
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 5))
        self.cell = torch.nn.GRUCell(8, 8)
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
        self.embedding = torch.nn.Embedding(4, 8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        y = self.attention(x, x, x)[0] + self.embedding(ids)
        a = torch.einsum("bsk,nk->bsn", y, self.table)
        b = y[0] @ self.experts[1]
        return a, {"b": b, "c": self.normed(self.cell(y[:, 0]))}


def test_weights_are_known_by_their_memory() -> None:
    torch.manual_seed(0)
    module, x, ids = Odd().eval(), torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [3, 3, 3]])
    with ModuleGraph(module).runner() as runner:
        seen = Watched()
        outputs = runner.run({"x": x, "ids": ids}, seen)
        expected = set(runner.points)
    with torch.no_grad():
        y = module.attention(x, x, x)[0] + module.embedding(ids)
    torch.testing.assert_close(seen["table:input"], y.flatten(0, 1))
    torch.testing.assert_close(seen["experts:input"], y[0])
    assert torch.equal(seen["attention.in_proj_weight:input"].sort(0).values, x.flatten(0, 1).sort(0).values)
    assert seen["attention.out_proj:input"].shape == (6, 8)
    torch.testing.assert_close(seen["cell.weight_ih:input"], y[:, 0])
    assert not seen["cell.weight_hh:input"].any()  # the state starts at zero
    assert "embedding:input" not in seen.values
    assert expected - set(seen.values) == {"unused:input"}
    assert sorted(outputs) == ["output.0", "output.1.b", "output.1.c"]


def test_weights_that_are_transposed_or_lie_in_one_storage() -> None:
    torch.manual_seed(0)
    flat = torch.randn(2 * 8 * 8)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(flat[:64].view(8, 8))
            self.b = torch.nn.Parameter(flat[64:].view(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b @ (x @ self.a.T).T  # the activation on the right: channels are its rows

    x = torch.randn(3, 8)
    module = Two()
    seen = watch(ModuleGraph(module), x)
    assert torch.equal(seen["a:input"], x)
    torch.testing.assert_close(seen["b:input"], (x @ module.a.T).detach())


def test_torchscript_takes_no_hooks_and_is_watched_all_the_same() -> None:
    torch.manual_seed(0)
    module, x = Cnn().eval(), torch.randn(2, 3, 5, 5)
    seen, expected = watch(ModuleGraph(torch.jit.trace(module, x)), x), watch(ModuleGraph(module), x)
    assert set(seen.values) == {"conv:input", "fc:input"}
    torch.testing.assert_close(seen["fc:input"], expected["fc:input"])


def test_chosen_points() -> None:
    module, x = Cnn(), torch.randn(2, 3, 5, 5)
    seen = watch(ModuleGraph(module), x, points=["bn:output", "fc:input"])
    assert set(seen.values) == {"bn:output", "fc:input"}
    with pytest.raises(CalibrationError, match="no point 'fk:input'") as caught:
        ModuleGraph(module).runner(["fk:input"])
    assert "fc:input" in caught.value.hint


def state_of(module: torch.nn.Module) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    return hooks, [m.training for m in module.modules()], torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(fails: bool) -> None:
    module = Cnn().train()
    module.bn.eval()
    before, parameters = state_of(module), {k: v.clone() for k, v in module.state_dict().items()}
    graph = ModuleGraph(module)
    x = torch.randn(2, 7 if fails else 3, 5, 5)
    with pytest.raises(CalibrationError) if fails else torch.no_grad(), graph.runner() as runner:
        assert not any(m.training for m in module.modules())
        runner.run(x, Watched())
    assert state_of(module) == before
    assert all(torch.equal(v, parameters[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        return y if mask is None else y * mask


REFUSED: dict[str, tuple[Batch, str]] = {
    "an unknown name": ({"x": torch.ones(1, 4), "labels": torch.ones(1)}, "it has no input 'labels'"),
    "a missing input": ({"mask": torch.ones(1, 2)}, "it needs input 'x'"),
    "too many": ((torch.ones(1, 4), torch.ones(1, 2), torch.ones(1)), "a batch of 3 inputs, and it takes 2"),
    "a shape": (torch.ones(1, 5), "it fails on a batch of float32[1, 5]: RuntimeError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_do_not_fit(case: str) -> None:
    batch, message = REFUSED[case]
    with ModuleGraph(Named()).runner() as runner, pytest.raises(CalibrationError) as caught:
        runner.run(batch)
    assert message in str(caught.value)
    assert "x, mask (optional)" in caught.value.hint


def test_dtypes_are_converted_only_where_nothing_is_guessed(tmp_path: Path) -> None:
    module = Named()
    with ModuleGraph(module).runner() as runner:
        runner.run(torch.ones(2, 4, dtype=torch.float64))
        runner.run({"x": torch.ones(2, 4, dtype=torch.float16), "mask": torch.ones(2, 2)})
        assert runner.notes == [
            "input 'x': float64 values are cast to float32",
            "input 'x': float16 values are cast to float32",
        ]
    program = torch.export.export(module, (torch.ones(2, 4),))
    with ProgramGraph(program, "p").runner() as runner:
        with pytest.raises(CalibrationError, match="input 'x' takes float32, and the data has uint8"):
            runner.run(torch.ones(2, 4, dtype=torch.uint8))
        with pytest.raises(CalibrationError, match=r"shape \[3, 4\] does not fit x float32\[2, 4\]"):
            runner.run(torch.ones(3, 4))


def test_made_up_batches(shared: Path) -> None:
    program = torch.export.export(Named(), (torch.ones(2, 4),), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    graph = ProgramGraph(program, "p")
    batch = made_up_batch(graph, 3)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"x": (3, 4)}
    assert torch.equal(batch["x"], made_up_batch(graph, 3)["x"])
    with pytest.raises(CalibrationError, match="nothing tells what its input 'x' is"):
        made_up_batch(ModuleGraph(Named()), 3)


def test_a_folder_of_transformers_runs(minilm: Path) -> None:
    pytest.importorskip("transformers")
    source = open_source(minilm)
    graph = runnable_of(source)
    seen = watch(graph, made_up_batch(graph, 2))
    linear = {s.name.removesuffix(".weight") + ":input" for s in source.specs() if s.kind == "linear"}
    assert len(linear) > 30
    assert linear <= set(seen.values)
    with pytest.raises(CalibrationError, match="nothing that says how to run them"):
        module_of(open_source({"w": torch.ones(2, 2)}))

"""Graphs of .pt2 files: what torch loads of an honest one, and that a hostile one runs nothing."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monoquant_core.containers.pt2_graph import Pt2Graph
from monoquant_core.errors import SourceError
from monoquant_core.sources import open_source


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.fc(self.conv(x).relu().mean((2, 3))) + self.shift
        y = torch.cond(y.sum() > 0, lambda v: v + 1, lambda v: v - 1, (y,))
        return {"y": y if scale is None else y * scale}


@functools.cache
def archive() -> tuple[Net, bytes]:
    torch.manual_seed(0)
    module, out = Net().eval(), io.BytesIO()
    batch, size = torch.export.Dim("batch"), torch.export.Dim("size", min=4, max=64)
    x = torch.randn(2, 1, 8, 8)
    torch.export.save(
        torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch, 2: 2 * size, 3: 2 * size}}), out
    )
    return module, out.getvalue()


def save(path: Path) -> tuple[Net, torch.Tensor]:
    module, data = archive()
    path.write_bytes(data)
    return module, torch.randn(5, 1, 12, 12)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], extra: dict[str, bytes] | None = None) -> Path:
    """Change the graph's JSON, and add records."""
    target = path.with_name(f"bad-{path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("models/model.json"):
                graph = json.loads(data)
                change(graph)
                data = json.dumps(graph).encode()
            copy.writestr(name, data)
        for name, data in (extra or {}).items():
            copy.writestr(f"{root}/{name}", data)
    return target


def test_gives_what_torch_gives(tmp_path: Path) -> None:
    module, x = save(tmp_path / "net.pt2")
    graph = Pt2Graph(tmp_path / "net.pt2")
    program = graph.load()
    assert graph.load() is program
    torch.testing.assert_close(program.module()(x)["y"], module(x)["y"], rtol=0, atol=0)


def test_the_source_carries_it_and_never_reads_sample_inputs(tmp_path: Path) -> None:
    save(tmp_path / "net.pt2")
    bomb = tmp_path / "ran"
    path = rewrite(tmp_path / "net.pt2", lambda graph: None)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    sample = next(name for name in names if "sample_inputs" in name)
    with zipfile.ZipFile(tmp_path / "swapped.pt2", "w") as copy, zipfile.ZipFile(path) as source:
        for name in names:
            copy.writestr(name, pickle.dumps(Bomb(bomb)) if name == sample else source.read(name))
    source = open_source(tmp_path / "swapped.pt2")
    source.info.graph.load()
    source.close()
    assert not bomb.exists()
    with pytest.raises(Exception):  # noqa: B017 - and torch itself would have run it
        torch.export.load(tmp_path / "swapped.pt2")
    assert bomb.exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def first_node(graph: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = graph["graph_module"]["graph"]["nodes"][0]
    return node


def set_target(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda graph: first_node(graph).update(target=target)


def rename_input(graph: dict[str, Any]) -> None:
    text = json.dumps(graph).replace('"x"', json.dumps("x=open('ran','w')"))
    graph.clear()
    graph.update(json.loads(text))


def expression(text: str) -> Callable[[dict[str, Any]], None]:
    def change(graph: dict[str, Any]) -> None:
        values = graph["graph_module"]["graph"]["tensor_values"]
        sizes = next(s for v in values.values() for s in v["sizes"] if "as_expr" in s)
        sizes["as_expr"]["expr_str"] = text

    return change


def tree(context: Any) -> Callable[[dict[str, Any]], None]:
    def change(graph: dict[str, Any]) -> None:
        spec = graph["graph_module"]["module_call_graph"][0]["signature"]
        spec["out_spec"] = json.dumps([1, context])

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a library": (set_target("torch.ops.load_library"), "no operator that a graph may call"),
    "the hub": (set_target("torch.hub.load"), "no operator that a graph may call"),
    "torch.load": (set_target("torch.load"), "no operator that a graph may call"),
    "attributes": (set_target("torch.ops.aten.__init__.__globals__"), "no operator that a graph may call"),
    "an extension": (set_target("#x:y"), "no operator that a graph may call"),
    "a kernel": (set_target("torch.ops.higher_order.triton_kernel_wrapper_functional"), "no operator that a graph"),
    "reading files": (set_target("torch.ops.aten.from_file.default"), "reads or writes files"),
    "writing files": (set_target("torch.ops.aten.save.default"), "reads or writes files"),
    "a name": (rename_input, "is not a name"),
    "an expression": (expression("__import__('os').system('touch ran')"), "no arithmetic expression"),
    "another expression": (expression("Symbol('s0').__class__"), "no arithmetic expression"),
    "a power": (expression("Pow(Integer(9), Pow(Integer(999999), Integer(999999)))"), "no arithmetic expression"),
    "an enum": (
        tree({"type": "builtins.dict", "context": json.dumps({"__enum__": 1, "fqn": "evil:X"}), "children_spec": []}),
        "imports a module",
    ),
    "a factory": (
        tree(
            {
                "type": "collections.defaultdict",
                "context": {"default_factory_module": "evil", "default_factory_name": "f", "dict_context": []},
                "children_spec": [],
            }
        ),
        "imports a module",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_what_torch_would_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    save(tmp_path / "net.pt2")
    change, message = HOSTILE[case]
    path = rewrite(tmp_path / "net.pt2", change)
    with pytest.raises(SourceError) as caught:
        Pt2Graph(path).load()
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_guards_and_compiled_libraries_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles the one and loads the other; neither is needed to run the graph."""
    monkeypatch.chdir(tmp_path)
    module, x = save(tmp_path / "net.pt2")
    extra = {"data/aotinductor/model/evil.so": b"not a library"}
    path = rewrite(tmp_path / "net.pt2", lambda g: g.update(guards_code=["open('ran','w') or True"]), extra)
    program = Pt2Graph(path).load()
    torch.testing.assert_close(program.module()(x)["y"], module(x)["y"])
    assert not (tmp_path / "ran").exists()


def test_refuses_pickled_weights(tmp_path: Path) -> None:
    save(tmp_path / "net.pt2")
    target = tmp_path / "pickled.pt2"
    with zipfile.ZipFile(tmp_path / "net.pt2") as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("model_weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
                assert b"true" in data
            copy.writestr(name, data)
    with pytest.raises(SourceError, match="stored as a pickle"):
        Pt2Graph(target).load()


def test_says_what_torch_does_not_load(tmp_path: Path) -> None:
    save(tmp_path / "net.pt2")
    path = rewrite(tmp_path / "net.pt2", set_target("torch.ops.aten.no_such_operator.default"))
    with pytest.raises(SourceError, match="torch cannot load its graph") as caught:
        Pt2Graph(path).load()
    assert "no_such_operator" in str(caught.value)


def test_outputs_of_another_librarys_class_are_dictionaries(tmp_path: Path) -> None:
    """Without importing the library: a file must not decide what is imported."""
    save(tmp_path / "net.pt2")
    spec = {"type": "transformers.modeling_outputs.Output", "context": json.dumps(["y"])}
    leaf = {"type": None, "context": None, "children_spec": []}
    path = rewrite(tmp_path / "net.pt2", tree(spec | {"children_spec": [leaf]}))
    program = Pt2Graph(path).load()
    assert list(program.module()(torch.randn(2, 1, 8, 8))) == ["y"]

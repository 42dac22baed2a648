"""Opening models of every kind: what is accepted, what is refused and how, and what is read."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monoquant_core.containers.safetensors import header_bytes
from monoquant_core.declarations import SourceDeclaration
from monoquant_core.errors import SourceError
from monoquant_core.model import ModelInfo, Source, TensorSpec
from monoquant_core.plugins import Registry
from monoquant_core.rows import all_rows, chunks
from monoquant_core.scratch import Scratch
from monoquant_core.sources import ModuleSource, SafetensorsSource, StateDictSource, TorchSource, open_source
from monoquant_core.tensor import QuantizedTensor, same_bits


def refused(src: Any, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_source(src, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def read(source: Source, name: str) -> torch.Tensor:
    shape = next(spec.shape for spec in source.specs() if spec.name == name)
    value = source.read(name, all_rows(shape))
    assert not isinstance(value, QuantizedTensor)
    return value


# What is accepted


def test_every_source_is_a_source(tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(3, 4)}
    torch.save(state, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    program = torch.export.export(nn.Sequential(OrderedDict(fc=nn.Linear(4, 3, bias=False))), (torch.ones(1, 4),))
    torch.export.save(program, tmp_path / "a.pt2")
    module = nn.Module()
    module.fc = nn.Linear(4, 3, bias=False)
    for src in (str(tmp_path / "a.pt"), tmp_path / "a.safetensors", tmp_path / "a.pt2", module, state):
        source = open_source(src)
        assert isinstance(source, Source)
        (spec,) = source.specs()
        assert (spec.name, spec.shape, spec.dtype, spec.kind) == ("fc.weight", (3, 4), "float32", "linear")
        with pytest.raises(SourceError, match="tensor 'none': there is none of this name"):
            source.read("none", range(1))
        source.close()


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("none", "no such file or folder", "accepted: a model folder (config.json with model.safetensors"),
        (
            "a.gguf",
            "no reader for '.gguf' files",
            "a file (.safetensors, .pt, .pth, .bin, .ckpt, .pt2), pkg.mod:factory",
        ),
        ("plain", "no reader for files without a suffix", "accepted: a model folder"),
        ("model.safetensors.index.json", "the index of a sharded model", "give the folder that it is in"),
        ("a.safetensors/b", "cannot be opened: Not a directory", ""),
        ("a" * 300, "cannot be opened: File name too long", ""),
        ("a\0.pt", "cannot be opened: embedded null byte", ""),
    ],
)
def test_paths_that_are_no_models(tmp_path: Path, name: str, message: str, hint: str) -> None:
    for file in ("a.gguf", "plain", "model.safetensors.index.json", "a.safetensors"):
        (tmp_path / file).write_bytes(b"GGUF")
    error = refused(tmp_path / name)
    assert message in str(error)
    assert hint in error.hint


def test_names_of_the_hub_and_the_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused("sentence-transformers/all-MiniLM-L6-v2")
    assert str(error) == "'sentence-transformers/all-MiniLM-L6-v2': no such file or folder"
    assert "hf download sentence-transformers/all-MiniLM-L6-v2" in error.hint
    assert str(refused("")) == "'': no such file or folder"


@pytest.mark.parametrize("src", [None, 3, [("a", torch.ones(2))], torch.ones(2), b"model.safetensors"])
def test_objects_that_are_no_models(src: Any) -> None:
    assert str(refused(src)) == f"{type(src).__name__}: not a model"


def test_files_of_a_folder_say_that_there_is_more(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    assert open_source(path).info.notes == ()
    (tmp_path / "config.json").write_text("{}")
    assert open_source(path).info.notes == (
        f"{path}: read without the config.json beside it; give the folder to use that",
    )
    assert open_source(path).info.config is None
    shard = tmp_path / "model-00002-of-00003.safetensors"
    safetensors.torch.save_file(state, shard)
    assert open_source(shard).info.notes == (f"{shard}: one of 3 shards; give the folder for the whole model",)


def test_a_folder_brings_its_config_and_says_when_it_speaks_of_quantization(tmp_path: Path) -> None:
    safetensors.torch.save_file({"lm_head.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    assert source.info.config == config
    assert source.info.notes == (
        f"{tmp_path}: config.json says quantized by 'gptq', which no installed reader knows: read as it is",
    )
    assert SafetensorsSource(tmp_path).info.notes == ()


def test_metadata_is_that_on_which_all_shards_agree(tmp_path: Path) -> None:
    for i in range(2):
        safetensors.torch.save_file({f"t{i}": torch.ones(2)}, tmp_path / f"s{i}.safetensors", {"format": "pt"})
    weight_map = {"t0": "s0.safetensors", "t1": "s1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_source(tmp_path).info.metadata == {"format": "pt"}
    safetensors.torch.save_file({"t1": torch.ones(2)}, tmp_path / "s1.safetensors", {"format": "np"})
    source = SafetensorsSource(tmp_path)
    assert source.info.metadata == {}
    assert [h.metadata for h in source.headers.values()] == [{"format": "pt"}, {"format": "np"}]


def test_minilm(minilm: Path) -> None:
    source = open_source(minilm)
    assert source.info.model_type == "bert"
    expected = safetensors.torch.load_file(minilm / "model.safetensors")
    assert {s.name for s in source.specs()} == set(expected)
    for name in ("embeddings.word_embeddings.weight", "embeddings.position_ids", "pooler.dense.bias"):
        if name in expected:
            assert same_bits(read(source, name), expected[name])
    assert "tokenizer.json" in source.info.side_files


# Modules and state dicts


class Net(nn.Module):
    """Ties, strides, buffers, a frozen part, a parameter of its own and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.embed
        self.conv = nn.ConvTranspose2d(4, 2, 3)
        self.norm = nn.BatchNorm1d(8)
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.slices = nn.Parameter(torch.randn(4, 8)[:, ::2], requires_grad=False)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("table", torch.arange(4, dtype=torch.int16))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


def test_a_module_is_read_as_its_state_dict(tmp_path: Path) -> None:
    net = Net()
    before = {name: (t.clone(), t.stride(), t._version) for name, t in net.state_dict().items() if torch.is_tensor(t)}
    modes = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    source = open_source(net)
    assert isinstance(source, ModuleSource)
    assert source.info.name == "Net"
    assert source.info.graph is net
    assert source.info.paths == ()
    assert source.info.notes == ("Net: left out beside the weights: '_extra_state' (dict)",)
    specs = {spec.name: spec for spec in source.specs()}
    assert list(specs) == list(before)
    assert {s.name: s.tied_to for s in specs.values() if s.tied_to} == {
        "head.weight": "embed.weight",
        "again.weight": "embed.weight",
    }
    assert (specs["conv.weight"].module, specs["conv.weight"].kind) == ("ConvTranspose2d", "conv_transpose")
    assert (specs["norm.weight"].module, specs["norm.weight"].kind) == ("BatchNorm1d", "norm")
    assert (specs["turned"].module, specs["head.weight"].kind) == ("Net", "head")
    scratch = Scratch()
    for name, (value, _, _) in before.items():
        for rows in chunks(specs[name].shape, 1, 5):
            part = source.read(name, rows, scratch)
            assert part.is_contiguous()
            assert not part.requires_grad
        assert same_bits(read(source, name), value.contiguous())
    after = net.state_dict()
    for name, (value, stride, version) in before.items():
        assert same_bits(after[name].contiguous(), value.contiguous())
        assert (after[name].stride(), after[name]._version) == (stride, version)
    assert {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()} == modes


def test_contiguous_tensors_are_not_copied() -> None:
    weight = torch.randn(4, 8)
    part = open_source({"w": weight}).read("w", range(2, 4))
    assert isinstance(part, torch.Tensor)
    assert part.data_ptr() == weight[2:].data_ptr()


def test_wrapping_keeps_names() -> None:
    net = nn.Linear(2, 2)
    assert [s.name for s in open_source(nn.DataParallel(net)).specs()] == ["module.weight", "module.bias"]
    state = {"state_dict": {"module.weight": torch.ones(2, 2)}, "epoch": 1}
    source = open_source(state)  # type: ignore[arg-type]
    assert isinstance(source, StateDictSource)
    assert [s.name for s in source.specs()] == ["module.weight"]
    assert len(source.info.notes) == 2


class Config:
    """Looks like a config of transformers, without being one."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def to_dict(self) -> Any:
        return self.values


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            Config({"model_type": "bert", "dtype": torch.float32, "architectures": None}),
            {"model_type": "bert", "dtype": "torch.float32", "architectures": ["Linear"]},
        ),
        (
            Config({"model_type": "bert", "architectures": ["BertModel"]}),
            {"model_type": "bert", "architectures": ["BertModel"]},
        ),
        (Config({"layers": (1, 2)}), {"layers": [1, 2]}),
        (Config([1]), None),
        ({"model_type": "bert"}, None),
        (None, None),
    ],
)
def test_configs_of_modules(config: Any, expected: Any) -> None:
    net = nn.Linear(2, 2)
    net.config = config
    assert open_source(net).info.config == expected


def test_a_model_of_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "models" / "tiny-llama"
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    source, files = open_source(module), open_source(folder)
    assert source.info.model_type == files.info.model_type == "llama"
    assert source.info.config is not None
    assert source.info.config["architectures"] == ["LlamaForCausalLM"]
    ours = {spec.name: spec for spec in source.specs()}
    for spec in files.specs():
        assert ours[spec.name].shape == spec.shape
        assert ours[spec.name].kind == spec.kind
        assert ours[spec.name].fuse == spec.fuse
    name = "model.layers.0.mlp.down_proj.weight"
    assert ours[name].module == "Linear"
    assert same_bits(read(source, name), read(files, name).to(read(source, name).dtype))


class Sub(torch.Tensor):
    """A subclass with other values than its storage has."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "is not a dense tensor (sparse_coo)"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "is not a dense tensor (sparse_csr)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is not a dense tensor (nested)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "is quantized by torch (qint8)",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), "has no data, only a shape (meta device)"),
    "subclass": (lambda: torch.ones(3).as_subclass(Sub), "is a tensor subclass, "),
    "parameter subclass": (lambda: nn.Parameter(torch.ones(3).as_subclass(Sub)), "is a tensor subclass, "),
    "lazy": (lambda: nn.LazyLinear(3).weight, "is not initialized"),
    "bits": (lambda: torch.ones(3, dtype=torch.uint8).view(torch.bits8), "dtype bits8 is not supported"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_tensors_without_plain_values_are_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    error = refused({"ok": torch.ones(2), "layer.w": make()})
    assert str(error).startswith(f"state_dict: tensor 'layer.w': {message}")
    assert case == "bits" or error.hint


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state_dict: holds no tensors"),
        ({"a": 1}, "state_dict: holds no tensors, only 'a'"),
        ({3: torch.ones(2)}, "state_dict: a tensor's name is a string, got 3"),
        ({"a\x1b[2J": torch.ones(2)}, "state_dict: impossible tensor name 'a\\x1b[2J'"),
        (
            torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=1.0).state_dict(),
            "state_dict: holds the state of an",
        ),
    ],
)
def test_dicts_without_weights(state: Any, message: str) -> None:
    assert str(refused(state)).startswith(message)


def test_a_module_without_weights() -> None:
    assert str(refused(nn.ReLU())) == "ReLU: holds no tensors"


def test_distributed_tensors_are_refused_by_name() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        tensor = DTensor.from_local(torch.ones(4), DeviceMesh("cpu", [0]), [Replicate()])
        error = refused({"w": tensor})
    finally:
        distributed.destroy_process_group()
    assert str(error) == "state_dict: tensor 'w': is a tensor subclass, torch.distributed.tensor.DTensor"
    assert "full_tensor()" in error.hint


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.bool, torch.complex64]),
    shape=st.lists(st.integers(0, 5), max_size=4),
    turn=st.booleans(),
    conj=st.booleans(),
    max_elements=st.integers(1, 30),
)
def test_chunks_of_memory_are_chunks_of_files(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    turn: bool,
    conj: bool,
    max_elements: int,
) -> None:
    raw = torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    tensor = tensor.transpose(0, -1) if turn and shape else tensor
    tensor = tensor.conj() if conj else tensor
    path = tmp_path_factory.mktemp("src") / "a.pt"
    torch.save({"x": tensor}, path)
    memory, file = open_source({"x": tensor}), open_source(path)
    assert memory.specs() == file.specs()
    for rows in chunks(tuple(tensor.shape), 1, max_elements):
        a, b = memory.read("x", rows, Scratch()), file.read("x", rows, Scratch())
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert a.shape == b.shape
        assert same_bits(a, b)
        assert same_bits(a, memory.read("x", rows))  # type: ignore[arg-type]


def test_slots_keep_chunks_apart(tmp_path: Path) -> None:
    state = {"codes": torch.randn(4, 8), "scale": torch.randn(4, 8)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    source, scratch = SafetensorsSource(tmp_path / "a.safetensors"), Scratch()
    codes = source.read("codes", range(4), scratch, slot="codes")
    source.read("scale", range(4), scratch, slot="scale")
    assert torch.equal(codes, state["codes"])
    again = source.read("scale", range(4), scratch, slot="codes")
    assert again.data_ptr() == codes.data_ptr()  # buffers are used again


def test_threads_read_what_is_there(tmp_path: Path) -> None:
    weight = torch.randn(512, 64)
    torch.save({"w": weight, "t": weight.t().clone().t()}, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt")
    wrong: list[str] = []

    def work(seed: int) -> None:
        scratch = Scratch()
        for rows in list(chunks((512, 64), 1, 64 * (seed + 1))):
            for name in ("w", "t"):
                part = source.read(name, rows, scratch)
                if not same_bits(part, weight[rows.start : rows.stop]):  # type: ignore[arg-type]
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Plugins


class Reader:
    """What a plugin's SourceDeclaration names."""

    opened: Path | None = None
    recognised = True

    def __init__(self, options: Any) -> None:
        self.options = options

    def recognises(self, path: Path) -> bool:
        return self.recognised

    def open(self, path: Path) -> Any:
        if path.name.startswith("bad"):
            raise SourceError(f"{path}: malformed")
        return Opened(path)


class Opened:
    def __init__(self, path: Path) -> None:
        self.info = ModelInfo(str(path))

    def specs(self) -> list[TensorSpec]:
        return []


class Indifferent(Reader):
    recognised = False


class Broken(Reader):
    def recognises(self, path: Path) -> bool:
        raise RuntimeError("oops")


THIS = "monoquant_test_sources"
sys.modules[THIS] = sys.modules[__name__]


def registry(*declared: tuple[str, str, tuple[str, ...]]) -> Registry:
    made = Registry()
    for name, target, suffixes in declared:
        made.sources[name] = SourceDeclaration(name, "a reader", f"{THIS}:{target}", suffixes=suffixes)
    return made


def test_readers_of_plugins_come_first_where_they_recognise_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path)
    assert isinstance(open_source(path, registry(("r", "Reader", (".pt",)))), Opened)
    assert isinstance(open_source(path, registry(("i", "Indifferent", (".pt",)), ("r", "Reader", (".PT",)))), Opened)
    assert isinstance(open_source(path, registry(("i", "Indifferent", (".pt",)))), TorchSource)
    assert isinstance(open_source(path, registry(("r", "Reader", (".bin", "/")))), TorchSource)
    assert isinstance(open_source(tmp_path, registry(("r", "Reader", (".bin", "/")))), Opened)
    assert isinstance(open_source({"a": torch.ones(2)}, registry(("r", "Reader", (".pt", "/")))), StateDictSource)
    (tmp_path / "a.gguf").write_bytes(b"")
    assert isinstance(open_source(tmp_path / "a.gguf", registry(("r", "Reader", (".gguf",)))), Opened)
    (tmp_path / "bad.gguf").write_bytes(b"")
    assert str(refused(tmp_path / "bad.gguf", registry=registry(("r", "Reader", (".gguf",))))).endswith("malformed")
    error = refused(tmp_path / "a.gguf", registry=registry(("r", "Reader", (".onnx", "/"))))
    assert "installed readers add .onnx" in error.hint


def test_a_broken_reader_is_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path)
    source = open_source(path, registry(("b", "Broken", (".pt",)), ("m", "Missing", (".pt",))))
    assert isinstance(source, TorchSource)
    first, second = source.info.notes
    assert first == f"{path}: the reader of plugin source 'b' was left out: RuntimeError('oops')"
    assert second.startswith(f"{path}: the reader of plugin source 'm' was left out: {THIS}:Missing cannot be imported")


# Size


def make_sharded(folder: Path, shards: int, per_shard: int, nbytes: int) -> int:
    """A sharded checkpoint of sparse files; gives the bytes that it claims."""
    weight_map, total = {}, 0
    rows = nbytes // (4096 * 2)
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        entries = {
            f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": ("bfloat16", (rows, 4096)) for j in range(per_shard)
        }
        header = header_bytes(entries, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + per_shard * rows * 4096 * 2)
        weight_map |= dict.fromkeys(entries, name)
        total += per_shard * rows * 4096 * 2
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    return total


OPEN = """
import json, sys, tracemalloc
from pathlib import Path
from monoquant_core.sources import open_source
tracemalloc.start()
source = open_source(sys.argv[1])
specs = source.specs()
files = ("config.json", "model.safetensors.index.json")
read = source.bytes_read + sum((Path(sys.argv[1]) / name).stat().st_size for name in files)
heavy = sorted({"torch", "numpy", "safetensors", "transformers"} & set(sys.modules))
print(json.dumps([len(specs), sum(s.nbytes for s in specs), read, heavy, tracemalloc.get_traced_memory()[1]]))
"""


def test_a_checkpoint_of_100_gb_is_opened_from_its_headers_without_torch(tmp_path: Path) -> None:
    try:
        total = make_sharded(tmp_path, shards=25, per_shard=20, nbytes=200 << 20)
    except OSError as exc:
        pytest.skip(f"no sparse files here: {exc}")
    if sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir()) > 1 << 30:
        pytest.skip("no sparse files here")
    assert total > 100 * 10**9
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, nbytes, read_bytes, heavy, peak = json.loads(done.stdout)
    assert (count, nbytes) == (500, total)
    assert read_bytes < 200_000
    assert heavy == []
    assert peak < 16 << 20
    source = open_source(tmp_path)
    part = source.read("model.layers.24.mlp.experts.19.up_proj.weight", range(25_000, 25_004))
    assert isinstance(part, torch.Tensor)
    assert part.shape == (4, 4096)
    assert not part.any()


def test_reading_a_file_that_shrinks_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """In a process of its own: with mmap it would die of SIGBUS."""
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1024, 1024)}, path)
    code = (
        "import os, sys\n"
        "from monoquant_core.errors import SourceError\n"
        "from monoquant_core.sources import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "source.read('w', range(8))\n"
        "os.truncate(sys.argv[1], 4096)\n"
        "try: source.read('w', range(512, 1024))\n"
        "except SourceError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{path}: tensor 'w': the file has become shorter while it was read"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_are_copied_in_chunks() -> None:
    weight = torch.randn(64, 32, device="cuda")
    source = open_source({"a": weight, "b": weight.t(), "c": weight})
    assert {s.name: s.tied_to for s in source.specs()} == {"a": None, "b": None, "c": "a"}
    part = source.read("b", range(4, 9))
    assert isinstance(part, torch.Tensor)
    assert part.device.type == "cpu"
    assert same_bits(part, weight.cpu().t()[4:9].contiguous())


def test_closing_lets_go(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    source.close()
    with pytest.raises(SourceError, match="read after close"):
        source.read("w", range(1))
    if sys.platform == "linux":
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            (tmp_path / "bad.safetensors").write_bytes(b"junk")
            refused(tmp_path / "bad.safetensors")
            open_source(tmp_path / "a.safetensors").close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_copied_module_gives_the_same_specs() -> None:
    net = Net()
    assert open_source(net).specs() == open_source(copy.deepcopy(net)).specs()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".pt2"])
@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (POINTER, "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"GGUF" + bytes(60), "the suffix .gguf"),
        (b"", ""),
        (b"\x93NUMPY" + bytes(60), ""),
    ],
)
def test_a_file_that_is_something_else_is_recognised(tmp_path, suffix, content, hint):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert hint in caught.value.hint
    assert bool(caught.value.hint) == bool(hint)


def test_a_file_under_another_ones_suffix_is_recognised(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt2")
    for name, suffix in (("a.pt", ".safetensors"), ("a.safetensors", ".pt"), ("a.pt2", ".pt")):
        with pytest.raises(SourceError) as caught:
            open_source(tmp_path / name)
        assert f"{suffix}" in caught.value.hint


def test_tensors_in_what_is_left_out_are_counted():
    source = open_source({"model": {"w": torch.ones(2, 2)}, "ema": {"w": torch.ones(2, 2), "decay": 0.9}, "step": 3})
    assert source.info.notes[-1] == "state_dict: left out beside the weights: 'ema' (dict with 1 tensor), 'step' (int)"


def test_parametrized_weights_are_of_the_module_that_has_them():
    norm = torch.nn.utils.parametrizations.weight_norm
    source = open_source(nn.Sequential(norm(nn.ConvTranspose1d(4, 8, 4)), norm(nn.Linear(8, 8))))
    kinds = {spec.name.replace("parametrizations.weight.", ""): (spec.module, spec.kind) for spec in source.specs()}
    assert kinds == {
        "0.bias": ("ConvTranspose1d", "bias"),
        "0.original0": ("ConvTranspose1d", "vector"),
        "0.original1": ("ConvTranspose1d", "conv_transpose"),
        "1.bias": ("Linear", "bias"),
        "1.original0": ("Linear", "vector"),
        "1.original1": ("Linear", "linear"),
    }
    alone = open_source(norm(nn.Linear(8, 8)))
    assert {spec.module for spec in alone.specs() if "original" in spec.name} == {"Linear"}

"""Files of torch.save: streamed bit for bit, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from monoquant_core.errors import SourceError
from monoquant_core.rows import all_rows, chunks
from monoquant_core.scratch import Scratch
from monoquant_core.sources import TorchSource, open_source
from monoquant_core.tensor import same_bits

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
]


def refused(path: Path, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return caught.value


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return dense.reshape(-1).view(torch.uint8)


def check_same(path: Path, expected: Mapping[str, torch.Tensor], max_elements: int = 7) -> TorchSource:
    """Every tensor of a file, in chunks and with reused buffers, equals what was saved."""
    source = open_source(path)
    assert isinstance(source, TorchSource)
    specs = {spec.name: spec for spec in source.specs()}
    assert list(specs) == list(expected)
    scratch = Scratch()
    for name, tensor in expected.items():
        assert (specs[name].shape, specs[name].dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        parts = []
        for rows in chunks(specs[name].shape, 1, max_elements):
            part = source.read(name, rows, scratch)
            assert part.is_contiguous()
            assert part.dim() == tensor.dim()
            parts.append(raw(part).clone())
        assert torch.equal(torch.cat(parts), raw(tensor)), name
    return source


@st.composite
def views(draw: st.DrawFn) -> Callable[[torch.Tensor], torch.Tensor]:
    """A random view of a tensor: transposed, sliced, stepped, expanded or reshaped."""
    steps = draw(st.lists(st.sampled_from(["turn", "narrow", "step", "grow", "flat", "pick"]), max_size=3))
    numbers = draw(st.lists(st.integers(0, 7), min_size=6, max_size=6))

    def apply(x: torch.Tensor) -> torch.Tensor:
        for step, n in zip(steps, numbers, strict=False):
            axis = n % max(1, x.dim())
            if step == "turn" and x.dim() > 1:
                x = x.transpose(axis, (axis + 1) % x.dim())
            elif step == "narrow" and x.dim() and x.shape[axis] > 1:
                x = x.narrow(axis, 1, x.shape[axis] - 1)
            elif step == "step" and x.dim():
                x = x[(slice(None),) * axis + (slice(None, None, 2),)]
            elif step == "grow":
                x = x.unsqueeze(axis).expand(*x.shape[:axis], 3, *x.shape[axis:])
            elif step == "flat" and x.is_contiguous():
                x = x.reshape(-1)
            elif step == "pick" and x.dim() and x.shape[axis]:
                x = x.select(axis, x.shape[axis] - 1)
        return x

    return apply


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    makers=st.lists(views(), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    max_elements=st.integers(1, 30),
)
def test_views_of_one_storage_read_back_bit_for_bit(
    tmp_path: Path,
    dtype: torch.dtype,
    shape: list[int],
    makers: list[Callable[[torch.Tensor], torch.Tensor]],
    seed: int,
    max_elements: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    base = raw.view(dtype).view(shape)
    state = {"base": base} | {f"view.{i}": make(base) for i, make in enumerate(makers)}
    torch.save(state, tmp_path / "a.pt")
    # A view that repeats its storage beyond the size of the file is refused: tested below.
    assume(all(view.nbytes <= (tmp_path / "a.pt").stat().st_size for view in state.values()))
    source = check_same(tmp_path / "a.pt", state, max_elements)
    for spec in source.specs():
        if spec.tied_to is not None:
            assert same_bits(source.read(spec.name, all_rows(spec.shape)), state[spec.tied_to].contiguous())
    source.close()


def test_opening_reads_no_tensors(tmp_path: Path) -> None:
    torch.save({f"layer.{i}": torch.zeros(256, 1024) for i in range(8)}, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt")
    assert isinstance(source, TorchSource)
    assert len(source.specs()) == 8
    assert source.bytes_read < 10_000
    before = source.bytes_read
    source.read("layer.3", range(10, 20))
    assert source.bytes_read == before + 10 * 1024 * 4


def test_ties_are_seen_and_look_alikes_are_not(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {
        "a": weight,
        "same": weight,
        "parameter": torch.nn.Parameter(weight),
        "turned": weight.t(),
        "part": weight[:2],
        "equal": weight.clone(),
        "none": torch.empty(0, 4),
        "none2": torch.empty(0, 4),
        "row": torch.randn(2, 2)[0],
    }
    torch.save(state, tmp_path / "a.pt")
    source = check_same(tmp_path / "a.pt", state)
    assert {s.name: s.tied_to for s in source.specs() if s.tied_to} == {"same": "a", "parameter": "a"}


def test_lazily_conjugated_and_negated_tensors(tmp_path: Path) -> None:
    x, y = torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64)
    state = {"conj": x.conj(), "neg": y.conj().imag, "turned": x.t().conj(), "scalar": x[0, 0].conj()}
    assert state["conj"].is_conj()
    assert state["neg"].is_neg()
    torch.save(state, tmp_path / "a.pt")
    check_same(tmp_path / "a.pt", state, max_elements=4)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_suffixes(tmp_path: Path, suffix: str) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / f"a{suffix}")
    check_same(tmp_path / f"a{suffix}", {"a": torch.ones(2)})


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappings_are_taken_off_and_what_is_beside_is_said(tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "a.pt"
    state = OrderedDict({"module.fc.weight": torch.randn(2, 3), "module.fc.bias": torch.randn(2)})
    torch.save({"epoch": 3, wrapper: state, "optimizer": {"state": {}}, "rng": torch.zeros(4)}, path)
    source = check_same(path, state)
    assert source.info.notes == (
        f"{path}: the weights are those under {wrapper!r}",
        f"{path}: left out beside the weights: 'epoch' (int), 'optimizer' (dict), 'rng' (Tensor)",
    )


def test_entries_that_are_no_tensors_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    extra = {f"_extra_state.{i}": None for i in range(9)}
    torch.save({"a": torch.ones(2), "_extra_state": {"scale": 1.0}, "name": "x", **extra}, path)
    notes = check_same(path, {"a": torch.ones(2)}).info.notes
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: left out beside the weights: '_extra_state' (dict), 'name' (str), ")
    assert notes[0].endswith(" and 3 more")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "holds no tensors"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no tensors, only 'epoch', 'args'"),
        ({"encoder": {"w": torch.ones(2)}}, "holds no tensors, only 'encoder'"),
        (torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(), "holds the state of an optimizer and no"),
        (torch.ones(3), "a single tensor without a name"),
        ([torch.ones(3)], "a dict of tensors expected, found list"),
        (None, "a dict of tensors expected, found NoneType"),
        ({0: torch.ones(3)}, "a tensor's name is a string, got 0"),
        ({"": torch.ones(3)}, "impossible tensor name ''"),
        ({"a\tb": torch.ones(3)}, "impossible tensor name 'a\\tb'"),
        ({"w": lambda: torch.eye(3).to_sparse()}, "tensor 'w': is not a dense tensor (sparse_coo)"),
        ({"w": lambda: torch.eye(3).to_sparse_csr()}, "tensor 'w': is not a dense tensor (sparse_csr)"),
        (
            {"w": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
            "tensor 'w': is quantized by torch",
        ),
        ({"w": torch.empty(3, device="meta")}, "tensor 'w': has no data, only a shape (meta device)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_holds_no_weights_or_others_than_plain_ones(
    tmp_path: Path, saved: Any, message: str, zipped: bool
) -> None:
    if isinstance(saved, dict):  # making some of them warns, so they are made here
        saved = {key: value() if callable(value) else value for key, value in saved.items()}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert message in str(refused(tmp_path / "a.pt"))


@pytest.mark.filterwarnings("ignore")
def test_a_nested_tensor_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "a.pt")
    assert "tensor 'w': is a nested tensor" in str(refused(tmp_path / "a.pt"))


@pytest.mark.filterwarnings("ignore")
def test_a_refused_sparse_file_leaves_nothing_behind_in_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")
    with torch.sparse.check_sparse_tensor_invariants():
        assert torch.equal(torch.load(tmp_path / "a.pt")["w"].to_dense(), torch.eye(3))


class Runs:
    """Pickles to a call of ``os.system``, or whatever else."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_does_not_run_unless_it_is_asked_for(tmp_path: Path, zipped: bool) -> None:
    path, flag = tmp_path / "a.pt", tmp_path / "ran"
    state = {"w": torch.ones(2), "evil": Runs(os.system, f"touch {flag}")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    error = refused(path)
    assert str(error) == f"{path}: its pickle calls {os.system.__module__}.system, which weights do not need"
    assert "--unsafe-pickle" in error.hint
    assert not flag.exists()
    source = open_source(path, unsafe_pickle=True)
    assert flag.exists()
    assert torch.equal(source.read("w", range(1)), torch.ones(2))  # type: ignore[arg-type]
    assert source.info.notes[0] == f"{path}: loaded whole with --unsafe-pickle; code in it has run"
    assert "'evil' (int)" in source.info.notes[1]


@pytest.mark.parametrize(
    "call", [print, eval, exec, open, __import__, pickle.loads, torch.load, torch.hub.load, getattr]
)
def test_nothing_but_rebuilding_tensors_is_called(tmp_path: Path, call: Callable[..., Any]) -> None:
    torch.save({"w": torch.ones(2), "x": Runs(call, "a")}, tmp_path / "a.pt")
    assert f"{call.__name__}, which weights do not need" in str(refused(tmp_path / "a.pt"))


def test_a_pickled_module_is_refused_and_read_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.LayerNorm(3))
    torch.save(module, path)
    assert "its pickle calls torch.nn.modules.container.Sequential" in str(refused(path))
    source = open_source(path, unsafe_pickle=True)
    assert [(s.name, s.module) for s in source.specs()] == [
        *(("0.weight", "Conv1d"), ("0.bias", "Conv1d"), ("1.weight", "LayerNorm"), ("1.bias", "LayerNorm"))
    ]
    assert isinstance(source.info.graph, torch.nn.Sequential)
    assert torch.equal(source.read("0.weight", range(6)), module[0].weight.detach())  # type: ignore[arg-type]


def test_the_flag_changes_nothing_for_files_without_code(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt", unsafe_pickle=True)
    assert isinstance(source, TorchSource)
    assert list(source.entries) == ["w"]
    assert source.info.notes == ()


def test_a_torch_whose_unpickler_is_not_safe_reads_no_pickles(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cpu"))
    assert "torch 2.9.1+cpu can be made to run code by files" in str(refused(saved))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    assert isinstance(open_source(saved), TorchSource)


def test_legacy_files_are_loaded_whole_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    weight = torch.randn(6, 4)
    state = {"a": weight, "b": weight, "c": weight.t(), "d": torch.ones((), dtype=torch.bfloat16)}
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    source = check_same(path, state)
    assert {s.name: s.tied_to for s in source.specs() if s.tied_to} == {"b": "a"}
    assert source.info.notes[0] == f"{path}: written before torch 1.6: loaded whole, so memory grows with its size"


def test_a_real_checkpoint(shared: Path) -> None:
    path = shared / "models" / "resnet20_cifar10.pt"
    saved = torch.load(path, weights_only=True)
    check_same(path, saved.get("state_dict", saved), max_elements=500)


def rewrite(
    path: Path,
    records: Mapping[str, bytes | None],
    *,
    compression: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the archive again with other records, without some (None), or with more, even under taken names."""
    with zipfile.ZipFile(path) as old:
        kept = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    kept |= records
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in [*kept.items(), *(more or {}).items()]:
            if data is not None:
                new.writestr(f"archive/{name}", data)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(12.0).view(3, 4)}, path)
    return path


def test_an_archive_written_by_another_zip_program_is_read(saved: Path) -> None:
    check_same(rewrite(saved, {"extra": b"1"}), {"w": torch.arange(12.0).view(3, 4)})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: rewrite(p, {"data.pkl": None}), "a zip archive that torch.save did not write: it has no data.pkl"),
        (lambda p: rewrite(p, {"data/0": None}), "tensor 'w': it has no record 'data/0'"),
        (lambda p: rewrite(p, {"data/0": bytes(44)}), "record 'data/0' has 44 bytes, the checkpoint says 48"),
        (lambda p: rewrite(p, {}, more={"data/0": bytes(48)}), "record 'archive/data/0' occurs twice"),
        (lambda p: rewrite(p, {}, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (lambda p: rewrite(p, {"byteorder": b"big"}), "byte order b'big', only little-endian files are read"),
        (lambda p: rewrite(p, {"byteorder": b"?" * 2000}), "record 'byteorder' has 2000 bytes, more than 1024"),
        (lambda p: rewrite(p, {"constants.pkl": b""}), "a TorchScript archive, which is a program"),
        (lambda p: rewrite(p, {"archive_format": b"pt2"}), "an archive of torch.export"),
        (lambda p: rewrite(p, {"data.pkl": b""}), "damaged, or not a file of torch.save: EOFError"),
        (lambda p: rewrite(p, {"data.pkl": b"\x80\x02."}), "damaged, or not a file of torch.save: IndexError"),
        (lambda p: rewrite(p, {"data.pkl": pickle.dumps({"w": 1}, 4)}), "its pickle is not only weights"),
        (lambda p: rewrite(p, {"data.pkl": pickle.dumps({"w": 1}, 2)}), "holds no tensors, only 'w'"),
        (lambda p: p.write_bytes(p.read_bytes()[:-30]), "damaged zip archive: it does not end with its directory"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged zip archive: it does not end with its directory"),
        (lambda p: p.write_bytes(b""), "not a file of torch.save"),
        (lambda p: p.write_bytes(b"PK\x05\x06" + bytes(18)), "not a file of torch.save"),
        (lambda p: p.write_bytes(b"<html>"), "not a file of torch.save"),
        (lambda p: p.write_bytes(pickle.dumps({"w": [1.0]}, 2)), "damaged, or not a file of torch.save: RuntimeError"),
        (lambda p: p.write_bytes(b"\x80\x02"), "damaged, or not a file of torch.save: EOFError"),
        (lambda p: p.write_bytes(b"storages" + bytes(600)), "not a file of torch.save"),
    ],
)
def test_damaged_and_foreign_archives(saved: Path, change: Callable[[Path], Any], message: str) -> None:
    change(saved)
    assert message in str(refused(saved))


class Storage:
    """A storage that a crafted pickle claims to have."""

    def __init__(self, numel: Any = 12, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.saved_id = ("storage", kind, key, "cpu", numel)


class View:
    """A tensor that a crafted pickle claims to have."""

    def __init__(self, size: Any = (3, 4), stride: Any = (4, 1), offset: Any = 0, storage: Any = None) -> None:
        self.args = (storage or Storage(), offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


class Crafter(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.saved_id if isinstance(obj, Storage) else None


def crafted(path: Path, state: Any) -> Path:
    buffer = io.BytesIO()
    Crafter(buffer, 2).dump(state)
    return rewrite(path, {"data.pkl": buffer.getvalue()})


def test_the_crafter_makes_what_torch_reads(saved: Path) -> None:
    crafted(saved, {"v": View((4, 3), (1, 4))})
    assert torch.equal(torch.load(saved)["v"], torch.arange(12.0).view(3, 4).t())
    check_same(saved, {"v": torch.arange(12.0).view(3, 4).t()})


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View((4, 4)), "tensor 'v': needs 64 bytes of a storage of 48"),
        (View((3, 4), (5, 1)), "tensor 'v': needs 56 bytes of a storage of 48"),
        (View((3, 4), (4, 1), 1), "tensor 'v': needs 52 bytes of a storage of 48"),
        (View((3, 4), (4, 1), 1 << 60), "tensor 'v': needs "),
        (View((2**40, 4), (0, 1)), "tensor 'v': expands 4 stored elements to (1099511627776, 4), which is larger than"),
        (View((2**62, 2**62), (0, 0)), "tensor 'v': "),
        (View((1,) * 70, (1,) * 70), "tensor 'v': impossible shape (1, 1, 1"),
        (View((-3, 4)), "tensor 'v': "),
        (View("ab"), "tensor 'v': "),
        (View(storage=Storage(1 << 60)), "tensor 'v': record 'data/0' has 48 bytes, the checkpoint says"),
        (
            View(storage=Storage(-12)),
            "tensor 'v': damaged, or not a file of torch.save: ValueError: impossible storage",
        ),
        (
            View(storage=Storage("x")),
            "tensor 'v': damaged, or not a file of torch.save: ValueError: impossible storage",
        ),
        (View(storage=Storage(12, "../0")), "tensor 'v': it has no record 'data/../0'"),
        (View(storage=Storage(12, 0)), "tensor 'v': damaged, or not a file of torch.save: ValueError: impossible"),
        (View(storage=Storage(48, kind=torch.QInt8Storage)), "tensor 'v': "),
    ],
)
def test_views_that_leave_their_storage(saved: Path, view: View, message: str) -> None:
    tracemalloc.start()
    error = refused(crafted(saved, {"v": view}))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert message in str(error)


def test_a_legacy_file_that_claims_a_huge_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x03N") == 1  # numel of the storage, before its view metadata
    path.write_bytes(data.replace(b"K\x03N", b"\x8a\x06" + (1 << 44).to_bytes(6, "little") + b"N"))
    assert "damaged, or not a file of torch.save" in str(refused(path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_give_tensors_within_the_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3).half()}, path)
    content = bytearray(path.read_bytes())
    interesting = [i for i, byte in enumerate(content) if byte]  # most of the file is padding
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.sampled_from(interesting))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    try:
        source = open_source(path)
    except SourceError as exc:
        message = str(exc)
    else:
        message = ""
        for spec in source.specs():
            assert spec.nbytes <= len(content)
            source.read(spec.name, all_rows(spec.shape))
    assert "\n" not in message


OPCODES = [
    *(pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.MARK, pickle.TUPLE, pickle.SETITEMS),
    *(pickle.SETITEM, pickle.BINUNICODE + b"\x01\0\0\0w", pickle.BINPERSID, pickle.REDUCE, pickle.BUILD, pickle.STOP),
    *(pickle.GLOBAL + b"torch\nFloatStorage\n", pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"),
    *(pickle.GLOBAL + b"collections\nOrderedDict\n", pickle.GLOBAL + b"torch\nTensor\n", pickle.NEWOBJ),
    *(
        pickle.GLOBAL + b"builtins\nbytearray\n",
        pickle.BININT + b"\xff\xff\xff\x7f",
        pickle.LONG1 + b"\x08" + b"\x7f" * 8,
    ),
    *(
        pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",
        pickle.BINGET + b"\0",
        pickle.BINPUT + b"\0",
        pickle.TUPLE1,
        pickle.TUPLE2,
    ),
    *(pickle.BINUNICODE + b"\xff\xff\xff\x7fw", pickle.NONE, pickle.APPENDS, pickle.GLOBAL + b"os\nsystem\n"),
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(st.sampled_from(OPCODES), max_size=20))
def test_no_pickle_gives_anything_but_tensors_or_a_refusal(tmp_path: Path, program: list[bytes]) -> None:
    path = tmp_path / "a.pt"
    if not path.exists():
        torch.save({"w": torch.arange(12.0).view(3, 4)}, path)
    rewrite(path, {"data.pkl": b"".join(program) + pickle.STOP})
    refused(path)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t()], ids=["plain", "strided"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": view(torch.ones(100, 100))}, path)
    source = open_source(path)
    source.read("w", range(10))
    os.truncate(path, 2000)
    with pytest.raises(SourceError, match=rf"^{path}: tensor 'w': the file has (become shorter|changed)"):
        source.read("w", range(90, 100))


def test_strided_tensors_are_read_without_the_rest_of_their_storage(tmp_path: Path) -> None:
    wide = torch.randn(64, 4096)
    torch.save({"columns": wide[:, 10:20], "turned": wide.t()}, tmp_path / "a.pt")
    source = open_source(tmp_path / "a.pt")
    assert isinstance(source, TorchSource)
    start = source.bytes_read
    assert same_bits(source.read("columns", range(64)), wide[:, 10:20].contiguous())
    assert source.bytes_read - start == 64 * 10 * 4
    start = source.bytes_read
    assert same_bits(source.read("turned", range(100, 200)), wide.t()[100:200].contiguous())
    assert source.bytes_read - start == 64 * 100 * 4


def test_values_of_several_lines_are_shown_on_one(tmp_path: Path) -> None:
    torch.save({torch.arange(90.0): torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    message = str(refused(tmp_path / "a.pt"))
    assert "a tensor's name is a string, got tensor([ 0." in message
    assert "\n" not in message

"""The engine: whatever the threads and chunks, the file holds what quantizing whole tensors gives."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import DictSource, RawExporter, Tiny, make_plan, read_back, read_part

from monoquant_core import memory
from monoquant_core.encoding import FULL, INT4, INT8, Encoding, per_channel, per_group, per_tensor
from monoquant_core.engine import RunOptions, compute, find_device, write
from monoquant_core.errors import (
    CalibrationError,
    CheckError,
    DeviceError,
    OutputError,
    PlanError,
    QuantizationError,
    SourceError,
)
from monoquant_core.exporters import Output, Transform
from monoquant_core.memory import usable_cores, working_bytes
from monoquant_core.model import TensorSpec
from monoquant_core.report import Progress
from monoquant_core.rows import RowMap, all_rows
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats
from monoquant_core.tasks import check_steps, elements_of_tasks, schedule, task_ranges, task_rows
from monoquant_core.tensor import QuantizedTensor, same_bits


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def whole(scheme: Tiny, x: torch.Tensor) -> QuantizedTensor:
    """The scheme on a whole tensor: what every chunking must come to."""
    spec = TensorSpec("x", tuple(x.shape), "float32")
    proposal = scheme.propose(spec)
    absmax = float(x.abs().max()) if "absmax" in proposal.needs and x.numel() else None
    return scheme.quantize(x.float(), proposal.encoding, Context(spec, all_rows(tuple(x.shape)), Scratch(), absmax))


def same(a: Any, b: Any) -> bool:
    return a.equal(b) if isinstance(a, QuantizedTensor) else same_bits(a, b)


SCHEMES = [
    Tiny(8),
    Tiny(4, 8),
    Tiny(8, -1),
    Tiny(4, 8, "zero_point", "bfloat16"),
    Tiny(4, 4, "offset", "float16"),
    Tiny(8, 0, "float8"),
    Tiny(4, 8, "nested"),
    Tiny(4, 8, whole=True),
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 8), (37, 16), (64, 8), (5, 3, 8), (9, 4, 3, 8), (2, 1, 16)]),
    scheme=st.sampled_from(SCHEMES),
    threads=st.integers(1, 5),
    chunk=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    sparing=st.booleans(),
)
def test_threads_and_chunks_never_change_a_byte(
    tmp_path: Path, shape: tuple[int, ...], scheme: Tiny, threads: int, chunk: int, dtype: torch.dtype, sparing: bool
) -> None:
    x = weights(*shape, dtype=dtype)
    source = DictSource({"first": weights(3, 8), "w": x, "last": torch.arange(5)})
    exporter = RawExporter()
    exporter.sparing = sparing
    plan = make_plan(source, exporter, {"w": scheme})
    path = tmp_path / "out"
    report = write(plan, source, path, RunOptions(threads=threads, chunk_elements=chunk, force=True))
    assert same(read_back(plan, path, "w"), whole(scheme, x))
    assert np.array_equal(read_part(plan, path, "last"), np.arange(5))
    assert report.files == {"": path.stat().st_size}
    assert report.nbytes == plan.bytes_after
    assert same(compute(plan.steps[1], source, options=RunOptions(threads, chunk)), whole(scheme, x))
    if "absmax" not in scheme.propose(source.specs()[1]).needs:
        rows = [r for name, span in source.reads[: len(source.reads)] if name == "w" for r in span]
        assert sorted(rows) == sorted([*range(math.prod(shape[:-1]))] * 2)  # once by write, once by compute


def test_reports_do_not_depend_on_threads(tmp_path: Path) -> None:
    source = DictSource({"a": weights(100, 32), "b": weights(100, 32, seed=1)})
    plan = make_plan(source, RawExporter(), {"a": Tiny(8), "b": Tiny(4, 8)})
    found = [write(plan, source, tmp_path / f"{n}", RunOptions(threads=n, chunk_elements=200)).tensors for n in (1, 4)]
    assert found[0] == found[1]


KEPT = {
    "f32": weights(7, 9),
    "f16": weights(7, 9, dtype=torch.float16),
    "bf16": weights(7, 9, dtype=torch.bfloat16),
    "f64": weights(7, 9, dtype=torch.float64),
    "f8": weights(7, 9).to(torch.float8_e4m3fn),
    "c64": torch.complex(weights(7, 9), weights(7, 9)),
    "i64": torch.arange(-5, 58).view(7, 9),
    "u8": torch.arange(63, dtype=torch.uint8),
    "bool": torch.tensor([[True, False, True]]),
    "scalar": torch.tensor(-0.0),
    "empty": torch.zeros(0, 4),
    "hollow": torch.zeros(4, 0),
    "strided": weights(9, 7).t(),
    "subnormal": torch.full((3,), 1e-41),
}


def test_what_is_kept_keeps_its_bits(tmp_path: Path) -> None:
    source = DictSource(KEPT)
    plan = make_plan(source, RawExporter())
    report = write(plan, source, tmp_path / "out", RunOptions(chunk_elements=10))
    data = (tmp_path / "out").read_bytes()
    for at in plan.files[0].parts:
        kept = KEPT[at.output].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[at.offset : at.offset + at.nbytes] == kept
    assert {t.action for t in report.tensors} == {"keep"}
    assert report.sqnr_db == math.inf
    assert report.worst() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_nonfinite_values_are_refused_by_name_and_index(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    x = weights(20, 8, dtype=dtype)
    x[13, 5] = value
    source = DictSource({"model.norm": x})
    plan = make_plan(source, RawExporter())
    with pytest.raises(QuantizationError, match=r"^model.raw: model.norm\[13, 5\] is ") as refused:
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=16))
    assert "--nonfinite allow" in refused.value.hint
    assert list(tmp_path.iterdir()) == []
    write(plan, source, tmp_path / "out", RunOptions(chunk_elements=16, nonfinite="allow"))
    kept = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    at = plan.files[0].parts[0]
    assert (tmp_path / "out").read_bytes()[at.offset : at.offset + at.nbytes] == kept


@pytest.mark.parametrize("nonfinite", ["refuse", "allow"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nonfinite_values_are_never_quantized(tmp_path: Path, scheme: Tiny, nonfinite: Any) -> None:
    for value in (math.nan, -math.inf):
        x = weights(20, 8)
        x[13, 5] = value
        source = DictSource({"w": x})
        plan = make_plan(source, RawExporter(), {"w": scheme})
        options = RunOptions(chunk_elements=16, nonfinite=nonfinite)
        with pytest.raises(QuantizationError, match=rf"^model.raw: w\[13, 5\] is {value}, which no scheme") as refused:
            write(plan, source, tmp_path / "out", options)
        assert "--keep 'w'" in refused.value.hint
        with pytest.raises(QuantizationError, match=r"w\[13, 5\]"):
            compute(plan.steps[0], source, options=options)
        assert list(tmp_path.iterdir()) == []


def test_a_double_beyond_float32_is_refused(tmp_path: Path) -> None:
    x = weights(4, 8, dtype=torch.float64)
    x[1, 2] = 1e300
    source = DictSource({"w": x})
    with pytest.raises(QuantizationError, match=r"w\[1, 2\] is 1e\+300"):
        write(make_plan(source, RawExporter(), {"w": Tiny()}), source, tmp_path / "out")


def cast(x: torch.Tensor, dtype: str) -> tuple[DictSource, Any]:
    source = DictSource({"w": x})
    return source, make_plan(source, RawExporter([Output("w", tuple(x.shape), dtype, ("w",))]))


@pytest.mark.parametrize("origin", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_casts_round_to_nearest_and_say_how_far(tmp_path: Path, origin: torch.dtype, dtype: str) -> None:
    x = weights(30, 8, dtype=origin)
    source, plan = cast(x, dtype)
    report = write(plan, source, tmp_path / "out", RunOptions(chunk_elements=50))
    wanted = x.to(getattr(torch, dtype))
    assert same_bits(read_back(plan, tmp_path / "out", "w"), wanted)
    noise = float((x.double() - wanted.double()).square().sum())
    assert report.tensors[0].noise == pytest.approx(noise, rel=1e-4, abs=1e-30)
    assert report.tensors[0].action == ("keep" if wanted.dtype == origin else "cast")


def test_a_cast_that_overflows_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    x = weights(30, 8)
    x[3, 1], x[20, 7] = math.nan, 70000.0
    source, plan = cast(x, "float16")
    with pytest.raises(QuantizationError, match=r"w\[3, 1\] is nan"):
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=50))
    with pytest.raises(QuantizationError, match=r"w\[20, 7\] is 70000.0, which does not fit float16"):
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=50, nonfinite="allow"))
    x[20, 7] = -math.inf
    write(plan, source, tmp_path / "out", RunOptions(chunk_elements=50, nonfinite="allow"))
    assert same_bits(read_back(plan, tmp_path / "out", "w"), x.half())


def test_integers_are_only_cast_where_they_fit(tmp_path: Path) -> None:
    source, plan = cast(torch.arange(10), "int32")
    write(plan, source, tmp_path / "out")
    assert np.array_equal(read_part(plan, tmp_path / "out", "w"), np.arange(10))
    source, plan = cast(torch.tensor([1, 1 << 40]), "int32")
    with pytest.raises(CheckError, match="has values that int32 does not hold") as refused:
        write(plan, source, tmp_path / "out2")
    assert "--keep 'w'" in refused.value.hint


ORDER = (2, 0, 3, 1)


def permuted(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 4, *x.shape[1:])[:, list(ORDER)].reshape(x.shape)


@pytest.mark.parametrize("scheme", [None, Tiny(8), Tiny(4, 8), Tiny(8, -1)])
def test_rows_are_permuted_before_anything_else(tmp_path: Path, scheme: Tiny | None) -> None:
    x = weights(24, 16)
    exporter = RawExporter([Output("q", (24, 16), "float32", ("w",), rows=RowMap(ORDER))])
    source = DictSource({"w": x})
    plan = make_plan(source, exporter, {"w": scheme} if scheme else {})
    for chunk in (16, 100, 10_000):
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=chunk, force=True))
        wanted = permuted(x) if scheme is None else whole(scheme, permuted(x))
        assert same(read_back(plan, tmp_path / "out", "q"), wanted)


@pytest.mark.parametrize("scheme", [Tiny(8), Tiny(4, 8), Tiny(8, -1), Tiny(4, 8, "nested"), Tiny(4, 8, "zero_point")])
def test_finished_tensors_are_permuted_with_their_parameters(tmp_path: Path, scheme: Tiny) -> None:
    x = weights(24, 16)
    source = DictSource({"w": whole(scheme, x)})
    plan = make_plan(source, RawExporter([Output("q", (24, 16), "float32", ("w",), rows=RowMap(ORDER))]))
    for chunk in (16, 100, 10_000):
        report = write(plan, source, tmp_path / "out", RunOptions(chunk_elements=chunk, force=True))
        assert same(read_back(plan, tmp_path / "out", "q"), whole(scheme, permuted(x)))
        assert report.tensors[0].action == "repack"
        assert report.tensors[0].noise == 0


def experts(count: int, *shape: int) -> dict[str, torch.Tensor]:
    return {f"e{i}": weights(*shape, seed=i) for i in range(count)}


@pytest.mark.parametrize("scheme", [None, Tiny(8, 8), Tiny(4, 8), Tiny(8, -1)])
@pytest.mark.parametrize("shape", [(3, 10, 16), (30, 16)])
def test_inputs_are_stacked_or_joined(tmp_path: Path, shape: tuple[int, ...], scheme: Tiny | None) -> None:
    tensors = experts(3, 10, 16)
    exporter = RawExporter([Output("experts", shape, "float32", tuple(tensors))])
    source = DictSource(tensors)
    plan = make_plan(source, exporter, dict.fromkeys(tensors, scheme) if scheme else {})
    stacked = torch.cat(list(tensors.values())).view(shape)
    for chunk in (16, 90, 10_000):
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=chunk, force=True))
        assert same(read_back(plan, tmp_path / "out", "experts"), whole(scheme, stacked) if scheme else stacked)


@pytest.mark.parametrize("scheme", [Tiny(4, 8), Tiny(4, 8, "zero_point")])
def test_finished_experts_are_stacked(tmp_path: Path, scheme: Tiny) -> None:
    tensors = experts(3, 10, 16)
    source = DictSource({name: whole(scheme, x) for name, x in tensors.items()})
    wanted = whole(scheme, torch.stack(list(tensors.values())))
    exporter = RawExporter([Output("experts", (3, 10, 16), "float32", tuple(tensors))], {"experts": wanted.encoding})
    plan = make_plan(source, exporter)
    for chunk in (16, 90, 10_000):
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=chunk, force=True))
        assert same(read_back(plan, tmp_path / "out", "experts"), wanted)


def test_finished_experts_with_a_scale_each_do_not_make_one_tensor_with_one(tmp_path: Path) -> None:
    source = DictSource({name: whole(Tiny(8, -1), x) for name, x in experts(2, 4, 16).items()})
    plan = make_plan(source, RawExporter([Output("experts", (8, 16), "float32", ("e0", "e1"))]))
    with pytest.raises(PlanError, match="experts: .* cannot be stored"):
        write(plan, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def plus_one(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0] + 1


def transposed(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0].t().contiguous()


def joined(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([inputs[0], inputs[1].flip(0)], dim=1)


def frequencies(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    assert not inputs
    return torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("scheme", [None, Tiny(8), Tiny(4, 4)])
@pytest.mark.parametrize(
    ("apply", "per", "shape", "inputs"),
    [
        (plus_one, "rows", (20, 8), ("a",)),
        (transposed, "tensor", (8, 20), ("a",)),
        (joined, "tensor", (20, 16), ("a", "b")),
    ],
)
def test_values_are_transformed(
    tmp_path: Path, apply: Callable[..., Any], per: Any, shape: tuple[int, ...], inputs: tuple[str, ...], scheme: Any
) -> None:
    tensors = {"a": weights(20, 8), "b": weights(20, 8, seed=1)}
    exporter = RawExporter([Output("out", shape, "float32", inputs, transform=Transform(apply, per, "test"))])
    source = DictSource(tensors)
    plan = make_plan(source, exporter, dict.fromkeys(inputs, scheme) if scheme else {})
    wanted = apply([tensors[name] for name in inputs])
    for chunk in (16, 10_000):
        report = write(plan, source, tmp_path / "out", RunOptions(chunk_elements=chunk, force=True))
        assert same(read_back(plan, tmp_path / "out", "out"), whole(scheme, wanted) if scheme else wanted)
        assert report.tensors[0].action == ("quantize" if scheme else "derive")


def test_outputs_without_inputs_are_computed(tmp_path: Path) -> None:
    source = DictSource({"a": weights(2, 4)})
    derived = Output("rope", (3, 4), "float32", (), transform=Transform(frequencies, "tensor", "computed"))
    plan = make_plan(source, RawExporter([Output("a", (2, 4), "float32", ("a",)), derived]))
    write(plan, source, tmp_path / "out")
    assert torch.equal(read_back(plan, tmp_path / "out", "rope"), frequencies([]))


def test_a_transform_that_does_not_keep_its_word(tmp_path: Path) -> None:
    source = DictSource({"a": weights(20, 8)})
    short = Transform(lambda inputs: inputs[0][:3], "rows", "test")
    exporter = RawExporter([Output("a", (20, 8), "float32", ("a",), transform=short)])
    with pytest.raises(PlanError, match="a: the format's transform made"):
        write(make_plan(source, exporter), source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_floats_that_a_transform_makes_are_cast_to_what_the_file_holds(tmp_path: Path) -> None:
    source = DictSource({"a": weights(20, 8)})
    double = Transform(lambda inputs: inputs[0].double() * 2, "rows", "test")
    plan = make_plan(source, RawExporter([Output("a", (20, 8), "float32", ("a",), transform=double)]))
    write(plan, source, tmp_path / "out")
    assert torch.equal(read_back(plan, tmp_path / "out", "a"), weights(20, 8) * 2)


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (Output("w", (20, 8), "float32", ("w",), rows=RowMap((1, 0, 2))), "20 rows are not whole blocks of 3"),
        (Output("w", (20, 9), "float32", ("w",)), "cannot be made of"),
        (Output("w", (20, 8), "float32", ()), "has no inputs"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_is_read(tmp_path: Path, out: Output, reason: str) -> None:
    source = DictSource({"w": weights(20, 8)})
    plan = make_plan(source, RawExporter())
    step = dataclasses.replace(
        plan.steps[0],
        placed=dataclasses.replace(plan.steps[0].placed, output=out),
        specs=plan.steps[0].specs if out.inputs else (),
    )
    with pytest.raises(PlanError, match=reason):
        write(dataclasses.replace(plan, steps=(step,)), source, tmp_path / "out")
    assert source.reads == []
    assert list(tmp_path.iterdir()) == []


def test_permuted_rows_that_share_a_block_are_refused() -> None:
    source = DictSource(
        {"w": QuantizedTensor(Encoding(INT8, (2, FULL), "float32"), torch.zeros(4, 8).char(), torch.ones(2, 1))}
    )
    plan = make_plan(source, RawExporter([Output("w", (4, 8), "float32", ("w",), rows=RowMap((1, 0)))]))
    with pytest.raises(PlanError, match="blocks of .* span several"):
        check_steps(plan.steps)


def test_a_first_pass_tells_the_magnitude_of_the_whole_tensor(tmp_path: Path) -> None:
    x = weights(64, 16)
    x[50, 3] = -9.0
    scheme = Tiny(8, -1)
    source = DictSource({"w": x})
    plan = make_plan(source, RawExporter(), {"w": scheme})
    seen: list[Progress] = []
    write(plan, source, tmp_path / "out", RunOptions(threads=2, chunk_elements=100), progress=seen.append)
    assert len(scheme.seen) > 5
    assert {absmax for _, absmax in scheme.seen} == {9.0}
    assert {p.stage for p in seen} == {"scan", "write", "sync", "done"}
    rows = [r for _, span in source.reads for r in span]
    assert sorted(rows) == sorted([*range(64)] * 2)
    source.reads.clear()
    write(plan, source, tmp_path / "one", RunOptions(chunk_elements=10_000))
    assert len(source.reads) == 1  # a tensor that is one chunk is read once
    assert (tmp_path / "one").read_bytes() == (tmp_path / "out").read_bytes()


def test_schemes_that_need_the_whole_tensor_get_it(tmp_path: Path) -> None:
    scheme = Tiny(4, 8, whole=True)
    source = DictSource({"w": weights(64, 16)})
    write(make_plan(source, RawExporter(), {"w": scheme}), source, tmp_path / "out", RunOptions(chunk_elements=10))
    assert [rows for rows, _ in scheme.seen] == [range(64)]


def test_finished_tensors_become_floats_or_are_quantized_anew(tmp_path: Path) -> None:
    q = whole(Tiny(4, 8), weights(40, 16))
    source = DictSource({"w": q})
    exporter = RawExporter([Output("w", (40, 16), "bfloat16", ("w",))])
    plan = make_plan(source, exporter, actions={"w": "dequantize"})
    report = write(plan, source, tmp_path / "floats", RunOptions(chunk_elements=100))
    assert same_bits(read_back(plan, tmp_path / "floats", "w"), q.dequantize().bfloat16())
    assert report.tensors[0].action == "dequantize"
    assert report.tensors[0].noise > 0
    again = make_plan(source, RawExporter(), {"w": Tiny(8)})
    report = write(again, source, tmp_path / "again", RunOptions(chunk_elements=100))
    assert same(read_back(again, tmp_path / "again", "w"), whole(Tiny(8), q.dequantize()))


def test_repacking_rounds_parameters_and_never_codes(tmp_path: Path) -> None:
    q = whole(Tiny(4, 16), weights(40, 32))
    source = DictSource({"w": q})
    finer = Encoding(INT4, per_group(2, 8), "float16")
    plan = make_plan(source, RawExporter(held={"w": finer}))
    report = write(plan, source, tmp_path / "out", RunOptions(threads=3, chunk_elements=100))
    back = read_back(plan, tmp_path / "out", "w")
    assert isinstance(back, QuantizedTensor)
    assert same_bits(back.codes, q.codes)
    assert same_bits(back.scale, q.scale.repeat_interleave(2, 1).half())
    noise = float((q.dequantize().double() - back.dequantize().double()).square().sum())
    assert report.tensors[0].noise == pytest.approx(noise, rel=1e-4)
    assert report.tensors[0].action == "repack"


@pytest.mark.parametrize(("factor", "reason"), [(1e7, "not finite"), (1e-7, "became zero")])
def test_repacking_into_parameters_that_are_too_narrow(tmp_path: Path, factor: float, reason: str) -> None:
    q = whole(Tiny(4, 16), weights(40, 32) * factor)
    source = DictSource({"w": q})
    plan = make_plan(source, RawExporter(held={"w": Encoding(INT4, per_group(2, 16), "float16")}))
    with pytest.raises(CheckError, match=rf"^model.raw: w: .*{reason}"):
        write(plan, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_file_with_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    q = whole(Tiny(4, 16), weights(40, 32))
    q.scale[3, 1] = math.nan
    source = DictSource({"w": q})
    plan = make_plan(source, RawExporter())
    with pytest.raises(CheckError, match="a scale of it is not finite"):
        write(plan, source, tmp_path / "out")
    write(plan, source, tmp_path / "out", RunOptions(nonfinite="allow"))
    assert same(read_back(plan, tmp_path / "out", "w"), q)


def test_ties_that_hold_are_left_out(tmp_path: Path) -> None:
    x = weights(40, 32)
    source = DictSource({"embed": x, "head": x.clone()}, {"head": "embed"})
    plan = make_plan(source, RawExporter(), actions={"head": "drop"})
    write(plan, source, tmp_path / "out", RunOptions(chunk_elements=100))
    assert [at.output for at in plan.files[0].parts] == ["embed"]


@pytest.mark.parametrize("change", [lambda x: x.add_(0), lambda x: x[39, 31].add_(1), lambda x: x.neg_(), None])
def test_ties_that_do_not_hold_are_refused(tmp_path: Path, change: Any) -> None:
    x = weights(40, 32)
    other = x.half() if change is None else x.clone()
    if change is not None:
        change(other)
    source = DictSource({"embed": x, "head": other}, {"head": "embed"})
    plan = make_plan(source, RawExporter(), actions={"head": "drop"})
    if change is not None and torch.equal(x, other):
        write(plan, source, tmp_path / "out")
        return
    with pytest.raises(CheckError, match=r"^model.raw: head is tied to embed, and the file holds another") as refused:
        write(plan, source, tmp_path / "out")
    assert "tie_word_embeddings" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_source_may_know_that_a_tie_is_one_storage(tmp_path: Path) -> None:
    source = DictSource({"embed": weights(4, 8), "head": weights(4, 8)}, {"head": "embed"})
    source.shares_storage = lambda a, b: (a, b) == ("head", "embed")  # type: ignore[attr-defined]
    write(make_plan(source, RawExporter(), actions={"head": "drop"}), source, tmp_path / "out")
    assert {name for name, _ in source.reads} == {"embed"}


def test_reports_measure(tmp_path: Path) -> None:
    x = weights(100, 32)
    source = DictSource({"w": x, "b": weights(32)})
    plan = make_plan(source, RawExporter(), {"w": Tiny(4, 8)})
    report = write(plan, source, tmp_path / "out", RunOptions(threads=2, chunk_elements=100))
    q = read_back(plan, tmp_path / "out", "w")
    assert isinstance(q, QuantizedTensor)
    error = (x.double() - q.dequantize().double()).numpy()
    signal, noise = float((x.double() ** 2).sum()), float((error**2).sum())
    found = next(t for t in report.tensors if t.name == "w")
    assert report.sqnr_db == found.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert found.max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert report.worst() == [found]
    assert (found.action, found.layout, found.numel) == ("quantize", "raw", 3200)
    assert report.source_bytes == 100 * 32 * 4 + 32 * 4
    assert report.peak_bytes >= report.start_bytes > 0
    assert report.predicted_bytes == working_bytes([plan], 2, 100)
    assert (report.threads, report.device, report.destination) == (2, "cpu", tmp_path / "out")


def test_progress_goes_from_nothing_to_everything(tmp_path: Path) -> None:
    source = DictSource({"a": weights(50, 32), "b": weights(50, 32), "c": torch.zeros(0, 3)})
    plan = make_plan(source, RawExporter(), {"a": Tiny(8, -1)})
    seen: list[Progress] = []
    write(plan, source, tmp_path / "out", RunOptions(chunk_elements=64), progress=seen.append)
    stages = [p.stage for p in seen]
    assert stages == sorted(stages, key=["scan", "write", "sync", "done"].index)
    for stage, total in (("scan", 6400), ("write", 12800)):
        done = [p.done_bytes for p in seen if p.stage == stage]
        assert done == sorted(done)
        assert done[-1] == total
        assert {p.total_bytes for p in seen if p.stage == stage} == {total}
    assert (seen[-1].stage, seen[-1].done_bytes, seen[-1].total_bytes) == ("done", 12800, 12800)


def test_a_progress_callback_that_fails_ends_the_run(tmp_path: Path) -> None:
    source = DictSource({"a": weights(50, 32)})

    def fail(_: Progress) -> None:
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        write(make_plan(source, RawExporter()), source, tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_torch_has_its_threads_back(tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []

    def look(q: QuantizedTensor, context: Context) -> QuantizedTensor:
        found.append((torch.get_num_threads(), threading.get_ident()))
        if len(found) > 3:
            raise RuntimeError("enough")
        return q

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        source = DictSource({"w": weights(50, 32)})
        plan = make_plan(source, RawExporter(), {"w": Tiny(8)})
        write(plan, source, tmp_path / "out")
        assert torch.get_num_threads() == 3
        spoiled = make_plan(source, RawExporter(), {"w": Tiny(8, spoil=look)})
        with pytest.raises(RuntimeError, match="enough"):
            write(spoiled, source, tmp_path / "no", RunOptions(threads=1, chunk_elements=32))
        assert torch.get_num_threads() == 3
        assert {n for n, _ in found} == {1}
        assert threading.get_ident() not in {ident for _, ident in found}
    finally:
        torch.set_num_threads(before)
    assert not [t for t in threading.enumerate() if t.name.startswith("monoquant")]


def test_parameters_of_a_module_are_read_without_gradients(tmp_path: Path) -> None:
    source = DictSource({"w": torch.nn.Parameter(weights(8, 8)), "b": torch.nn.Parameter(weights(8))})
    plan = make_plan(source, RawExporter(), {"w": Tiny(8)})
    write(plan, source, tmp_path / "out")
    kept = compute(plan.steps[1], source)
    assert not kept.requires_grad
    kept.add_(1)
    assert not torch.equal(source.tensors["b"], kept)
    made = compute(plan.steps[0], source)  # autograd takes it, although no gradient led to it
    (made.scale.requires_grad_() * 2).sum().backward()
    assert bool((made.scale.grad == 2).all())


def test_the_importance_of_columns_reaches_the_scheme(tmp_path: Path) -> None:
    given: list[Any] = []

    def look(q: QuantizedTensor, context: Context) -> QuantizedTensor:
        given.append(context.importance)
        return q

    class Needy(Tiny):
        def propose(self, spec: TensorSpec) -> Any:
            return dataclasses.replace(super().propose(spec), needs=frozenset({"importance"}))

    source = DictSource({"w": weights(8, 16)})
    plan = make_plan(source, RawExporter(), {"w": Needy(8, spoil=look)})
    with pytest.raises(CalibrationError, match="w: tiny needs the importance"):
        write(plan, source, tmp_path / "out")
    stats = TensorStats(1, torch.zeros(()), torch.ones(()), importance=torch.arange(16.0))
    write(plan, source, tmp_path / "out", stats={"w": stats})
    assert torch.equal(given[0], torch.arange(16.0))


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    absent = "cuda" if not torch.cuda.is_available() else "cuda:99"
    for name in (absent, "meta", "no-such-thing"):
        with pytest.raises(DeviceError, match=f"no device '{name}' here: ") as refused:
            find_device(name)
        assert "cpu" in refused.value.hint
    source = DictSource({"w": weights(8, 16)})
    with pytest.raises(DeviceError):
        write(make_plan(source, RawExporter()), source, tmp_path / "out", RunOptions(device=absent))
    assert list(tmp_path.iterdir()) == []
    write(make_plan(source, RawExporter(), {"w": Tiny()}), source, tmp_path / "out", RunOptions(device="cpu:0"))


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    source = DictSource({"w": weights(8, 16)})
    plan = make_plan(source, RawExporter())
    for options in (RunOptions(threads=-1), RunOptions(chunk_elements=-1)):
        with pytest.raises(PlanError, match="must not be negative"):
            write(plan, source, tmp_path / "out", options)
    with pytest.raises(PlanError, match="without a format"):
        write(make_plan(source, None), source, tmp_path / "out")


# What schemes, formats and sources may do wrong


def codes_off_by_one(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    if 13 in context.rows:
        row = q.codes[13 - context.rows.start]
        row[5] += 1 if row[5] < 0 else -1
    return q


def nan_scale(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    if 13 in context.rows:
        q.scale[13 - context.rows.start] = math.nan
    return q


def zero_scale(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    if 13 in context.rows:
        q.scale[13 - context.rows.start] = 0
    return q


def another_encoding(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    return QuantizedTensor(Encoding(INT8, q.encoding.block, "float16"), q.codes, q.scale.half())


def another_shape(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    return QuantizedTensor(q.encoding, q.codes[:1], q.scale[:1])


def impossible(q: QuantizedTensor, context: Context) -> QuantizedTensor:
    return QuantizedTensor(q.encoding, q.codes, q.scale[:, :0])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (codes_off_by_one, r"w\[13, 5\] became .* where a step is"),
        (nan_scale, r"w\[13, 0\] does not decode to a finite value"),
        (zero_scale, r"w\[13, 0\] is not zero, and its block got a zero scale"),
        (another_encoding, "w: tiny made .* and promised"),
        (another_shape, "w: tiny made .* and promised"),
        (impossible, "w: scale: expected shape"),
    ],
)
def test_schemes_that_are_wrong_are_caught(tmp_path: Path, spoil: Any, reason: str) -> None:
    source = DictSource({"w": weights(20, 8)})
    plan = make_plan(source, RawExporter(), {"w": Tiny(8, spoil=spoil)})
    with pytest.raises(CheckError, match=rf"^model.raw: {reason}") as refused:
        write(plan, source, tmp_path / "out", RunOptions(threads=2, chunk_elements=32))
    assert refused.value.hint == "leave it as it is: --keep 'w'"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckError, match=reason):
        compute(plan.steps[0], source)


def flip_codes(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    parts["w.codes"] = parts["w.codes"].clone()
    parts["w.codes"].view(-1)[-1] ^= 1
    return parts


def shift_scale(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return parts | {"w.scale": parts["w.scale"] * (1 + 2**-23 if row == 12 else 1)}


def flip_kept(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return {k: v.neg() if k == "b" else v for k, v in parts.items()}


def without_scale(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in parts.items() if k != "w.scale"}


def with_more(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return parts | {"more": torch.zeros(1)}


def of_another_dtype(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return {k: v.view(torch.uint8) if k == "w.codes" else v for k, v in parts.items()}


def too_long(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
    return {k: torch.cat([v, v]) if k == "w.codes" else v for k, v in parts.items()}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_codes, "w: packed as raw, it does not unpack to the same bits"),
        (shift_scale, "w: packed as raw, it does not unpack to the same bits"),
        (flip_kept, "b: packed as raw, it does not unpack to the same bits"),
        (without_scale, r"w: the format packed \['w.scale'\] otherwise than it announced"),
        (with_more, r"w: the format packed \['more'\] otherwise"),
        (of_another_dtype, r"w: the format packed \['w.codes'\] otherwise"),
        (too_long, r"w: the format packed \['w.codes'\] otherwise"),
    ],
)
def test_formats_that_are_wrong_are_caught(tmp_path: Path, spoil: Any, reason: str) -> None:
    source = DictSource({"w": weights(20, 8), "b": torch.zeros(4)})
    exporter = RawExporter()
    plan = make_plan(source, exporter, {"w": Tiny(8)})
    exporter.spoil = spoil
    with pytest.raises(CheckError, match=rf"^model.raw: {reason}"):
        write(plan, source, tmp_path / "out", RunOptions(threads=2, chunk_elements=32))
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_the_whole_tensor_must_be_one_number(tmp_path: Path) -> None:
    """The file has room for one scale; chunks that used others would be wrong."""

    def own_scale(q: QuantizedTensor, context: Context) -> QuantizedTensor:
        return QuantizedTensor(q.encoding, q.codes, q.scale * (1 + 1e-6 * context.rows.start))

    source = DictSource({"w": weights(20, 8)})
    for sparing in (False, True):
        exporter = RawExporter()
        exporter.sparing = sparing
        plan = make_plan(source, exporter, {"w": Tiny(8, -1, spoil=own_scale)})
        with pytest.raises(CheckError, match="does not unpack to the same bits"):
            write(plan, source, tmp_path / "out", RunOptions(threads=2, chunk_elements=32))
        with pytest.raises(CheckError, match="model.raw: w: scale: the chunks of one tensor disagree on it"):
            compute(plan.steps[0], source, options=RunOptions(chunk_elements=32))
    assert list(tmp_path.iterdir()) == []


def test_the_first_tensor_that_fails_is_the_one_that_is_named(tmp_path: Path) -> None:
    tensors = {f"t{i}": weights(20, 8, seed=i) for i in range(20)}
    for i in (7, 8, 15):
        tensors[f"t{i}"][3, 3] = math.nan
    source = DictSource(tensors)
    for _ in range(5):
        with pytest.raises(QuantizationError, match=r"t7\[3, 3\]"):
            write(make_plan(source, RawExporter()), source, tmp_path / "out", RunOptions(threads=4, chunk_elements=32))


def test_a_first_chunk_that_fails_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    x = weights(200, 8)
    x[0, 0] = 1e30
    source = DictSource({"w": x})
    exporter = RawExporter()
    plan = make_plan(source, exporter, {"w": Tiny(8, -1)})

    def fail(parts: dict[str, torch.Tensor], row: Any) -> dict[str, torch.Tensor]:
        if row == 0:
            raise RuntimeError("the first")
        return parts

    exporter.spoil = fail
    for _ in range(5):
        with pytest.raises(RuntimeError, match="the first"):
            write(plan, source, tmp_path / "out", RunOptions(threads=4, chunk_elements=16))


@pytest.mark.parametrize("change", ["offset", "twice", "missing", "size", "prefix", "unknown"])
def test_layouts_that_are_wrong_are_caught_before_anything_is_written(tmp_path: Path, change: str) -> None:
    source = DictSource({"a": weights(20, 8), "b": weights(20, 8)})
    plan = make_plan(source, RawExporter())
    (file,) = plan.files
    a, b = file.parts
    spoiled = {
        "offset": (a, dataclasses.replace(b, offset=a.offset + 4)),
        "twice": (a, b, dataclasses.replace(b, offset=b.offset + 10_000)),
        "missing": (a,),
        "size": (a, dataclasses.replace(b, nbytes=4)),
        "prefix": (dataclasses.replace(a, offset=8), b),
        "unknown": (a, b, dataclasses.replace(b, output="c", offset=b.offset + 10_000)),
    }[change]
    plan = dataclasses.replace(plan, files=(dataclasses.replace(file, parts=spoiled),))
    with pytest.raises(PlanError, match="a bug of the format"):
        write(plan, source, tmp_path / "out")
    assert source.reads == []
    assert list(tmp_path.iterdir()) == []


def test_sources_that_give_something_else(tmp_path: Path) -> None:
    class Liar(DictSource):
        def read(self, name: str, rows: range, scratch: Any = None) -> Any:
            value = super().read(name, rows, scratch)
            return self.lie(value)

    for lie in (lambda v: v[:-1], lambda v: v.double(), lambda v: whole(Tiny(), v)):
        source = Liar({"w": weights(20, 8)})
        source.lie = lie  # type: ignore[attr-defined]
        with pytest.raises(SourceError, match=r"^model.raw: w: read .*, expected"):
            write(make_plan(source, RawExporter()), source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_stops_a_run_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    source = DictSource({"w": weights(20, 8)})
    with pytest.raises(OutputError, match="already exists"):
        write(make_plan(source, RawExporter()), source, tmp_path / "out")
    assert source.reads == []
    assert (tmp_path / "out").read_bytes() == b"precious"


# How tasks are cut


def test_tasks_are_multiples_of_what_everybody_asks_for() -> None:
    def rows(shape: tuple[int, ...], scheme: Tiny | None = None, **output: Any) -> int:
        source = DictSource({"w": torch.zeros(shape)})
        exporter = RawExporter([Output("w", shape, "float32", ("w",), **output)])
        return task_rows(make_plan(source, exporter, {"w": scheme} if scheme else {}).steps[0])

    assert rows((64, 16)) == 1
    assert rows((64, 16), Tiny(8)) == 1
    assert rows((64, 16), Tiny(8, -1)) == 1
    assert rows((64, 16), Tiny(8, 8, whole=True)) == 64
    assert rows((8, 4, 3, 16), Tiny(8)) == 12
    assert rows((64, 16), rows=RowMap((3, 2, 1, 0))) == 4
    assert rows((8, 6, 16), Tiny(8), rows=RowMap((3, 2, 1, 0))) == 12
    assert rows((64, 16), transform=Transform(plus_one, "tensor", "")) == 64
    assert rows((0, 16)) == 1


def test_inputs_that_are_no_boxes_are_taken_whole() -> None:
    source = DictSource({"w": torch.zeros(4, 6, 8)})
    flat = make_plan(source, RawExporter([Output("w", (24, 8), "float32", ("w",))])).steps[0]
    assert task_ranges(flat, 40) == [range(24)]  # rows 5..10 cross from one index to the next
    assert len(task_ranges(flat, 48)) == 4
    folded = make_plan(source, RawExporter([Output("w", (24, 2, 4), "float32", ("w",))])).steps[0]
    assert task_ranges(folded, 8) == [range(48)]


def test_memory_is_bounded_by_the_chunks_in_flight_and_predicted(tmp_path: Path) -> None:
    """Of a model that is many times larger; read from a file that is mostly holes."""
    script = """
import os, sys, resource
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from engine_kit import DictSource, RawExporter, Tiny, make_plan
from monoquant_core.engine import RunOptions, write
from monoquant_core.model import TensorSpec
from monoquant_core.tensor import QuantizedTensor

SHAPE = (4096, 2048)
class Holes(DictSource):
    def specs(self): return [TensorSpec(f"w{i}", SHAPE, "bfloat16") for i in range(6)]
    def read(self, name, rows, scratch=None):
        return scratch.take("source", (len(rows), SHAPE[1]), torch.bfloat16).fill_(0.5)

def plain(q, context): return q
class Lean(Tiny):
    def quantize(self, rows, encoding, context):
        codes = context.scratch.take("codes", rows.shape, torch.int8)
        work = context.scratch.take("work", rows.shape, torch.float32)
        codes.copy_(torch.mul(rows, 254, out=work))
        return QuantizedTensor(encoding, codes, torch.full((len(rows), 1), 1 / 254))
source = Holes({})
source._ties = {}
plan = make_plan(source, RawExporter(), {f"w{i}": Lean(8) for i in range(6)})
out = Path(sys.argv[2])
write(plan, source, out / "warm", RunOptions(threads=1, chunk_elements=4096))
report = write(plan, source, out / "out", RunOptions(threads=3))
print(report.peak_bytes - report.start_bytes, report.predicted_bytes, report.source_bytes)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    used, predicted, model = map(int, out.stdout.split())
    assert used <= predicted <= model


def test_threads_that_share_a_tensor_are_predicted() -> None:
    """Most of a model may be one tensor, on which all of them work."""
    plan = make_plan(DictSource({"w": torch.zeros(64, 32), "v": torch.zeros(4, 4)}), RawExporter(), {"w": Tiny(8)})
    one, two, four, many = (working_bytes([plan], threads, 256) for threads in (1, 2, 4, 100))
    assert two - one == (four - two) / 2 > 0
    assert many - two >= 6 * (two - one)  # there are 8 such tasks


def test_freed_memory_goes_back_to_the_system() -> None:
    """What large objects leave between small ones that live on, which C libraries keep."""
    script = """
import ctypes
from monoquant_core.memory import FreedMemory, resident_bytes
if not hasattr(ctypes.CDLL(None), "malloc_trim"):
    raise SystemExit("no malloc_trim")
kept, large = [], []
for _ in range(600):
    large.append(bytearray(b"x") * 100_000)
    kept.append(bytearray(b"x") * 2_000)
full = resident_bytes()
del large
held = resident_bytes()
FreedMemory(held).release()
assert resident_bytes() == held
keeper = FreedMemory(held - 1)
keeper.release()
print(full, held, resident_bytes())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "no malloc_trim" in out.stderr or sys.platform != "linux":
        pytest.skip("the C library cannot be asked")
    full, held, after = map(int, out.stdout.split())
    assert held > full - 30_000_000  # it was not given back by itself
    assert after < full - 50_000_000


def test_usable_cores_are_those_that_control_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = usable_cores()
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    (tmp_path / "slice" / "job").mkdir(parents=True)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert usable_cores() == 64 >= here
    (tmp_path / "slice" / "job" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slice" / "cpu.max").write_text("250000 100000\n")
    assert usable_cores() == 3
    (tmp_path / "cgroup").write_text("7:cpu,cpuacct:/job\n5:memory:/\n")  # version 1
    (tmp_path / "cpu" / "job").mkdir(parents=True)
    (tmp_path / "cpu" / "job" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == 1


def test_usable_cores_are_at_least_one() -> None:
    assert usable_cores() >= 1


def test_many_cores_have_eight_threads_with_larger_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = DictSource({"w": torch.randn(3000, 1024)})
    plan = make_plan(source, RawExporter(), {"w": Tiny()})
    written = set()
    for cores, threads in ((2, 2), (8, 8), (64, 8)):
        monkeypatch.setattr("monoquant_core.memory.usable_cores", lambda cores=cores: cores)
        report = write(plan, source, tmp_path / f"{cores}", RunOptions())
        assert (report.threads, report.predicted_bytes) == (threads, working_bytes([plan], threads))
        written.add((tmp_path / f"{cores}").read_bytes())
    assert len(written) == 1
    assert [len(schedule(plan.steps, elements_of_tasks(n))) for n in (1, 4, 5)] == [6, 6, 3]
    assert write(plan, source, tmp_path / "told", RunOptions(threads=9)).threads == 9
    script = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    script += (
        "from monoquant_core.memory import usable_cores; import sys; print(usable_cores(), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout == "1 False\n"


def test_conv_and_column_blocks_stream_or_are_taken_whole(tmp_path: Path) -> None:
    class Columns(Tiny):
        def encoding(self, ndim: int) -> Encoding:
            return Encoding(INT8, per_channel(ndim, 1), "float32")

    x = weights(6, 4, 3, 5)
    source = DictSource({"w": x})
    for scheme, calls in ((Tiny(8), 6), (Columns(8), 1)):
        plan = make_plan(source, RawExporter(), {"w": scheme})
        write(plan, source, tmp_path / "out", RunOptions(chunk_elements=60, force=True))
        assert len(scheme.seen) == calls
        assert same(read_back(plan, tmp_path / "out", "w"), whole(scheme, x))


def test_a_scheme_whose_encoding_the_format_reencodes(tmp_path: Path) -> None:
    source = DictSource({"w": weights(20, 16)})
    held = Encoding(INT4, per_group(2, 8), "float16")
    plan = make_plan(source, RawExporter(held={"w": held}), {"w": Tiny(4, 16)})
    write(plan, source, tmp_path / "out", RunOptions(chunk_elements=32))
    q = whole(Tiny(4, 16), weights(20, 16))
    back = read_back(plan, tmp_path / "out", "w")
    assert isinstance(back, QuantizedTensor)
    assert back.encoding == held
    assert same_bits(back.codes, q.codes)
    assert per_tensor(2) != held.block


def test_an_output_may_be_made_of_parts_of_others(tmp_path: Path) -> None:
    """A bias in steps of its weight's scales: made when they are known, whatever the threads and chunks."""

    def steps(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        bias, scale = inputs
        return torch.round(bias / (0.5 * scale.reshape(-1))).to(torch.int32)

    weight, bias = weights(64, 16), weights(64, seed=1)
    transform = Transform(steps, "tensor", "in steps of what its weight's codes are", of=(("w", "w.scale"),))
    outputs = [
        Output("b", (64,), "int32", ("b",), transform=transform),
        Output("w", (64, 16), "float32", ("w",)),
    ]
    source = DictSource({"b": bias, "w": weight})
    plan = make_plan(source, RawExporter(outputs), {"w": Tiny(8)})
    plan = dataclasses.replace(plan, steps=(dataclasses.replace(plan.steps[0], action="derive"), plan.steps[1]))
    for threads, chunk in ((1, 1 << 19), (3, 48)):
        report = write(plan, source, tmp_path / "out", RunOptions(threads=threads, chunk_elements=chunk, force=True))
        made = whole(Tiny(8), weight)
        assert isinstance(made.scale, torch.Tensor)
        assert np.array_equal(read_part(plan, tmp_path / "out", "b"), steps([bias, made.scale]).numpy())
        assert [t.name for t in report.tensors] == ["b", "w"]
    with pytest.raises(PlanError, match="which only a whole run makes"):
        compute(plan.steps[0], source)
    lost = dataclasses.replace(plan, steps=(plan.steps[0],) * 2)
    with pytest.raises(PlanError, match="b: waits for parts that no other output has"):
        write(lost, source, tmp_path / "other")

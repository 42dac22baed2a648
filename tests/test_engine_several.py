"""Several outputs in one pass: every row is read once, the bytes are those of separate runs, and all appear or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import DictSource, RawExporter, Tiny, make_plan

from monoquant_core import commit
from monoquant_core.engine import RunOptions, write, write_all
from monoquant_core.errors import MonoquantError, OutputError, QuantizationError, SourceError
from monoquant_core.exporters import Output, Transform
from monoquant_core.memory import working_bytes
from monoquant_core.planning import Plan
from monoquant_core.report import Progress
from monoquant_core.rows import RowMap
from monoquant_core.tasks import schedule

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def finished(*shape: int, seed: int = 0) -> Any:
    """A tensor that is quantized already."""
    from test_engine import whole

    return whole(Tiny(4, 8), weights(*shape, seed=seed))


TENSORS = {
    "a": weights(24, 16),
    "b": weights(24, 16, seed=1),
    **{f"e{i}": weights(12, 16, seed=2 + i) for i in range(3)},
    **{f"q{i}": finished(12, 16, seed=5 + i) for i in range(2)},
    "conv": weights(6, 4, 3, 8, seed=9),
    "norm": weights(16, seed=10),
    "steps": torch.arange(7),
    "empty": torch.zeros(0, 16),
}
EXPERTS = ("e0", "e1", "e2")


def outputs(*changed: Output) -> list[Output]:
    """The changed outputs, and every tensor that none of them is made of as it is."""
    used = {name for out in changed for name in out.inputs}
    plain = [Output(s.name, s.shape, s.dtype, (s.name,)) for s in DictSource(TENSORS).specs() if s.name not in used]
    return [*plain, *changed]


def transposed(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0].t().contiguous()


def beside(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([inputs[0], inputs[1].flip(0)], dim=1)


def plus_one(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0] + 1


def stacked(order: Sequence[str], *shape: int) -> Output:
    return Output("experts", shape, "float32", tuple(order))


FINISHED = ("q0", "q1")
LAYOUTS: dict[str, list[Output]] = {
    "plain": outputs(),
    "permuted": outputs(Output("a", (24, 16), "float32", ("a",), rows=RowMap((2, 0, 1)))),
    "permuted in eights": outputs(Output("a", (24, 16), "float32", ("a",), rows=RowMap((1, 0, 3, 2, 7, 6, 5, 4)))),
    "transposed": outputs(Output("a", (16, 24), "float32", ("a",), transform=Transform(transposed, "tensor", ""))),
    "beside": outputs(Output("ab", (24, 32), "float32", ("b", "a"), transform=Transform(beside, "tensor", ""))),
    "moved": outputs(Output("norm", (16,), "float32", ("norm",), transform=Transform(plus_one, "rows", ""))),
    "stacked": outputs(stacked(EXPERTS, 3, 12, 16)),
    "stacked the other way": outputs(stacked(EXPERTS[::-1], 3, 12, 16)),
    "joined": outputs(stacked(EXPERTS, 36, 16), Output("ab", (48, 16), "float32", ("a", "b"))),
    "twice": outputs(Output("x", (24, 16), "float32", ("a",)), Output("y", (24, 16), "float32", ("a",))),
    "flat": outputs(Output("conv", (72, 8), "float32", ("conv",))),
    "finished": outputs(Output("q", (2, 12, 16), "float32", FINISHED)),
}
SCHEMES = [
    None,
    Tiny(8),
    Tiny(4, 8),
    Tiny(8, -1),
    Tiny(4, 8, "zero_point"),
    Tiny(4, 8, "nested"),
    Tiny(4, 8, whole=True),
]

Choice = tuple[str, Tiny | None]


def plan_of(source: DictSource, choice: Choice) -> Plan:
    layout, scheme = choice
    lifted = {"q": Tiny(4, 8).encoding(3)} if layout == "finished" else {}
    exporter = RawExporter(LAYOUTS[layout], lifted)
    exporter.sparing = True
    chosen = ("a", "b", *EXPERTS, "conv")
    return make_plan(source, exporter, dict.fromkeys(chosen, scheme) if scheme else {})


def wants_first_pass(choice: Choice) -> bool:
    return choice[1] is not None and (choice[1].group < 0 or choice[1].kind == "nested")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choices=st.lists(st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(SCHEMES)), min_size=1, max_size=3),
    threads=st.integers(1, 4),
    chunk=st.integers(1, 700),
)
@example([("beside", None)], 1, 1)
@example([("plain", None), ("transposed", SCHEMES[2])], 3, 40)
@example([("stacked", SCHEMES[3]), ("plain", SCHEMES[2]), ("stacked the other way", None)], 2, 60)
@example([("joined", SCHEMES[5]), ("beside", SCHEMES[1]), ("permuted", SCHEMES[3])], 4, 30)
def test_every_row_is_read_once_and_the_bytes_are_those_of_separate_runs(
    tmp_path: Path, choices: list[Choice], threads: int, chunk: int
) -> None:
    source = DictSource(TENSORS)
    plans = [plan_of(source, choice) for choice in choices]
    alone = []
    for plan in plans:
        write(plan, source, tmp_path / "alone", RunOptions(force=True))
        alone.append((tmp_path / "alone").read_bytes())
    source.reads.clear()
    paths = [tmp_path / str(number) for number in range(len(plans))]
    reports = write_all(
        list(zip(plans, paths, strict=True)), source, RunOptions(threads=threads, chunk_elements=chunk, force=True)
    )
    assert [path.read_bytes() for path in paths] == alone
    assert [report.destination for report in reports] == paths
    assert [[t.name for t in r.tensors] for r in reports] == [[s.placed.output.name for s in p.steps] for p in plans]
    seen = Counter((name, row) for name, rows in source.reads for row in rows)
    wanted = {
        (spec.name, row) for spec in source.specs() for row in range(spec.numel // max(1, (spec.shape or (1,))[-1]))
    }
    assert set(seen) == wanted
    assert max(seen.values()) <= 1 + any(map(wants_first_pass, choices))


def test_shared_chunks_are_multiples_of_what_every_output_asks_for() -> None:
    source = DictSource({"a": TENSORS["a"]})
    plans = [
        make_plan(source, RawExporter([Output("a", (24, 16), "float32", ("a",), rows=RowMap(order))]))
        for order in ((2, 0, 1), (1, 0))
    ]
    steps = [plan.steps[0] for plan in plans]
    tasks = schedule(steps, 16)
    assert [task.outputs for task in tasks] == [((0, r), (1, r)) for r in (range(i, i + 6) for i in range(0, 24, 6))]
    assert sum(task.nbytes for task in tasks) == 24 * 16 * 4


def test_one_progress_and_a_report_for_each(tmp_path: Path) -> None:
    source = DictSource(TENSORS)
    plans = [plan_of(source, ("plain", Tiny(8))), plan_of(source, ("stacked", Tiny(4, 8)))]
    seen: list[Progress] = []
    reports = write_all([(plans[0], tmp_path / "a"), (plans[1], tmp_path / "b")], source, progress=seen.append)
    total = sum(spec.nbytes for spec in source.specs())
    assert {(p.stage, p.total_bytes) for p in seen} == {("write", total), ("sync", total), ("done", total)}
    assert max(p.done_bytes for p in seen if p.stage == "write") == total
    alone = [write(plan, source, tmp_path / f"{i}") for i, plan in enumerate(plans)]
    for together, apart, plan in zip(reports, alone, plans, strict=True):
        assert together.files == apart.files
        assert together.tensors == apart.tensors
        assert together.nbytes == plan.bytes_after
        assert together.predicted_bytes == working_bytes(plans, together.threads)


def test_what_waits_for_parts_of_others_is_read_once_as_well(tmp_path: Path) -> None:
    def steps(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.round(inputs[0] / (0.5 * inputs[1].reshape(-1)))

    source = DictSource({"bias": weights(24), "w": weights(24, 16, seed=1)})
    waits = Transform(steps, "tensor", "in steps of the weight's", of=(("w", "w.scale"),))
    exporter = RawExporter(
        [Output("bias", (24,), "float32", ("bias",), transform=waits), Output("w", (24, 16), "float32", ("w",))]
    )
    plans = [make_plan(source, RawExporter()), make_plan(source, exporter, {"w": Tiny(8)})]
    options = RunOptions(threads=2, chunk_elements=40)
    write(plans[1], source, tmp_path / "alone", options)
    source.reads.clear()
    write_all([(plan, tmp_path / str(i)) for i, plan in enumerate(plans)], source, options)
    assert Counter((name, row) for name, rows in source.reads for row in rows) == Counter(
        [("bias", 0), *(("w", row) for row in range(24))]
    )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "alone").read_bytes()
    both = [steps for plan in plans for steps in plan.steps]
    assert [task.late for task in schedule(both, 40)] == [False] * 12 + [True]


def test_a_first_pass_for_several_reads_once(tmp_path: Path) -> None:
    source = DictSource({"a": TENSORS["a"]})
    plans = [make_plan(source, RawExporter(), {"a": Tiny(bits, -1)}) for bits in (8, 4)]
    options = RunOptions(chunk_elements=64)
    write_all([(plan, tmp_path / str(i)) for i, plan in enumerate(plans)], source, options)
    assert Counter(row for _, rows in source.reads for row in rows) == dict.fromkeys(range(24), 2)


def fails(q: Any, context: Any) -> Any:
    raise QuantizationError(f"{context.spec.name}: no")


def shrinks(source: DictSource) -> None:
    source.fail_after = 5


def two(folder: Path, second: Tiny, source: DictSource) -> Callable[[], Any]:
    plans = [make_plan(source, RawExporter(), {"a": scheme}) for scheme in (Tiny(8), second)]
    jobs = [(plans[0], folder / "first"), (plans[1], folder / "second")]
    return lambda: write_all(jobs, source, RunOptions(threads=2, chunk_elements=64, force=True))


@pytest.mark.parametrize("what", ["scheme", "source", "space"])
def test_if_one_output_fails_none_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    source = DictSource(TENSORS)
    (tmp_path / "first").write_text("old")
    run = two(tmp_path, Tiny(8, spoil=fails if what == "scheme" else None), source)
    if what == "source":
        shrinks(source)
    if what == "space":  # for the first, and not for both
        first = make_plan(source, RawExporter(), {"a": Tiny(8)}).bytes_after
        usage = iter([first, first // 2])
        monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: type("Usage", (), {"free": next(usage)}))
    with pytest.raises(MonoquantError):
        run()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"first": b"old"}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("x", "x"), "x: two outputs of this run have this name"),
        (("x", "y", "./x"), "x: two outputs of this run have this name"),
        (("x", ".x.partial"), ".x.partial: two outputs of this run have this name"),
        (("x", "link/x"), "x: two outputs of this run have this name"),
        (("old", "old/x"), "old/x: one of it and .*old is inside the other"),
    ],
)
def test_outputs_of_one_run_are_apart(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    source = DictSource({"a": TENSORS["a"]})
    (tmp_path / "old").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())
    plan = make_plan(source, RawExporter())
    with pytest.raises(OutputError, match=reason):
        write_all([(plan, Path(f"{tmp_path}/{name}")) for name in names], source, RunOptions(force=True))
    assert source.reads == []
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_is_there_or_in_use_stops_all(tmp_path: Path) -> None:
    source = DictSource({"a": TENSORS["a"]})
    plan = make_plan(source, RawExporter())
    jobs = [(plan, tmp_path / "first"), (plan, tmp_path / "second")]
    (tmp_path / "second").write_text("mine")
    with pytest.raises(OutputError, match="second: already exists"):
        write_all(jobs, source)
    (tmp_path / "second").unlink()
    with (
        commit.Destination(tmp_path / "second", plan.files),
        pytest.raises(OutputError, match="second: in use by another run"),
    ):
        write_all(jobs, source)
    assert list(tmp_path.iterdir()) == []
    assert source.reads == []


def test_everything_is_on_the_disk_before_the_first_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DictSource(TENSORS)
    folder = RawExporter()
    folder.folder = True
    plans = [make_plan(source, RawExporter()), make_plan(source, folder), make_plan(source, RawExporter())]
    calls: list[str] = []

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in ("fsync", "replace", "rename"):
                return real
            return lambda *args: (calls.append(name), real(*args))[1]

    monkeypatch.setattr(commit, "os", Recorded())
    write_all([(plan, tmp_path / str(i)) for i, plan in enumerate(plans)], source)
    names = [call for call in calls if call != "fsync"]
    first = calls.index(names[0])
    assert names == ["replace", "rename", "replace"]
    assert calls[:first].count("fsync") == 1 + 3 + 1 + 1  # files, and the folder of the second
    assert calls[first:].count("fsync") == 3  # the folder that holds the names, after each


def test_a_disk_that_fails_at_the_last_flush_leaves_every_name_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DictSource({"a": TENSORS["a"]})
    run = two(tmp_path, Tiny(8), source)
    synced: list[int] = []

    def fsync(fd: int) -> None:
        synced.append(fd)
        if len(synced) == 2:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(commit.os, "fsync", fsync)
    with pytest.raises(OutputError, match="second: cannot be written"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile_stops_all(tmp_path: Path) -> None:
    source = DictSource({"a": TENSORS["a"]})
    plan = make_plan(source, RawExporter())

    def take(progress: Progress) -> None:
        if progress.stage == "sync":
            (tmp_path / "second").write_text("mine")

    with pytest.raises(OutputError, match="second: already exists"):
        write_all([(plan, tmp_path / "first"), (plan, tmp_path / "second")], source, progress=take)
    assert [p.name for p in tmp_path.iterdir()] == ["second"]


def test_a_source_that_fails_names_the_tensor(tmp_path: Path) -> None:
    source = DictSource(TENSORS)
    shrinks(source)
    with pytest.raises(SourceError, match=r"model\.raw: \w+: the file shrank"):
        two(tmp_path, Tiny(4, 8), source)()


KILLS = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_engine_faults import KILLS
exec(KILLS[:KILLS.index("cases = ")].partition("def run(")[0])
from monoquant_core.engine import write_all

def run(seed, base, dying=None):
    source = model(seed)
    plans = [plan_for(source, False), plan_for(source, True)]
    pid = os.fork()
    if pid == 0:
        if dying:
            commit.os = Dying(dying)
        jobs = [(plans[0], base / "file"), (plans[1], base / "folder")]
        write_all(jobs, source, RunOptions(threads=2, chunk_elements=2048, force=True))
        os._exit(0)
    return pid

def found(base):
    return [content(base / "file"), content(base / "folder")]

base = Path(sys.argv[2])
known = []
for seed in (0, 1):
    began = time.perf_counter()
    os.waitpid(run(seed, base), 0)
    duration = time.perf_counter() - began
    known.append(found(base))
rng, seen, turn = random.Random(3), [], 0
for number in range(1, 300):
    pid = run(turn, base, number if number > 8 else None)
    if number <= 8:
        time.sleep(rng.random() * duration * 1.2)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    now = found(base)
    for i in (0, 1):
        assert now[i] in (known[0][i], known[1][i]), f"a mixture after {number}"
    new = [now[i] == known[turn][i] for i in (0, 1)]
    seen.append(new)
    if new == [True, True]:
        turn = 1 - turn
    elif any(new):  # the next run makes both new
        os.waitpid(run(turn, base), 0)
        assert found(base) == known[turn]
        turn = 1 - turn
    if number > 8 and os.WIFEXITED(status):
        break
assert sorted(p.name for p in base.iterdir()) == ["file", "folder"]
print(json.dumps(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_leaves_every_output_old_or_new(tmp_path: Path) -> None:
    """At random moments, then at every call that changes something."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(HERE), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen[8] == [False, False]
    assert seen[-1] == [True, True]
    assert [False, True] not in seen  # names are given in order
    assert [True, False] in seen[8:]  # only between the two renames, which nothing can join


def test_memory_for_several_outputs_is_predicted(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from engine_kit import DictSource, RawExporter, Tiny, make_plan
from monoquant_core.engine import RunOptions, write_all
from monoquant_core.model import TensorSpec

SHAPE = (2048, 2048)
class Holes(DictSource):
    def specs(self): return [TensorSpec(f"w{i}", SHAPE, "bfloat16") for i in range(3)]
    def read(self, name, rows, scratch=None):
        return scratch.take("source", (len(rows), SHAPE[1]), torch.bfloat16).fill_(0.5)

source = Holes({})
source._ties = {}
plans = [make_plan(source, RawExporter(), {f"w{i}": Tiny(*how) for i in range(3)}) for how in ((8,), (4, 32))]
out = Path(sys.argv[2])
write_all([(p, out / f"warm{i}") for i, p in enumerate(plans)], source, RunOptions(threads=1, chunk_elements=65536))
report, _ = write_all([(p, out / f"out{i}") for i, p in enumerate(plans)], source, RunOptions(threads=2))
print(report.peak_bytes - report.start_bytes, report.predicted_bytes)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(HERE), str(tmp_path)], capture_output=True, text=True, check=True
    )
    used, predicted = map(int, out.stdout.split())
    assert used <= predicted < 100_000_000

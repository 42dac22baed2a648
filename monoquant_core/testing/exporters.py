"""What every exporter must do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monoquant_core.declarations import ExporterDeclaration
from monoquant_core.encoding import INT8, ActivationQuant, Encoding
from monoquant_core.errors import PlanError, UnsupportedEncodingError
from monoquant_core.exporters import Drop, Exporter, Held, Holds, Output, Refuses, Repacks
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planner import make_plan
from monoquant_core.planning import Plan
from monoquant_core.plugins import Registry, load_registry
from monoquant_core.recipe import Recipe
from monoquant_core.rows import all_rows, chunks, quantum, row_count, row_length
from monoquant_core.schemes import Proposal
from monoquant_core.tensor import QuantizedTensor, dtype_name, same_bits
from monoquant_core.testing.checks import assert_fingerprint, assert_satisfies
from monoquant_core.testing.samples import (
    NAME,
    InjectedError,
    MemorySource,
    ShapeSample,
    fitting,
    normal,
    quantized,
    take_rows,
)

Tensors = dict[str, QuantizedTensor | torch.Tensor]

ACTIVATIONS = (
    None,
    ActivationQuant(INT8, "token", dynamic=True),
    ActivationQuant(INT8, "tensor", dynamic=False, low=-1.0, high=2.0),
    ActivationQuant(INT8, "group", dynamic=True, group_size=32),
)


class ExporterConformance:
    """Subclass it and give a fixture ``exporter``; give ``read_back`` with the format's reference reader.

    An exporter of graphs has a method ``sample_graph(specs)`` for the kit: a graph of its kind with these tensors.

    ::

        class TestGguf(ExporterConformance):
            suffix = ".gguf"

            @pytest.fixture
            def exporter(self):
                return GgufExporter(GgufOptions())

            def read_back(self, path):
                return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    """

    #: of a destination; "" for formats that write a folder
    suffix = ""
    #: name of the one tensor of most samples; a format that knows architectures may want another
    name = NAME
    #: names of a model of several tensors, ``{}`` being a number
    names = "model.layers.{}.mlp.up_proj.weight"
    #: float dtypes that the format keeps bit for bit
    floats: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    #: shapes to try every encoding on
    shapes: tuple[ShapeSample, ...] = (
        ShapeSample("matrix", (48, 256), "linear", "Linear"),
        ShapeSample("awkward matrix", (13, 160), "linear", "Linear"),
        ShapeSample("experts", (3, 16, 128), "experts"),
        ShapeSample("convolution", (16, 8, 3, 3), "conv", "Conv2d"),
    )

    @pytest.fixture
    def exporter(self) -> Exporter:
        """The format with its options bound."""
        raise NotImplementedError("give your class a fixture 'exporter'")

    @pytest.fixture
    def info(self) -> ModelInfo:
        """What the source carries beside tensors; a format that needs a config or a tokenizer wants another."""
        return ModelInfo("sample")

    def read_back(self, path: Path) -> Mapping[str, torch.Tensor]:
        """The file's tensors as floats, by the file's names; by default as monoquant itself reads them."""
        from monoquant_core.sources import open_source

        source = open_source(path, load_registry())
        try:
            read = {s.name: source.read(s.name, all_rows(s.shape)) for s in source.specs()}
            return {n: t.dequantize() if isinstance(t, QuantizedTensor) else t.clone() for n, t in read.items()}
        finally:
            source.close()

    def refusal(self, exporter: Exporter, info: ModelInfo) -> str:
        """Why the format does not take models like this one; "" if it does."""
        try:
            _resolve(exporter, [replace(self.shapes[0].spec(), name=self.name)], info)
        except PlanError as exc:
            return str(exc)
        return ""

    def test_satisfies_the_protocol(self, exporter: Exporter) -> None:
        """Every method is there."""
        assert_satisfies(exporter, Exporter)

    def test_fingerprint_stays_the_same(self, exporter: Exporter, info: ModelInfo) -> None:
        """Where there is one: a later run with the same one goes on with what an interrupted run made."""
        assert_fingerprint(exporter)
        specs = MemorySource(self._model(exporter, info), info).specs()
        resolved = _resolve(exporter, specs, info)
        assert_fingerprint(resolved, lambda: list(resolved.outputs(specs, info)))

    def test_accounts_for_every_tensor(self, exporter: Exporter, info: ModelInfo) -> None:
        """Each is the input of an output, or dropped with a reason; names are unique; twice the same."""
        tensors = self._model(exporter, info)
        specs = MemorySource(tensors, info).specs()
        resolved = _resolve(exporter, specs, info)
        outputs = list(resolved.outputs(specs, info))
        assert outputs == list(resolved.outputs(specs, info)), "other outputs the second time"
        used = {name for o in outputs if isinstance(o, Output) for name in o.inputs}
        dropped = {o.name: o.reason for o in outputs if isinstance(o, Drop)}
        assert all(dropped.values()), f"dropped without a reason: {dropped}"
        assert used | set(dropped) == {s.name for s in specs}, "tensors that no output takes and none drops"
        names = [o.name for o in outputs if isinstance(o, Output)]
        assert len(set(names)) == len(names), "two outputs of one name"

    def test_verdict_answers_for_everything(self, exporter: Exporter, info: ModelInfo) -> None:
        """Holds, Repacks, or Refuses with a reason, for every encoding, activation and layout: never an exception."""
        for case in self._cases(exporter, info):
            for activation in ACTIVATIONS:
                for layout in (None, "no such layout"):
                    proposal = Proposal(case.encoding, activation, layout)
                    answer = case.exporter.verdict(case.out, proposal)
                    assert isinstance(answer, Holds | Repacks | Refuses), f"{case.label}: {answer!r}"
                    assert answer == case.exporter.verdict(case.out, proposal), f"{case.label}: another the second time"
                    if isinstance(answer, Refuses):
                        assert answer.reason.strip(), f"{case.label}: refused without a reason"
                    else:
                        assert answer.layout, f"{case.label}: a layout has a name"
                        assert answer.encoding is not None, f"{case.label}: holds an encoding as floats"

    def test_holds_is_what_was_proposed(self, exporter: Exporter, info: ModelInfo) -> None:
        """Holds changes nothing; Repacks changes parameters and never what a code means."""
        for case, held in self._held(exporter, info):
            if isinstance(held, Holds):
                assert held.encoding == case.encoding, f"{case.label}: holds {held.encoding}"
            else:
                assert held.encoding != case.encoding, f"{case.label}: repacks to the same"

    def test_instead_is_held(self, exporter: Exporter, info: ModelInfo) -> None:
        """What a refusal offers in place is not refused itself."""
        for case in self._cases(exporter, info):
            for activation in ACTIVATIONS:
                answer = case.exporter.verdict(case.out, Proposal(case.encoding, activation))
                if isinstance(answer, Refuses) and answer.instead is not None:
                    offered = answer.instead.encoding
                    proposal = answer.instead if isinstance(offered, Encoding) else None
                    again = case.exporter.verdict(case.out, proposal)
                    assert not isinstance(again, Refuses), f"{case.label}: offers {offered}, then refuses it: {again}"

    def test_parts_hold_what_pack_gives(self, exporter: Exporter, info: ModelInfo) -> None:
        """Chunk by chunk: the declared names, dtypes and bytes, contiguous; ``unpack`` gives the chunk back."""
        for case, held in self._held(exporter, info):
            tensor = _as_held(case, held)
            parts = list(case.exporter.parts(case.out, held))
            assert parts == list(case.exporter.parts(case.out, held)), f"{case.label}: other parts the second time"
            assert len({p.name for p in parts}) == len(parts), f"{case.label}: two parts of one name"
            step = quantum(case.out.shape, tensor.encoding, tensor_wide=True)
            step = math.lcm(step, *(p.rows for p in parts if p.per == "rows"))
            shared: dict[str, torch.Tensor] = {}
            for rows in chunks(case.out.shape, step, 4 * row_length(case.out.shape)):
                chunk = take_rows(tensor, rows)
                assert isinstance(chunk, QuantizedTensor)
                packed = dict(case.exporter.pack(chunk, case.out, held, rows.start))
                shared.update({p.name: packed[p.name] for p in parts if p.per == "tensor" and p.name in packed})
                where = f"{case.label}, rows {rows.start}:{rows.stop}"
                for part in parts:
                    if part.per == "tensor" and part.name not in packed:
                        assert rows.start > 0, f"{where}: the first chunk brings {part.name}"
                        continue
                    data = packed[part.name]
                    assert dtype_name(data.dtype) == part.dtype, f"{where}: {part.name} is {data.dtype}"
                    assert data.is_contiguous(), f"{where}: {part.name} is not contiguous"
                    size = part.span(row_count(case.out.shape), rows)[1]
                    given = data.numel() * data.element_size()
                    assert given == size, f"{where}: {part.name} has {given} bytes, its place {size}"
                assert set(packed) <= {p.name for p in parts}, f"{where}: parts that were not declared"
                back = case.exporter.unpack({**packed, **shared}, case.out, held, rows.start)
                assert isinstance(back, QuantizedTensor), f"{where}: unpacks to floats"
                assert back.equal(chunk), f"{where}: unpacks to something else"

    def test_files_place_every_part_once(self, exporter: Exporter, info: ModelInfo) -> None:
        """At offsets that neither overlap nor touch the prefix, of the size the part has; twice the same."""
        plan = self._plan(exporter, MemorySource(self._model(exporter, info), info))
        expected = {(s.placed.output.name, p.name): p.nbytes for s in plan.steps for p in s.placed.parts}
        found: dict[tuple[str, str], int] = {}
        for file in plan.files:
            end = len(file.prefix)
            for at in sorted(file.parts, key=lambda p: p.offset):
                assert at.offset >= end, f"{file.path}: {at.part} overlaps what is before it"
                assert (at.output, at.part) not in found, f"{at.part} is stored twice"
                found[at.output, at.part] = at.nbytes
                end = at.offset + at.nbytes
        assert found == expected
        assert len({f.path for f in plan.files}) == len(plan.files), "two files of one name"
        again = self._plan(exporter, MemorySource(self._model(exporter, info), info))
        assert again.files == plan.files, "other files the second time"

    def test_holds_means_it(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """Written and read back: bit for bit what the IR dequantizes to."""
        written = 0
        for i, (case, held) in enumerate(self._held(exporter, info)):
            if isinstance(held, Repacks) and not held.exact:
                continue
            path = self._write(exporter, case.source(info), tmp_path / f"case{i}{self.suffix}")
            found = self.read_back(path)[case.out.name]
            expected = case.tensor.dequantize()
            assert tuple(found.shape) == case.out.shape, f"{case.label}: shape {tuple(found.shape)}"
            assert torch.equal(found.float(), expected), f"{case.label}: reads back as something else"
            written += 1
        assert written, "holds none of the sample encodings"

    def test_refuses_means_it(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """A plan with a refused tensor raises UnsupportedEncodingError that names it, and no file appears."""
        for case in self._cases(exporter, info):
            answer = case.exporter.verdict(case.out, Proposal(case.encoding))
            if isinstance(answer, Refuses):
                with pytest.raises(UnsupportedEncodingError) as caught:
                    self._write(exporter, case.source(info), tmp_path / f"refused{self.suffix}")
                assert case.name in str(caught.value), f"{case.label}: {caught.value} does not name the tensor"
                assert not list(tmp_path.iterdir()), f"{case.label}: left {list(tmp_path.iterdir())}"

    def test_floats_are_kept_bit_for_bit(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """What is not quantized is not changed."""
        for dtype in self.floats:
            values = normal((24, 64)).to(dtype)
            values[0, :3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).max]).to(dtype)
            source = MemorySource({self.name: values}, info)
            path = self._write(exporter, source, tmp_path / f"{dtype_name(dtype)}{self.suffix}")
            found = self.read_back(path)
            (name,) = (o.name for o in self._outputs(exporter, source, info) if self.name in o.inputs)
            assert found[name].dtype == dtype, f"{dtype} became {found[name].dtype}"
            assert same_bits(found[name], values), f"{dtype}: other values"

    def test_reads_every_row_once(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """A pass over the source reads each row of it once, in chunks."""
        source = MemorySource(self._model(exporter, info), info)
        self._write(exporter, source, tmp_path / f"out{self.suffix}", chunk_elements=512)
        for spec in source.specs():
            assert source.times_read(spec.name) == 1, f"{spec.name}: read more than once"

    def test_bytes_are_the_same(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """Twice, and for any number of threads and any chunk size; the sizes are those of the plan."""
        model = self._model(exporter, info)
        seen = []
        for i, (threads, elements) in enumerate(((1, 1 << 18), (1, 1 << 18), (4, 1 << 18), (1, 1), (3, 700))):
            folder = tmp_path / str(i)
            folder.mkdir()
            self._write(
                exporter,
                MemorySource(model, info),
                folder / f"out{self.suffix}",
                threads=threads,
                chunk_elements=elements,
            )
            seen.append(_digests(folder))
        assert all(digests == seen[0] for digests in seen[1:]), "bytes depend on threads or chunks"
        plan = self._plan(exporter, MemorySource(model, info), f"out{self.suffix}")
        assert sum(size for _, size in seen[0].values()) == plan.bytes_after, "another size than the plan's"

    def test_failure_leaves_nothing(self, exporter: Exporter, info: ModelInfo, tmp_path: Path) -> None:
        """A read that fails in the middle leaves no file, and an old output unchanged."""
        model = self._model(exporter, info)
        whole = MemorySource(model, info)
        old = self._write(exporter, whole, tmp_path / f"out{self.suffix}", chunk_elements=512)
        before = _digests(tmp_path)
        for fail_after in (0, len(whole.reads) // 2, len(whole.reads) - 1):
            for path, force in ((tmp_path / f"new{self.suffix}", False), (old, True)):
                failing = MemorySource(model, info, fail_after=fail_after)
                with pytest.raises(InjectedError):
                    self._write(exporter, failing, path, chunk_elements=512, force=force)
                assert _digests(tmp_path) == before, f"after {fail_after} reads: something was left or changed"

    def _write(
        self, exporter: Exporter, source: MemorySource, path: Path, *, force: bool = False, **options: Any
    ) -> Path:
        from monoquant_core.engine import RunOptions, write

        options = {"threads": 1, **options}
        write(self._plan(exporter, source, path.name), source, path, RunOptions(force=force, **options))
        return path

    def _plan(self, exporter: Exporter, source: MemorySource, destination: str = "out") -> Plan:
        source.info = _with_graph(exporter, source.specs(), source.info)
        registry = Registry()
        registry.exporters["given"] = _Given("given", "The exporter under test.", "given:Exporter", exporter=exporter)
        return make_plan(
            source,
            registry=registry,
            recipe=Recipe(base="none"),
            format="given",
            destination=destination,
            quantizing=False,
        )

    def _outputs(self, exporter: Exporter, source: MemorySource, info: ModelInfo) -> list[Output]:
        specs = source.specs()
        found = _resolve(exporter, specs, info).outputs(specs, info)
        return [o for o in found if isinstance(o, Output)]

    def _cases(self, exporter: Exporter, info: ModelInfo) -> Iterator[_Case]:
        """One tensor of every encoding and shape, with the output that the format makes of it."""
        for sample in self.shapes:
            for label, encoding in fitting(sample.shape):
                spec = replace(sample.spec(), name=self.name, encoding=encoding)
                resolved = _resolve(exporter, [spec], info)
                outputs = resolved.outputs([spec], info)
                out = next((o for o in outputs if isinstance(o, Output) and self.name in o.inputs), None)
                if out is not None and out.shape == sample.shape and out.rows is None and out.transform is None:
                    tensor = quantized(encoding, sample.shape)
                    yield _Case(f"{label}, {sample.name}", self.name, spec, encoding, tensor, out, resolved)

    def _held(self, exporter: Exporter, info: ModelInfo) -> Iterator[tuple[_Case, Held]]:
        for case in self._cases(exporter, info):
            answer = case.exporter.verdict(case.out, Proposal(case.encoding))
            if not isinstance(answer, Refuses):
                yield case, answer

    def _model(self, exporter: Exporter, info: ModelInfo) -> Tensors:
        """A model of several floats, and of as many quantized tensors as the format holds together."""
        tensors: Tensors = {self.names.format(i): normal((32, 96), i).to(d) for i, d in enumerate(self.floats)}
        for _, encoding in fitting((48, 256)):
            name = self.names.format(len(tensors))
            tensor = quantized(encoding, (48, 256), len(tensors))
            more = {**tensors, name: tensor}
            try:
                self._plan(exporter, MemorySource(more, info))
            except PlanError:
                continue
            tensors = more
        return tensors


@dataclass(frozen=True)
class _Case:
    """One quantized tensor and what a format makes of it."""

    label: str
    name: str
    spec: TensorSpec
    encoding: Encoding
    tensor: QuantizedTensor
    out: Output
    exporter: Exporter

    def source(self, info: ModelInfo) -> MemorySource:
        """A model of this one tensor."""
        return MemorySource({self.name: self.tensor}, info, specs=[self.spec])


@dataclass(frozen=True, slots=True)
class _Given(ExporterDeclaration):
    """A declaration of an exporter that exists already."""

    exporter: Any = None

    def load(self) -> Any:
        return lambda _: self.exporter


def _resolve(exporter: Exporter, specs: Any, info: ModelInfo) -> Exporter:
    resolve = getattr(exporter, "resolve", None)
    return resolve(specs, _with_graph(exporter, specs, info)) if resolve is not None else exporter


def _with_graph(exporter: Exporter, specs: Any, info: ModelInfo) -> ModelInfo:
    """The model with a graph, if the format needs one and makes samples of it."""
    make = getattr(exporter, "sample_graph", None)
    return replace(info, graph=make(specs)) if make is not None and info.graph is None else info


def _as_held(case: _Case, held: Held) -> QuantizedTensor:
    """The tensor in the encoding that the format stores."""
    assert held.encoding is not None
    if held.encoding == case.encoding:
        return case.tensor
    from monoquant_core.reencode import reencode

    return reencode(case.tensor, held.encoding)


def _digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Content of every file below a folder, hidden ones included."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }

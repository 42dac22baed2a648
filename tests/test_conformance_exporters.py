"""ExporterConformance passes a format that keeps the contract, and finds one that breaks it."""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monoquant_core.encoding import Encoding
from monoquant_core.exporters import (
    Drop,
    FileLayout,
    FilePlan,
    Held,
    Holds,
    Output,
    Part,
    PartAt,
    Refuses,
    Repacks,
    Transform,
    Verdict,
)
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.rows import block_rows, row_count
from monoquant_core.schemes import Proposal
from monoquant_core.tensor import QuantizedTensor, dtype_of
from monoquant_core.testing import ExporterConformance


class Plain:
    """A header in JSON, then codes and parameters as they are: the smallest format that keeps every promise.

    It holds plain parameters (no nesting), as float32 where they are floats; blocks have the tensor's own rank.
    """

    def fingerprint(self) -> Any:
        return ""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        return [Output(s.name, s.shape, s.dtype, (s.name,)) for s in specs]

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        if proposal is None:
            return Holds("floats", None)
        encoding = proposal.encoding
        assert isinstance(encoding, Encoding)
        if proposal.activation is not None:
            return Refuses(
                "weights only", instead=replace(proposal, activation=None, encoding=Encoding(*self.plainest(out)))
            )
        if len(encoding.block) != len(out.shape):
            return Refuses("blocks have the tensor's rank", hint="--keep")
        if any(isinstance(p, Encoding) for _, p in encoding.params()):
            return Refuses("no nesting")
        wide = {label: "float32" if isinstance(p, str) else p for label, p in encoding.params()}
        stored = replace(encoding, **wide)  # type: ignore[arg-type]
        return Holds("plain", encoding) if stored == encoding else Repacks("plain", stored, exact=True)

    def plainest(self, out: Output) -> tuple[Any, ...]:
        from monoquant_core.encoding import INT8, per_tensor

        return INT8, per_tensor(max(1, len(out.shape))), "float32"

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        from monoquant_core.encoding import param_shape

        element = held.encoding.element
        dtype = "int8" if element.kind == "int" and element.signed else "uint8"
        rows = block_rows(out.shape, held.encoding.block)
        grid = param_shape(out.shape, held.encoding.block)
        whole = rows >= row_count(out.shape)
        kinds = {label: "float32" if isinstance(p, str) else "uint8" for label, p in held.encoding.params()}
        return [Part(f"{out.name}.codes", dtype, out.shape)] + [
            Part(f"{out.name}.{label}", kind, grid, "tensor")
            if whole
            else Part(f"{out.name}.{label}", kind, grid, rows=rows)
            for label, kind in kinds.items()
        ]

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        if isinstance(rows, torch.Tensor):
            return {out.name: rows.contiguous()}
        params = {f"{out.name}.{label}": value.contiguous() for label, value in rows.params().items()}  # type: ignore[union-attr]
        return {f"{out.name}.codes": rows.codes.contiguous(), **params}

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        if held.encoding is None:
            return parts[out.name]
        params = {label: parts[f"{out.name}.{label}"] for label, _ in held.encoding.params()}
        return QuantizedTensor(held.encoding, parts[f"{out.name}.codes"], **params)

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        entries: dict[str, Any] = {}
        places, offset = [], 0
        for placed in layout.outputs:
            encoding = placed.held.encoding
            for part in placed.parts:
                entries[part.name] = [part.dtype, part.shape, offset]
                places.append((placed.output.name, part, offset))
                offset += part.nbytes
            entries[placed.output.name] = entries.get(placed.output.name) or (encoding and encoding.to_dict())
        header = json.dumps(entries, sort_keys=True).encode()
        start = 8 + len(header)
        parts = tuple(PartAt(name, part.name, start + at, part.nbytes) for name, part, at in places)
        return [FilePlan("", struct.pack("<Q", len(header)) + header, parts)]


class TestPlain(ExporterConformance):
    """The kit as a plugin uses it, with a reader that knows the file and nothing of the core's engine."""

    suffix = ".plain"

    @pytest.fixture
    def exporter(self) -> Plain:
        return Plain()

    def read_back(self, path: Path) -> Mapping[str, torch.Tensor]:
        return read_plain(path)


def read_plain(path: Path) -> dict[str, torch.Tensor]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + size])

    def array(name: str) -> torch.Tensor:
        dtype, shape, offset = entries[name]
        count = int(torch.tensor(shape).prod()) if shape else 1
        return torch.frombuffer(bytearray(raw), dtype=dtype_of(dtype), count=count, offset=8 + size + offset).reshape(
            shape
        )

    found = {}
    for name, entry in entries.items():
        if isinstance(entry, dict):
            encoding = Encoding.from_dict(entry)
            params = {label: array(f"{name}.{label}") for label, _ in encoding.params()}
            found[name] = QuantizedTensor(encoding, array(f"{name}.codes"), **params).dequantize()
        elif not name.endswith((".codes", ".scale", ".zero_point", ".offset")):
            found[name] = array(name)
    return found


class NoUnpack(Plain):
    unpack = None  # type: ignore[assignment]


class LosesOne(Plain):
    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        return super().outputs(specs, info)[:-1] if len(specs) > 1 else super().outputs(specs, info)


class DropsSilently(Plain):
    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        made = super().outputs(specs, info)
        return [*made[:-1], Drop(specs[-1].name, "")] if len(specs) > 1 else made


class TwoOfOneName(Plain):
    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        return [Output("same" if len(specs) > 1 else s.name, s.shape, s.dtype, (s.name,)) for s in specs]


class Raises(Plain):
    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        if proposal is not None and isinstance(proposal.encoding, Encoding):
            {"int8": 1}[proposal.encoding.element.name]
        return super().verdict(out, proposal)


class NoReason(Plain):
    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        answer = super().verdict(out, proposal)
        return Refuses(" ") if isinstance(answer, Refuses) else answer


class HoldsAnother(Plain):
    """Says Holds where it repacks."""

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        answer = super().verdict(out, proposal)
        return Holds(answer.layout, answer.encoding) if isinstance(answer, Repacks) else answer


class OffersWhatItRefuses(Plain):
    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        answer = super().verdict(out, proposal)
        return replace(answer, instead=proposal) if isinstance(answer, Refuses) else answer


class PacksAnotherType(Plain):
    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        packed = super().pack(rows, out, held, first_row)
        return {name: t.to(torch.int16) if name.endswith(".codes") else t for name, t in packed.items()}


class PacksStrided(Plain):
    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        packed = super().pack(rows, out, held, first_row)
        return {name: t.transpose(-1, -2).contiguous().transpose(-1, -2) for name, t in packed.items()}


class UnpacksAnother(Plain):
    def unpack(self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int) -> Any:
        back = super().unpack(parts, out, held, first_row)
        return replace(back, codes=back.codes.flip(0)) if isinstance(back, QuantizedTensor) else back


class WrongRows(Plain):
    """Counts a parameter for each row, where a block has several."""

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        return [replace(p, rows=1) for p in super().parts(out, held)]


class Overlaps(Plain):
    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        (file,) = super().files(layout)
        return [replace(file, parts=tuple(replace(p, offset=max(0, p.offset - 4)) for p in file.parts))]


class StoresTwice(Plain):
    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        (file,) = super().files(layout)
        last = file.parts[-1]
        return [replace(file, parts=(*file.parts, replace(last, offset=last.offset + last.nbytes)))]


class Changes(Plain):
    """Writes other codes than it was given, and reads them back right."""

    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        packed = dict(super().pack(rows, out, held, first_row))
        name = f"{out.name}.codes"
        return packed | ({name: packed[name] ^ 1} if name in packed else {})

    def unpack(self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int) -> Any:
        name = f"{out.name}.codes"
        return super().unpack({**parts, **({name: parts[name] ^ 1} if name in parts else {})}, out, held, first_row)


class RoundsFloats(Plain):
    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        packed = super().pack(rows, out, held, first_row)
        return packed if held.encoding is not None else {n: t.bfloat16().to(t.dtype) for n, t in packed.items()}


class Dated(Plain):
    """A header that differs between runs."""

    runs = 0

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        self.runs += 1
        (file,) = super().files(layout)
        return [replace(file, suffix=str(self.runs).encode())]


class Fickle(Plain):
    """Refuses at first, and holds when it is asked again."""

    asked = 0

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        self.asked += 1
        return Refuses("not now") if self.asked == 1 else super().verdict(out, proposal)


class WritesTwice(Plain):
    """Two outputs of one tensor."""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        made = [o for o in super().outputs(specs, info) if isinstance(o, Output)]
        return [*made, *(replace(o, name=f"{o.name}.again") for o in made)]


class ReadsTwice(Plain):
    """An output that waits for a part of another one, which is made of the same tensor."""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        made = [o for o in super().outputs(specs, info) if isinstance(o, Output)]
        plain = {s.name for s in specs if s.encoding is None}
        again = next(o for o in made if o.inputs[0] in plain)
        part = self.parts(again, Holds("", None))[0].name
        waits = Transform(lambda inputs: inputs[0], "tensor", "again", of=((again.name, part),))
        return [*made, replace(again, name=f"{again.name}.again", transform=waits)]


class WritesItself(Plain):
    """Opens files, which are the engine's to open."""

    folder: Path
    packed = 0

    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        self.packed += 1
        (self.folder / "cache").write_text(str(self.packed))
        return super().pack(rows, out, held, first_row)


class SaysNothing(Plain):
    def fingerprint(self) -> Any:
        return None


SABOTAGE: list[tuple[Callable[[], Plain], str, str]] = [
    (SaysNothing, "test_fingerprint_stays_the_same", "None is no text"),
    (NoUnpack, "test_satisfies_the_protocol", "unpack is not a method"),
    (DropsSilently, "test_accounts_for_every_tensor", "dropped without a reason"),
    (LosesOne, "test_accounts_for_every_tensor", "tensors that no output takes"),
    (TwoOfOneName, "test_accounts_for_every_tensor", "two outputs of one name"),
    (Raises, "test_verdict_answers_for_everything", "uint8"),
    (NoReason, "test_verdict_answers_for_everything", "refused without a reason"),
    (HoldsAnother, "test_holds_is_what_was_proposed", "holds int8[1x*]*float32"),
    (OffersWhatItRefuses, "test_instead_is_held", "then refuses it"),
    (PacksAnotherType, "test_parts_hold_what_pack_gives", "codes is torch.int16"),
    (PacksStrided, "test_parts_hold_what_pack_gives", "is not contiguous"),
    (UnpacksAnother, "test_parts_hold_what_pack_gives", "unpacks to something else"),
    (WrongRows, "test_parts_hold_what_pack_gives", "bytes, its place"),
    (Overlaps, "test_files_place_every_part_once", "overlaps what is before it"),
    (StoresTwice, "test_files_place_every_part_once", "is stored twice"),
    (Dated, "test_files_place_every_part_once", "other files the second time"),
    (Changes, "test_holds_means_it", "reads back as something else"),
    (RoundsFloats, "test_floats_are_kept_bit_for_bit", "does not unpack to the same bits"),
    (Fickle, "test_refuses_means_it", "DID NOT RAISE"),
    (ReadsTwice, "test_reads_every_row_once", "read more than once"),
    (Dated, "test_bytes_are_the_same", "bytes depend on threads or chunks"),
    (WritesItself, "test_failure_leaves_nothing", "something was left or changed"),
]


def test_two_outputs_of_one_tensor_read_it_once(tmp_path: Path) -> None:
    TestPlain().test_reads_every_row_once(WritesTwice(), ModelInfo("sample"), tmp_path)


@pytest.mark.parametrize(("broken", "test", "message"), SABOTAGE, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_format_is_found(broken: Callable[[], Plain], test: str, message: str, tmp_path: Path) -> None:
    method, subject = getattr(TestPlain(), test), broken()
    if isinstance(subject, WritesItself):
        subject.folder = tmp_path
    fixtures = {"exporter": subject, "info": ModelInfo("sample"), "tmp_path": tmp_path}
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        method(**{name: fixtures[name] for name in inspect.signature(method).parameters})
    assert message in str(caught.value)


def test_every_check_has_been_seen_to_fail() -> None:
    tests = {name for name in vars(ExporterConformance) if name.startswith("test_")}
    assert {test for _, test, _ in SABOTAGE} == tests

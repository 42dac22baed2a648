"""Where the parts of outputs go, and putting them there: packed, and unpacked again to be compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from monoquant_core.commit import Destination
from monoquant_core.errors import CheckError, PlanError
from monoquant_core.exporters import BytesAt, Exporter, Part, PartAt
from monoquant_core.gather import Rows
from monoquant_core.model import ModelInfo
from monoquant_core.planning import Plan
from monoquant_core.rows import row_count
from monoquant_core.tensor import QuantizedTensor, as_bytes, dtype_of, same_bits
from monoquant_core.work import Work, keep_hint
from monoquant_core.workers import Stopped, Workers


class Place(NamedTuple):
    """Where a part goes."""

    file: int
    offset: int  #: of its first byte
    part: Part
    dtype: torch.dtype
    record: int  #: bytes that ``part.rows`` rows of the output take; of a part per tensor, all of them

    @property
    def per_rows(self) -> bool:
        """Whether every task writes some of it."""
        return self.part.per == "rows"

    def span(self, rows: range) -> tuple[int, int]:
        """As :meth:`Part.span`, which counts everything anew."""
        if self.part.per == "tensor":
            return 0, self.record
        first = rows.start // self.part.rows
        return first * self.record, (-(-rows.stop // self.part.rows) - first) * self.record


class Store:
    """Packs rows, checks that they unpack to what they were, and writes them."""

    def __init__(
        self,
        exporter: Exporter,
        out: Destination,
        places: Mapping[str, Mapping[str, Place]],
        workers: Workers,
        info: ModelInfo,
        wanted: Collection[tuple[str, str]] = (),
    ) -> None:
        self.exporter, self.out, self.places, self.workers, self.info = exporter, out, places, workers, info
        #: parts that other outputs are made of, by the names of output and part
        self.kept = {
            (output, part): torch.empty(place.part.shape, dtype=place.dtype)
            for output, found in places.items()
            for part, place in found.items()
            if (output, part) in wanted
        }

    def files_of(self, output: str) -> list[tuple[Destination, int]]:
        """The files that an output's parts go into, each by its output and its number among the plan's files."""
        return [(self.out, number) for number in sorted({place.file for place in self.places[output].values()})]

    def recall(self, work: Work, device: torch.device) -> None:
        """Take the parts of the whole tensor, which an interrupted run stored, from the file."""
        if work.shared is None:
            return
        places = self.places[work.step.placed.output.name]
        found = {name: self._stored(place) for name, place in places.items() if not place.per_rows}
        work.shared.set_result({name: part.to(device) for name, part in found.items()})

    def recall_kept(self) -> None:
        """Take the parts that other outputs are made of, as far as an interrupted run stored them, from the file."""
        for (output, part), kept in self.kept.items():
            kept.copy_(self._stored(self.places[output][part]))

    def _stored(self, place: Place) -> torch.Tensor:
        """A whole part, as the file has it."""
        data = self.out.read_at(place.file, place.offset, place.part.nbytes)
        flat = torch.frombuffer(data, dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)
        return flat.view(place.part.shape)

    def put(self, work: Work, rows: range, value: Rows) -> None:
        """Store rows of an output.

        :raises CheckError: when they do not unpack to the same bits.
        :raises OutputError: when they cannot be written.
        """
        placed, places = work.step.placed, self.places[work.step.placed.output.name]
        packed = self.exporter.pack(value, placed.output, placed.held, rows.start)
        writes, wrong = list[tuple[str, Place, int]](), packed.keys() - places.keys()
        for name, place in places.items():
            tensor, wanted = packed.get(name), place.per_rows or rows.start == 0
            start, length = place.span(rows)
            if wanted if tensor is None else tensor.dtype != place.dtype or tensor.nbytes != length:
                wrong.add(name)
            elif wanted:
                writes.append((name, place, start))
        if wrong:
            raise CheckError(
                f"{self.info.name}: {work.name}: the format packed {sorted(wrong)} otherwise than it announced: "
                "a bug of the format"
            )
        parts = packed if work.shared is None else {**packed, **self._shared(work, rows, packed)}
        back = self.exporter.unpack(parts, placed.output, placed.held, rows.start)
        if not same_rows(value, back):
            raise CheckError(
                f"{self.info.name}: {work.name}: packed as {placed.held.layout}, it does not unpack to the same bits",
                hint=keep_hint(work),
            )
        for name, place, start in writes:
            data = as_bytes(packed[name].cpu())
            self._write(place.file, place.offset + start, data)
            if self.kept and (kept := self.kept.get((placed.output.name, name))) is not None:
                as_bytes(kept)[start:][: len(data)] = data

    def _shared(self, work: Work, rows: range, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts of the whole tensor as its first rows gave them."""
        assert work.shared is not None
        if rows.start == 0:
            names = [part.name for part in work.step.placed.parts if part.per == "tensor"]
            work.shared.set_result({name: packed[name].clone() for name in names})
        return work.shared.result()

    def _write(self, file: int, offset: int, data: torch.Tensor) -> None:
        memory = data.numpy().data
        if self.workers.stopped.is_set():  # the files may be gone
            raise Stopped
        self.out.write_at(file, offset, memory)


def places_of(plan: Plan) -> dict[str, dict[str, Place]]:
    """Where every part goes; each exactly once, inside its file, beside the others.

    :raises PlanError: a bug of the format.
    """
    parts = {
        (s.placed.output.name, part.name): (part, _record(part, row_count(s.placed.output.shape)))
        for s in plan.steps
        for part in s.placed.parts
    }
    found: dict[str, dict[str, Place]] = {s.placed.output.name: {} for s in plan.steps}
    for number, file in enumerate(plan.files):
        end = len(file.prefix)
        placed: list[PartAt | BytesAt] = [*file.parts, *file.between]
        for at in sorted(placed, key=_span):
            if isinstance(at, BytesAt):
                if at.offset < end:
                    raise PlanError(f"{file.path or plan.format}: bytes at {at.offset} overlap: a bug of the format")
                end = at.offset + len(at.data)
                continue
            known = parts.pop((at.output, at.part), None)
            if known is None or known[0].nbytes != at.nbytes or at.offset < end:
                raise PlanError(f"{file.path or plan.format}: {at.part} is laid out wrongly: a bug of the format")
            end = at.offset + at.nbytes
            found[at.output][at.part] = Place(number, at.offset, known[0], dtype_of(known[0].dtype), known[1])
    if parts:
        raise PlanError(f"{plan.format}: no file has {[part for _, part in parts][:3]}: a bug of the format")
    return found


def _span(at: PartAt | BytesAt) -> tuple[int, int]:
    return at.offset, len(at.data) if isinstance(at, BytesAt) else at.nbytes


def _record(part: Part, rows: int) -> int:
    records = 1 if part.per == "tensor" else max(1, -(-rows // part.rows))
    if part.nbytes % records:
        raise PlanError(f"{part.name}: {part.nbytes} bytes are not {records} records: a bug of the format")
    return part.nbytes // records


def same_rows(a: Rows, b: Rows) -> bool:
    """Whether two chunks have the same bits."""
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equal(b)
    return same_bits(a, b)

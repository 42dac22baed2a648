"""A step of a plan at work: what its tasks share, and the rows that they make, quantized and checked."""

from __future__ import annotations

import cmath
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

import torch

from monoquant_core.check import (
    Mismatch,
    check_params,
    check_quantized,
    first_nonfinite,
    magnitude,
    measure,
    square_sum,
)
from monoquant_core.encoding import Encoding
from monoquant_core.errors import (
    CalibrationError,
    CheckError,
    EncodingError,
    MonoquantError,
    PlanError,
    QuantizationError,
)
from monoquant_core.gather import Reading, Rows, read_rows
from monoquant_core.metrics import Energies, energies
from monoquant_core.model import Source, TensorSpec
from monoquant_core.planning import Step
from monoquant_core.reencode import reencode
from monoquant_core.rows import row_length
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats, column_importance, input_stats
from monoquant_core.tasks import waits_for
from monoquant_core.tensor import QuantizedTensor, dtype_name, dtype_of, same_bits

ALLOW = "--nonfinite allow keeps it as it is"


class Work:
    """A step with what its tasks share."""

    def __init__(self, step: Step, *, whole: bool, stats: Mapping[str, TensorStats], device: torch.device) -> None:
        self.step, self.whole = step, whole
        each = [input_stats(stats, spec.name) for spec in step.specs]
        self.stats = each[0] if each else None
        self.absmax: float | None = None
        # Parts per tensor come with the first task, and the check of every other one needs them.
        per_tensor = any(part.per == "tensor" for part in step.placed.parts)
        self.shared: Future[dict[str, torch.Tensor]] | None = Future() if per_tensor and not whole else None
        proposal = step.placed.proposal
        self.needs: frozenset[str] = proposal.needs if proposal is not None else frozenset()
        self.importance = self._importance(each, device) if step.action == "quantize" else None

    @property
    def name(self) -> str:
        """What the user calls it: the name of its source, if it has just one."""
        return self.step.specs[0].name if len(self.step.specs) == 1 else self.step.placed.output.name

    @functools.cached_property
    def spec(self) -> TensorSpec:
        """The tensor that is quantized, as the scheme saw it in planning."""
        return self.step.spec

    @property
    def wants_absmax(self) -> bool:
        """Whether the scheme must be told the largest magnitude: by a first pass, unless it gets all rows at once."""
        return self.step.action == "quantize" and "absmax" in self.needs

    @property
    def waits_for(self) -> tuple[tuple[str, str], ...]:
        """Parts of other outputs that this one is made of."""
        return waits_for(self.step)

    def receive(self, parts: Mapping[tuple[str, str], torch.Tensor]) -> None:
        """Take the parts that it waited for."""
        placed = self.step.placed
        transform = placed.output.transform
        assert transform is not None
        apply, found = transform.apply, [parts[name] for name in transform.of]
        given = dataclasses.replace(transform, apply=lambda inputs: apply([*inputs, *found]))
        output = dataclasses.replace(placed.output, transform=given)
        self.step = dataclasses.replace(self.step, placed=dataclasses.replace(placed, output=output))

    def tell_others(self, rows: range, failure: BaseException) -> None:
        """Let the tasks that wait for the first one know that it failed."""
        if rows.start == 0 and self.shared is not None and not self.shared.done():
            self.shared.set_exception(failure)

    def _importance(self, each: Sequence[TensorStats | None], device: torch.device) -> torch.Tensor | None:
        """Of the columns of a weight as it lies in the source; of layers that are stacked, each layer's own."""
        members = zip(each, self.step.specs, strict=True)
        found = [column_importance(stats, spec) if stats is not None else None for stats, spec in members]
        known = [importance for importance in found if importance is not None]
        if not known:
            if "importance" in self.needs:
                raise CalibrationError(f"{self.name}: {self.step.scheme} needs the importance of its columns")
            return None
        if len(found) == 1:
            return known[0].to(device)
        # An expert that calibration did not reach has all columns alike.
        return torch.stack([torch.ones_like(known[0]) if i is None else i for i in found]).to(device)


class RowMaker:
    """Reads rows and makes of them what is to be stored."""

    def __init__(self, source: Source, device: torch.device, nonfinite: Literal["refuse", "allow"]) -> None:
        self.source, self.device, self.nonfinite = source, device, nonfinite

    def make(self, work: Work, rows: range, reading: Reading, scratch: Scratch) -> tuple[Rows, Energies]:
        """Rows of an output as they are stored, and how far they are from their source. Checked."""
        try:
            value = read_rows(work.step, reading, rows, scratch)
            # What stays as it is, or is only cast, is not worth the way to an accelerator and back.
            if self.device.type != "cpu" and (isinstance(value, QuantizedTensor) or work.step.action == "quantize"):
                value = value.to(self.device)
            if isinstance(value, QuantizedTensor):
                return self._repacked(value, work)
            if work.step.action == "quantize":
                return self._quantized(value, work, rows, scratch)
            return self._floats(value, work, rows, scratch)
        except QuantizationError as exc:
            if self.source.info.name in str(exc):
                raise
            raise QuantizationError(f"{self.source.info.name}: {exc}", hint=exc.hint) from exc
        except (Mismatch, EncodingError) as exc:
            raise self._named(exc, work, rows) from exc

    def absmax(self, work: Work, rows: range, reading: Reading, scratch: Scratch) -> float:
        """Largest magnitude of rows of an output."""
        try:
            value = read_rows(work.step, reading, rows, scratch)
            assert isinstance(value, torch.Tensor)
            found = magnitude(value, scratch)
            if not math.isfinite(found):
                raise self._refusal(value, first_nonfinite(value), work, rows, ", which no scheme can quantize")
        except EncodingError as exc:
            raise self._named(exc, work, rows) from exc
        return found

    def _quantized(self, value: torch.Tensor, work: Work, rows: range, scratch: Scratch) -> tuple[Rows, Energies]:
        step, proposal, quantizer = work.step, work.step.placed.proposal, work.step.quantizer
        assert proposal is not None
        assert quantizer is not None
        made, held = proposal.encoding, step.placed.held.encoding
        assert isinstance(made, Encoding)
        assert held is not None
        x, stored = value, None
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = scratch.take("engine.float", x.shape, torch.float32, x.device).copy_(x)
            stored = value if value.dtype.itemsize == 2 and value.is_contiguous() else None
        signal = square_sum(x)
        if not math.isfinite(signal):
            raise self._refusal(value, first_nonfinite(x), work, rows, ", which no scheme can quantize")
        if signal == 0 and value.dtype == torch.float64 and value.any():
            raise self._nothing_left(value, x.dtype, work, rows)
        absmax = work.absmax
        if work.wants_absmax and absmax is None:
            absmax = magnitude(value, scratch)
        context = Context(work.spec, rows, scratch, absmax, work.importance, stored=stored)
        if "ranges" in work.needs:
            context.extra = {"stats": work.stats}
        q = quantizer.quantize(x, made, context)
        if q.encoding != made or q.shape != tuple(x.shape):
            raise Mismatch(f"{step.scheme} made {q.shape} of {q.encoding}, and promised {tuple(x.shape)} of {made}")
        if made != held:
            q = reencode(q, held)
        return q, check_quantized(x, q, signal, scratch, nearest=quantizer.nearest, keeps_zero=quantizer.keeps_zero)

    def _repacked(self, value: QuantizedTensor, work: Work) -> tuple[Rows, Energies]:
        held = work.step.placed.held.encoding
        assert held is not None
        if self.nonfinite == "refuse":
            check_params(value)
        made = reencode(value, held)
        if value.encoding == held or not made.codes.numel():
            return made, Energies()
        if not same_bits(made.codes, value.codes):
            raise Mismatch("its codes changed")
        check_params(made)
        before, after = value.dequantize(), made.dequantize()
        if bool(((after == 0) & (before != 0)).any()):
            raise Mismatch(f"parameters of {held} are too narrow: values became zero")
        return made, measure(before, after)

    def _floats(self, value: torch.Tensor, work: Work, rows: range, scratch: Scratch) -> tuple[Rows, Energies]:
        dtype = dtype_of(work.step.placed.output.dtype)
        if (
            work.step.action == "derive"
            and value.dtype != dtype
            and not (value.is_floating_point() and dtype.is_floating_point)
        ):
            raise PlanError(f"{work.name}: the format's transform made {value.dtype} of {dtype}: a bug of the format")
        if value.dtype == dtype:
            if self.nonfinite == "refuse" and not math.isfinite(magnitude(value, scratch)):
                raise self._refusal(value, first_nonfinite(value), work, rows, hint=ALLOW)
            return value, Energies()
        made = scratch.take("engine.cast", value.shape, dtype, value.device).copy_(value)
        if not (value.is_floating_point() and made.is_floating_point()):
            if not torch.equal(made.to(value.dtype), value):
                raise Mismatch(f"has values that {dtype_name(dtype)} does not hold")
            return made, Energies()
        largest = magnitude(made, scratch)
        finite = math.isfinite(largest)
        if largest == 0 and value.any():
            raise self._nothing_left(value, dtype, work, rows)
        if not finite:
            lost = ~made.isfinite() & value.isfinite()
            if bool(lost.any()):
                index = int(lost.reshape(-1).to(torch.uint8).argmax())
                raise self._refusal(value, index, work, rows, f", which does not fit {dtype_name(dtype)}")
            if self.nonfinite == "refuse":
                raise self._refusal(value, first_nonfinite(value), work, rows, hint=ALLOW)
        if not finite or torch.float64 in (value.dtype, dtype):
            return made, energies(value, made)
        source = scratch.take("engine.float", value.shape, torch.float32, value.device).copy_(value)
        return made, measure(source, scratch.take("check.values", value.shape, torch.float32, value.device).copy_(made))

    def _nothing_left(self, value: torch.Tensor, dtype: torch.dtype, work: Work, rows: range) -> QuantizationError:
        """The refusal of a cast after which all values, too small for the dtype, are zero."""
        index = int((value != 0).reshape(-1).to(torch.uint8).argmax())
        reason = f", and all values near it are zero in {dtype_name(dtype)}"
        return self._refusal(value, index, work, rows, reason, hint=keep_hint(work))

    def _named(self, failure: Exception, work: Work, rows: range) -> MonoquantError:
        """The failure, saying of which tensor of which file it is."""
        file = self.source.info.name
        if isinstance(failure, Mismatch):
            where = _element(work.step.placed.output.shape, rows, failure.index)
            return CheckError(f"{file}: {work.name}{where} {failure.reason}", hint=keep_hint(work))
        return CheckError(f"{file}: {work.name}: {failure}", hint=keep_hint(work))

    def _refusal(
        self, value: torch.Tensor, index: int, work: Work, rows: range, reason: str = "", hint: str = ""
    ) -> QuantizationError:
        where, found = _element(work.step.placed.output.shape, rows, index), value.reshape(-1)[index].item()
        allow = "" if cmath.isfinite(found) else " --nonfinite allow"
        return QuantizationError(
            f"{self.source.info.name}: {work.name}{where} is {found}{reason}", hint=hint or keep_hint(work) + allow
        )


def _element(shape: tuple[int, ...], rows: range, index: int | None) -> str:
    """``[3, 17]``: an element of the whole tensor, from its index in a chunk."""
    if index is None:
        return ":"
    flat = rows.start * row_length(shape) + index
    place: list[int] = []
    for extent in reversed(shape):
        flat, inside = divmod(flat, extent)
        place.append(inside)
    return f"[{', '.join(map(str, reversed(place)))}]" if shape else ""


def keep_hint(work: Work) -> str:
    """What a user can do about a tensor that fails."""
    return f"leave it as it is: --keep '{work.name}'"

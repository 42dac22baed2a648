"""The kit passes what keeps the contract, and every one of its checks fails for something that breaks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from monoquant_core.encoding import FULL, INT4, INT8, UINT8, ActivationQuant, Encoding, per_channel
from monoquant_core.errors import CalibrationError, QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.observed import checked_state
from monoquant_core.rows import chunks, quantum
from monoquant_core.schemes import Context, Proposal, Refusal
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats, usable_range
from monoquant_core.tensor import QuantizedTensor
from monoquant_core.testing import CalibratorConformance, QuantizerConformance
from monoquant_core.testing.checks import half_step_excess
from monoquant_core.testing.samples import ENCODINGS, SHAPES, MemorySource, fitting, normal, quantized, take_rows


class AbsMax:
    """Symmetric int8 per output channel, rounded to nearest: the smallest scheme that keeps every promise."""

    keeps_zero = True
    idempotent = True
    nearest = True

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        if len(spec.shape) < 2:
            return Refusal("a vector", hint="--keep it")
        return Proposal(Encoding(INT8, per_channel(len(spec.shape)), "float32", clip=(-127, 127)))

    def fingerprint(self) -> str:
        return ""

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        proposed = self.propose(spec)
        return isinstance(proposed, Proposal) and encoding == proposed.encoding

    def absmax(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        return x.abs().amax(tuple(range(1, x.ndim)), keepdim=True)

    def scale(self, absmax: torch.Tensor) -> torch.Tensor:
        return torch.where(absmax == 0, 1.0, absmax / 127)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        if not bool(rows.isfinite().all()):
            raise QuantizationError(f"{context.spec.name}: NaN or infinity")
        x = rows.to(torch.float32)
        if not x.numel():
            scale = torch.ones(x.shape[0], *(1 if n else 0 for n in x.shape[1:]))
            return QuantizedTensor(encoding, torch.zeros(x.shape, dtype=torch.int8), scale)
        scale = self.scale(self.absmax(x, context))
        return QuantizedTensor(encoding, self.round(x / scale).clamp(-127, 127).to(torch.int8), scale)


class NoAttribute(AbsMax):
    nearest = None  # type: ignore[assignment]


class NoMethod(AbsMax):
    accepts = None  # type: ignore[assignment]


class FewArguments(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding) -> QuantizedTensor:  # type: ignore[override]
        return super().quantize(rows, encoding, None)  # type: ignore[arg-type]


class RefusesAll(AbsMax):
    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        return Refusal("no")


class Undecided(AbsMax):
    calls = 0

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        self.calls += 1
        return Refusal("sometimes") if self.calls % 2 else super().propose(spec)


class AnswersNone(AbsMax):
    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        return super().propose(spec) if len(spec.shape) == 2 else None  # type: ignore[return-value]


class RejectsItsOwn(AbsMax):
    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        return False


class RoundsRanges(AbsMax):
    def with_ranges(self, spec: TensorSpec, proposal: Proposal, stats: TensorStats) -> Proposal:
        return replace(proposal, activation=ActivationQuant(INT8, "tensor", False, low=-3.5, high=3.5))


class RangesChangeTheWeight(AbsMax):
    def with_ranges(self, spec: TensorSpec, proposal: Proposal, stats: TensorStats) -> Proposal:
        assert isinstance(proposal.encoding, Encoding)
        return replace(proposal, encoding=replace(proposal.encoding, scale="float16"))


class AnotherEncoding(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        right = super().quantize(rows, encoding, context)
        wider = Encoding(INT8, encoding.block, "float64")
        return QuantizedTensor(wider, right.codes, right.scale.double())  # type: ignore[union-attr]


class OutOfClip(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        right = super().quantize(rows, encoding, context)
        return QuantizedTensor(
            encoding, torch.where(right.codes == -127, -128, right.codes).to(torch.int8), right.scale
        )


class InfiniteScale(AbsMax):
    """Computes in float16, as a scheme that forgot to widen does."""

    def scale(self, absmax: torch.Tensor) -> torch.Tensor:
        return super().scale((absmax.half() * 2).float())


class DividesByZero(AbsMax):
    def scale(self, absmax: torch.Tensor) -> torch.Tensor:
        return absmax * (absmax / absmax) / 127


class AcceptsTooMuch(AbsMax):
    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        return encoding.element == INT8 and len(encoding.block) == len(spec.shape)


class RoundsDown(AbsMax):
    def round(self, x: torch.Tensor) -> torch.Tensor:
        return x.floor()


class WrongScale(AbsMax):
    """Ordinary weights of the right shape, and wrong by a factor."""

    nearest = False

    def scale(self, absmax: torch.Tensor) -> torch.Tensor:
        return super().scale(absmax).neg()

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return x.neg().round()


class AllZero(AbsMax):
    def round(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class ShiftsZero(AbsMax):
    idempotent = False

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == 0, 1.0, x.round())


class Shrinks(AbsMax):
    def scale(self, absmax: torch.Tensor) -> torch.Tensor:
        return super().scale(absmax * 0.9)


class TakesNan(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        return super().quantize(rows.nan_to_num(), encoding, context)


class TakesInfinity(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        largest = torch.finfo(rows.dtype).max
        return super().quantize(torch.where(rows.isinf(), largest, rows), encoding, context)


class NamesNoTensor(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        if not bool(rows.isfinite().all()):
            raise QuantizationError("NaN or infinity")
        return super().quantize(rows, encoding, context)


class WritesToItsInput(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        result = super().quantize(rows, encoding, context)
        rows.mul_(2)
        return result


class Random(AbsMax):
    idempotent = nearest = False

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return (x + torch.rand_like(x) - 0.5).round()


class DirtyScratch(AbsMax):
    """Believes its buffer to be zero."""

    def absmax(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        buffer = context.scratch.take("absmax", (x.shape[0],), torch.float32)
        fresh = super().absmax(x, context)
        buffer.copy_(torch.where(buffer > 1, buffer, fresh.flatten()))
        return buffer.clone().reshape(fresh.shape)


class FollowsStrides(AbsMax):
    """Reads the storage where it should read the rows."""

    def absmax(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        storage = x.as_strided((x.numel(),), (1,)).nan_to_num(posinf=9e9)
        return torch.full((x.shape[0], *[1] * (x.ndim - 1)), float(storage.abs().max()))


class DtypeDecides(AbsMax):
    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        right = super().quantize(rows, encoding, context)
        # The quotient in the input's precision, where float32 was promised
        codes = (rows / right.scale.to(rows.dtype)).float().round().clamp(-127, 127).to(torch.int8)  # type: ignore[union-attr]
        return QuantizedTensor(encoding, codes, right.scale)


class LooksAtTheChunk(AbsMax):
    """Per channel by its words, and per chunk by its deeds."""

    idempotent = nearest = False

    def absmax(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        return super().absmax(x, context).amax(0, keepdim=True).expand(x.shape[0], *[1] * (x.ndim - 1)).contiguous()


class SharesState(AbsMax):
    """Keeps a buffer on itself, which two workers then share."""

    idempotent = nearest = False
    buffer: torch.Tensor | None = None

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        if self.buffer is None or self.buffer.numel() < rows.numel():
            self.buffer = torch.zeros(rows.numel())
        mine = self.buffer[: rows.numel()].view(rows.shape)
        mine.copy_(rows)
        time.sleep(0.02)  # the other threads' turn
        return super().quantize(mine, encoding, context)


class TrustsImportance(AbsMax):
    def absmax(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        right = super().absmax(x, context)
        if context.importance is None:
            return right
        return right * (context.importance / context.importance.mean()).max()


class Counts(AbsMax):
    quantized = 0

    def fingerprint(self) -> str:
        return str(self.quantized)

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        self.quantized += 1
        return super().quantize(rows, encoding, context)


SABOTAGE: list[tuple[type[AbsMax], str, str]] = [
    (Counts, "test_fingerprint_stays_the_same", "another fingerprint the second time"),
    (NoAttribute, "test_satisfies_the_protocol", "nearest is True or False"),
    (NoMethod, "test_satisfies_the_protocol", "accepts is not a method"),
    (FewArguments, "test_satisfies_the_protocol", "quantize must take (rows, encoding, context)"),
    (RefusesAll, "test_proposes_or_refuses", "refuses every sample"),
    (Undecided, "test_proposes_or_refuses", "another answer the second time"),
    (AnswersNone, "test_proposes_or_refuses", "vector: None"),
    (RejectsItsOwn, "test_accepts_what_it_proposes", "not its own int8"),
    (RoundsRanges, "test_ranges_change_activations_only", "the range has become (-3.5, 3.5)"),
    (RangesChangeTheWeight, "test_ranges_change_activations_only", "another encoding of the weight"),
    (AnotherEncoding, "test_gives_what_it_promises", "promised int8[1x*]*float32, gave int8[1x*]*float64"),
    (OutOfClip, "test_gives_what_it_promises", "code -128 is below -127"),
    (InfiniteScale, "test_gives_what_it_promises", "scale is not finite"),
    (DividesByZero, "test_gives_what_it_promises", "all zero, torch.float32: scale is not finite"),
    (AcceptsTooMuch, "test_gives_what_it_accepts", "scale: declared float16"),
    (RoundsDown, "test_error_is_at_most_half_a_step", "more than half a step away"),
    (AllZero, "test_error_is_at_most_half_a_step", "decodes to 0"),
    (AllZero, "test_no_block_is_lost", "everything became zero"),
    (ShiftsZero, "test_zero_stays_zero", "a zero became"),
    (Shrinks, "test_again_gives_the_same_codes", "other codes the second time"),
    (TakesNan, "test_refuses_what_is_not_finite", "DID NOT RAISE"),
    (TakesInfinity, "test_refuses_what_is_not_finite", "DID NOT RAISE"),
    (NamesNoTensor, "test_refuses_what_is_not_finite", "does not name the tensor"),
    (WritesToItsInput, "test_leaves_its_input_alone", "the input was changed"),
    (Random, "test_is_deterministic", "other bits the second time"),
    (DirtyScratch, "test_is_deterministic", "other bits the second time"),
    (FollowsStrides, "test_sees_only_its_rows", "NaN"),
    (DtypeDecides, "test_values_decide_and_not_their_dtype", "float16"),
    (LooksAtTheChunk, "test_chunks_give_what_the_whole_gives", "rows 0:1 differ"),
    (SharesState, "test_threads_do_not_disturb_each_other", ""),
    (TrustsImportance, "test_importance_keeps_every_promise", ""),
]


def outcome(suite: object, test: str, subject: object, **others: Any) -> str | None:
    """What a test of the kit says of a subject; None when it passes. A parametrized one runs for every parameter."""
    method = getattr(suite, test)
    arguments: list[dict[str, Any]] = [{}]
    for mark in getattr(method, "pytestmark", []):
        if mark.name == "parametrize":
            name, values = mark.args
            arguments = [{**chosen, name: value} for chosen in arguments for value in values]
    for chosen in arguments:
        try:
            method(subject, **chosen, **others)
        except pytest.skip.Exception:
            continue
        except (pytest.fail.Exception, Exception) as failure:  # noqa: BLE001
            return f"{failure}" or repr(failure)
    return None


TESTS = [name for name in vars(QuantizerConformance) if name.startswith("test_")]


@pytest.mark.parametrize("test", TESTS)
def test_a_good_quantizer_passes(test: str) -> None:
    assert outcome(QuantizerConformance(), test, AbsMax()) is None


@pytest.mark.parametrize(("broken", "test", "message"), SABOTAGE, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_quantizer_is_found(broken: type[AbsMax], test: str, message: str) -> None:
    found = outcome(QuantizerConformance(), test, broken())
    assert found is not None, f"{test} passes {broken.__name__}"
    assert message in found


def test_every_check_has_been_seen_to_fail() -> None:
    assert {test for _, test, _ in SABOTAGE} == set(TESTS)


def test_an_inexact_scheme_must_beat_zero() -> None:
    """What does not promise the nearest code promises at least to be closer than nothing."""

    class Opposite(AbsMax):
        nearest = False

        def round(self, x: torch.Tensor) -> torch.Tensor:
            return x.neg().round()

    found = outcome(QuantizerConformance(), "test_error_is_at_most_half_a_step", Opposite())
    assert found is not None
    assert "an all-zero tensor would be closer" in found


class MinMax:
    """The smallest calibrator that keeps every promise."""

    order_matters = False

    def __init__(self) -> None:
        self.ends = torch.zeros(2)
        self.seen = torch.tensor(0)

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        if not values.numel():
            return
        if not bool(values.isfinite().all()):
            raise CalibrationError("NaN or infinity")
        low, high = values.float().min(), values.float().max()
        self.ends = torch.stack([self.ends[0].minimum(low), self.ends[1].maximum(high)])
        self.seen = self.seen + values.numel()

    def merge(self, other: MinMax) -> None:
        self.ends = torch.stack([self.ends[0].minimum(other.ends[0]), self.ends[1].maximum(other.ends[1])])
        self.seen = self.seen + other.seen

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.seen:
            raise CalibrationError("nothing was observed")
        low, high = self.ends.unbind()
        return usable_range(low, high)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"ends": self.ends.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        wanted = {"ends": (torch.float32, (2,)), "seen": (torch.int64, ())}
        self.ends, self.seen = checked_state(state, wanted).values()


class Positive(MinMax):
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().range()
        return low + 1, high + 1


class Empty(MinMax):
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        super().range()
        low, high = self.ends.unbind()
        return low, high


class Double(MinMax):
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().range()
        return low.double(), high.double()


class Unobserved(MinMax):
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = self.seen.clamp(min=1)
        return super().range()


class Nan(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values.nan_to_num(posinf=0, neginf=0))


class TakesInWhatItRefuses(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values.nan_to_num(posinf=0, neginf=0))
        super().observe(values)


class Scribbles(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values)
        values.zero_()


class OnlyMatrices(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values if values.ndim < 3 else values[1])


class AnyChannels(MinMax):
    """For each channel, and forgets how many there were."""

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        rows = values.movedim(axis, -1).reshape(-1, values.shape[axis]).float()
        if rows.numel():
            self.ends = torch.stack([rows.amin(0), rows.amax(0)])
            self.seen = self.seen + 1


class LastOne(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        self.ends = torch.zeros(2)
        super().observe(values)


class DeclaresOrder(MinMax):
    order_matters = True


class Forgetful(MinMax):
    def merge(self, other: MinMax) -> None:
        self.seen = self.seen + other.seen


class Takes(MinMax):
    """Shares memory with what it was merged with."""

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        before = self.ends
        super().observe(values)
        before.copy_(self.ends)
        self.ends = before

    def merge(self, other: MinMax) -> None:
        super().merge(other)
        other.ends = self.ends


class Half(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values if values.dtype == torch.float32 else values * 2)


class Clips(MinMax):
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().range()
        return low * 0.9, high * 0.9


class Amnesia(MinMax):
    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), "ends": torch.zeros(2)}


class SharesItsState(MinMax):
    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        before = self.ends
        super().observe(values)
        self.ends = before.copy_(self.ends)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.ends, self.seen = state["ends"], state["seen"]


class Trusting(MinMax):
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.ends = state.get("ends", self.ends)
        self.seen = state.get("seen", self.seen)


class Hoards(MinMax):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []

    def observe(self, values: torch.Tensor, axis: int = -1) -> None:
        super().observe(values)
        self.batches.append(values)


class NoMerge(MinMax):
    merge = None  # type: ignore[assignment]


class Undeclared(MinMax):
    order_matters = None  # type: ignore[assignment]


CALIBRATOR_SABOTAGE = [
    (NoMerge, "test_satisfies_the_protocol"),
    (Undeclared, "test_satisfies_the_protocol"),
    (Positive, "test_range_holds_zero"),
    (Empty, "test_range_holds_zero"),
    (Double, "test_range_holds_zero"),
    (Unobserved, "test_nothing_observed"),
    (Nan, "test_refuses_what_is_not_finite"),
    (TakesInWhatItRefuses, "test_refuses_what_is_not_finite"),
    (Scribbles, "test_leaves_its_input_alone"),
    (Half, "test_dtypes"),
    (OnlyMatrices, "test_any_shape"),
    (AnyChannels, "test_any_shape"),
    (LastOne, "test_order_does_not_matter"),
    (DeclaresOrder, "test_order_does_not_matter"),
    (Forgetful, "test_merging_is_observing_everything"),
    (Takes, "test_merging_leaves_the_other_alone"),
    (Amnesia, "test_state"),
    (SharesItsState, "test_state"),
    (Trusting, "test_refuses_a_damaged_state"),
    (Hoards, "test_memory_is_constant"),
    (Clips, "test_widest_is_the_minimum_and_the_maximum"),
]
CALIBRATOR_TESTS = [name for name in vars(CalibratorConformance) if name.startswith("test_")]


@pytest.mark.parametrize("test", CALIBRATOR_TESTS)
def test_a_good_calibrator_passes(test: str) -> None:
    assert outcome(CalibratorConformance(), test, MinMax) is None


@pytest.mark.parametrize(("broken", "test"), CALIBRATOR_SABOTAGE, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_calibrator_is_found(broken: Callable[[], MinMax], test: str) -> None:
    assert outcome(CalibratorConformance(), test, broken) is not None


def test_every_calibrator_check_has_been_seen_to_fail() -> None:
    assert {test for _, test in CALIBRATOR_SABOTAGE} == set(CALIBRATOR_TESTS)


@pytest.mark.parametrize("sample", SHAPES, ids=lambda s: s.name)
def test_samples_cut_into_rows_and_decode(sample: Any) -> None:
    """Chunks at the quantum of ``rows.py`` carry their own parameters: decoding commutes with cutting."""
    found = 0
    for name, encoding in fitting(sample.shape):
        tensor = quantized(encoding, sample.shape)
        whole = tensor.dequantize()
        assert bool(whole.isfinite().all()), name
        step = quantum(sample.shape, encoding, tensor_wide=True)
        for rows in chunks(sample.shape, step, 64):
            part = take_rows(tensor, rows)
            assert isinstance(part, QuantizedTensor)
            assert torch.equal(part.dequantize(), take_rows(whole, rows)), f"{name}: rows {rows}"  # type: ignore[arg-type]
            found += 1
    assert found


def test_samples_hold_every_family_for_a_matrix() -> None:
    assert dict(fitting((48, 256))) == ENCODINGS
    for encoding in ENCODINGS.values():
        encoding.check_weight()


def test_memory_source_counts_rows() -> None:
    source = MemorySource({"w": normal((4, 8))})
    for rows in (range(0, 2), range(2, 4)):
        source.read("w", rows)
    assert source.times_read("w") == 1
    source.read("w", range(1, 2))
    assert source.times_read("w") == 2
    unread = MemorySource({"w": normal((4, 8))})
    unread.read("w", range(1, 3))
    with pytest.raises(AssertionError, match=r"rows \[0, 3\] were never read"):
        unread.times_read("w")


@pytest.mark.parametrize(
    ("code", "value", "beyond"),
    [
        (2, 1.25, False),
        (2, 1.26, True),
        (2, 0.74, True),
        (7, 1e6, False),
        (7, 3.24, True),
        (-8, -1e6, False),
        (-8, -3.7, True),
    ],
)
def test_half_a_step_of_integers(code: int, value: float, beyond: bool) -> None:
    encoding = Encoding(INT4, (FULL,), "float32")
    tensor = QuantizedTensor(encoding, torch.tensor([code], dtype=torch.int8), torch.tensor([0.5]))
    assert bool((half_step_excess(torch.tensor([value]), tensor) > 0).any()) is beyond
    flipped = QuantizedTensor(encoding, tensor.codes, torch.tensor([-0.5]))
    assert bool((half_step_excess(torch.tensor([-value]), flipped) > 0).any()) is beyond


def test_half_a_step_of_clipped_and_shifted_codes() -> None:
    narrow = Encoding(INT8, (FULL,), "float32", clip=(-10, 10))
    tensor = QuantizedTensor(narrow, torch.tensor([10], dtype=torch.int8), torch.ones(1))
    assert half_step_excess(torch.tensor([99.0]), tensor).max() <= 0
    shifted = Encoding(UINT8, (FULL,), "float32", zero_point=UINT8)
    zero = torch.tensor([100], dtype=torch.uint8)
    moved = QuantizedTensor(shifted, torch.tensor([103], dtype=torch.uint8), torch.ones(1), zero)
    assert half_step_excess(torch.tensor([3.4]), moved).max() <= 0
    assert half_step_excess(torch.tensor([3.6]), moved).max() > 0


def test_half_a_step_allows_what_storing_the_scale_moves() -> None:
    """In float16 a code of 127 may be off by 127 ulps of the scale; in float32 it may not."""
    scale = torch.tensor([0.1])
    value = torch.tensor([100.0 * 0.1 + 0.05 + 0.004])
    exact = QuantizedTensor(Encoding(INT8, (FULL,), "float32"), torch.tensor([100], dtype=torch.int8), scale)
    assert half_step_excess(value, exact).max() > 0
    stored = QuantizedTensor(Encoding(INT8, (FULL,), "float16"), exact.codes, scale.half())
    assert half_step_excess(value, stored).max() <= 0
    assert half_step_excess(value + 0.05, stored).max() > 0


def test_half_a_step_of_a_float_element_is_its_own() -> None:
    """fp8 steps grow with the value: 15 and 16 are one step apart, 0.015625 and 0.017578125 too."""
    encoding = ENCODINGS["fp8 per tensor"]
    one = Encoding(encoding.element, (FULL,), "float32")
    assert one.element.table is not None
    code = one.element.table.index(16.0)
    tensor = QuantizedTensor(one, torch.tensor([code], dtype=torch.uint8), torch.ones(1))
    assert half_step_excess(torch.tensor([16.9]), tensor).max() <= 0
    assert half_step_excess(torch.tensor([17.1]), tensor).max() > 0
    assert half_step_excess(torch.tensor([15.6]), tensor).max() <= 0
    assert half_step_excess(torch.tensor([15.4]), tensor).max() > 0


def test_context_of_the_kit_is_the_engines() -> None:
    """The kit passes scratch buffers and row ranges, as the engine does."""
    seen: list[Context] = []

    class Records(AbsMax):
        def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
            seen.append(context)
            return super().quantize(rows, encoding, context)

    assert outcome(QuantizerConformance(), "test_chunks_give_what_the_whole_gives", Records()) is None
    assert all(isinstance(c.scratch, Scratch) for c in seen)
    assert {len(c.rows) for c in seen} != {len(seen[0].rows)}
    assert all(c.absmax is None for c in seen)

"""What every quantizer must do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from monoquant_core.encoding import Encoding
from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.rows import all_rows, chunks, quantum, row_length
from monoquant_core.schemes import Context, Proposal, Quantizer, Refusal
from monoquant_core.scratch import Scratch
from monoquant_core.stats import TensorStats
from monoquant_core.tensor import QuantizedTensor, same_bits
from monoquant_core.testing.checks import assert_fingerprint, assert_satisfies, assert_sound, half_step_excess
from monoquant_core.testing.samples import NAME, SHAPES, VALUES, ShapeSample, fitting, generator, normal, take_rows


class QuantizerConformance:
    """Subclass it and give a fixture ``quantizer``; every test runs over shapes, dtypes and values that break things.

    ::

        class TestMine(QuantizerConformance):
            @pytest.fixture(params=[32, 128])
            def quantizer(self, request):
                return MyQuantizer(MyOptions(group_size=request.param))
    """

    #: tensors to propose for; override to add what your scheme is made for
    shapes: Sequence[ShapeSample] = SHAPES

    @pytest.fixture
    def quantizer(self) -> Quantizer:
        """The scheme with its options bound."""
        raise NotImplementedError("give your class a fixture 'quantizer'")

    def test_satisfies_the_protocol(self, quantizer: Quantizer) -> None:
        """Every member is there, and the three declarations are booleans."""
        assert_satisfies(quantizer, Quantizer)
        for name in ("keeps_zero", "idempotent", "nearest"):
            assert isinstance(getattr(quantizer, name), bool), f"{name} is True or False"

    def test_proposes_or_refuses(self, quantizer: Quantizer) -> None:
        """``propose`` answers for every tensor, twice the same, and takes at least one of the samples."""
        taken = 0
        for sample in self.shapes:
            for dtype in ("float32", "float16", "bfloat16"):
                spec = sample.spec(dtype)
                answer = quantizer.propose(spec)
                assert isinstance(answer, Proposal | Refusal), f"{sample.name}: {answer!r}"
                assert quantizer.propose(spec) == answer, f"{sample.name}: another answer the second time"
                taken += isinstance(answer, Proposal)
                if isinstance(answer, Proposal) and isinstance(answer.encoding, Encoding):
                    answer.encoding.nbits(spec.shape)
        assert taken, "refuses every sample"

    def test_accepts_what_it_proposes(self, quantizer: Quantizer) -> None:
        """``accepts`` answers for any encoding, and agrees with ``propose``."""
        for sample, spec, proposal in self._taken(quantizer):
            assert quantizer.accepts(spec, _encoding(proposal)) is True, (
                f"{sample.name}: not its own {proposal.encoding}"
            )
            for name, encoding in fitting(sample.shape):
                assert isinstance(quantizer.accepts(spec, encoding), bool), f"{sample.name}: {name}"

    def test_ranges_change_activations_only(self, quantizer: Quantizer) -> None:
        """``with_ranges``, where there is one, leaves the weight's encoding and takes the range as it is."""
        with_ranges = getattr(quantizer, "with_ranges", None)
        if with_ranges is None:
            pytest.skip("has no with_ranges")
        low, high = torch.tensor(-1.25), torch.tensor(3.5)
        stats = TensorStats(8, low, high, low=low, high=high)
        for sample, spec, proposal in self._taken(quantizer):
            ranged = with_ranges(spec, proposal, stats)
            assert isinstance(ranged, Proposal), f"{sample.name}: {ranged!r}"
            assert ranged.encoding == proposal.encoding, f"{sample.name}: another encoding of the weight"
            assert ranged.needs <= proposal.needs, f"{sample.name}: needs more than before"
            activation = ranged.activation
            if activation is not None and not activation.dynamic:
                found = activation.low, activation.high
                assert found == (-1.25, 3.5), f"{sample.name}: the range has become {found}"

    def test_fingerprint_stays_the_same(self, quantizer: Quantizer) -> None:
        """Where there is one: a later run with the same one goes on with what an interrupted run made."""

        def work() -> None:
            for sample, spec, proposal in self._taken(quantizer):
                _quantize(quantizer, normal(sample.shape), spec, proposal)

        assert_fingerprint(quantizer, work)

    def test_gives_what_it_promises(self, quantizer: Quantizer) -> None:
        """Exactly the proposed encoding and the input's shape, finite and in range, for all values and dtypes."""
        for sample, spec, proposal in self._taken(quantizer):
            for values in VALUES:
                x = VALUES[values](sample.shape)
                halves = (torch.bfloat16, torch.float16) if values in ("normal", "all zero", "one outlier") else ()
                for dtype in (torch.float32, *halves):
                    where = f"{sample.name}, {values}, {dtype}"
                    tensor = _attempt(quantizer, x.to(dtype), spec, proposal)
                    if tensor is not None:
                        assert_sound(tensor, _encoding(proposal), sample.shape, where)

    def test_gives_what_it_accepts(self, quantizer: Quantizer) -> None:
        """An accepted encoding is produced exactly as a proposed one."""
        for sample, spec, proposal in self._taken(quantizer):
            own = _encoding(proposal)
            stored = [replace(own, scale=s) for s in ("float32", "float16", "bfloat16") if isinstance(own.scale, str)]
            for encoding in dict.fromkeys([*stored, *(e for _, e in fitting(sample.shape))]):
                if quantizer.accepts(spec, encoding):
                    x = normal(sample.shape)
                    tensor = _quantize(quantizer, x, spec, replace(proposal, encoding=encoding))
                    assert_sound(tensor, encoding, sample.shape, f"{sample.name} as {encoding}")
                    if quantizer.nearest:
                        _assert_nearest(x, tensor, f"{sample.name} as {encoding}")

    def test_error_is_at_most_half_a_step(self, quantizer: Quantizer) -> None:
        """Every code is the nearest one to its value, where the scheme declares ``nearest``."""
        for sample, spec, proposal in self._taken(quantizer):
            for values in VALUES:
                x = VALUES[values](sample.shape)
                tensor = _attempt(quantizer, x, spec, proposal)
                if tensor is None:
                    continue
                if quantizer.nearest:
                    _assert_nearest(x, tensor, f"{sample.name}, {values}")
                elif values == "normal" and x.numel():
                    error = (tensor.dequantize() - x).norm()
                    assert error < x.norm(), f"{sample.name}: an all-zero tensor would be closer"

    def test_no_block_is_lost(self, quantizer: Quantizer) -> None:
        """Ordinary weights do not decode to zero."""
        for sample, spec, proposal in self._taken(quantizer):
            x = normal(sample.shape)
            if x.numel() > 1:
                values = _quantize(quantizer, x, spec, proposal).dequantize()
                assert values.abs().max() > 0, f"{sample.name}: everything became zero"

    def test_zero_stays_zero(self, quantizer: Quantizer) -> None:
        """Exactly, where the scheme declares ``keeps_zero``."""
        if not quantizer.keeps_zero:
            pytest.skip("declares keeps_zero = False")
        for sample, spec, proposal in self._taken(quantizer):
            for values in ("all zero", "half zero", "normal", "all positive", "one outlier", "negative zero"):
                x = VALUES[values](sample.shape)
                x.view(-1)[: sample.spec().numel // 5] = 0
                tensor = _attempt(quantizer, x, spec, proposal)
                back = torch.zeros(sample.shape) if tensor is None else tensor.dequantize()
                assert not back[x == 0].any(), f"{sample.name}, {values}: a zero became {back[x == 0].abs().max()}"

    def test_again_gives_the_same_codes(self, quantizer: Quantizer) -> None:
        """Quantizing what was dequantized changes no code, where the scheme declares ``idempotent``."""
        if not quantizer.idempotent:
            pytest.skip("declares idempotent = False")
        for sample, spec, proposal in self._taken(quantizer):
            for values in ("normal", "half zero", "all positive", "all negative", "two values"):
                first = _quantize(quantizer, VALUES[values](sample.shape), spec, proposal)
                again = _quantize(quantizer, first.dequantize(), spec, proposal)
                assert torch.equal(first.codes, again.codes), f"{sample.name}, {values}: other codes the second time"

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_refuses_what_is_not_finite(self, quantizer: Quantizer, bad: float, dtype: torch.dtype) -> None:
        """NaN and infinity raise QuantizationError, and it names the tensor."""
        for sample, spec, proposal in self._taken(quantizer):
            for at in (0, sample.spec().numel // 2, -1):
                x = normal(sample.shape).to(dtype).reshape(-1)
                if not x.numel():
                    continue
                x[at] = bad
                with pytest.raises(QuantizationError) as caught:
                    _quantize(quantizer, x.reshape(sample.shape), spec, proposal)
                assert NAME in str(caught.value), f"{caught.value} does not name the tensor"

    def test_leaves_its_input_alone(self, quantizer: Quantizer) -> None:
        """Nothing is written to the rows."""
        for sample, spec, proposal in self._taken(quantizer):
            x = normal(sample.shape)
            before = x.clone()
            _quantize(quantizer, x, spec, proposal)
            assert same_bits(x, before), f"{sample.name}: the input was changed"

    def test_is_deterministic(self, quantizer: Quantizer) -> None:
        """Twice the same bits, also from buffers that another tensor has used."""
        for sample, spec, proposal in self._taken(quantizer):
            x = normal(sample.shape)
            first = _quantize(quantizer, x, spec, proposal)
            scratch = Scratch()
            _quantize(quantizer, VALUES["all negative"](sample.shape), spec, proposal, scratch=scratch)
            again = _quantize(quantizer, x, spec, proposal, scratch=scratch)
            assert first.equal(again), f"{sample.name}: other bits the second time"

    def test_sees_only_its_rows(self, quantizer: Quantizer) -> None:
        """Strides do not matter, nor what lies beside the rows in memory."""
        for sample, spec, proposal in self._taken(quantizer):
            x = normal(sample.shape)
            expected = _quantize(quantizer, x, spec, proposal)
            for how, view in _views(x):
                assert expected.equal(_quantize(quantizer, view, spec, proposal)), f"{sample.name}: {how}"

    def test_values_decide_and_not_their_dtype(self, quantizer: Quantizer) -> None:
        """bfloat16 and float16 rows give what the same values give in float32."""
        for sample, spec, proposal in self._taken(quantizer):
            for dtype in (torch.bfloat16, torch.float16):
                x = normal(sample.shape).to(dtype)
                expected = _quantize(quantizer, x.float(), spec, proposal)
                assert expected.equal(_quantize(quantizer, x, spec, proposal)), f"{sample.name}: {dtype}"

    def test_chunks_give_what_the_whole_gives(self, quantizer: Quantizer) -> None:
        """However the rows are cut, at whole blocks."""
        for sample, spec, proposal in self._taken(quantizer):
            if "whole" in proposal.needs or not spec.numel:
                continue
            x, encoding = normal(sample.shape), _encoding(proposal)
            step = quantum(sample.shape, encoding, tensor_wide="absmax" in proposal.needs)
            sizes = (1, 3 * step * row_length(sample.shape))
            for size, weights in itertools.product(sizes, (None, _importance(spec))):
                whole = _quantize(quantizer, x, spec, proposal, importance=weights)
                for rows in chunks(sample.shape, step, size):
                    part = take_rows(x, rows)
                    assert isinstance(part, torch.Tensor)
                    absmax = float(x.abs().max())
                    tensor = _quantize(quantizer, part, spec, proposal, rows=rows, absmax=absmax, importance=weights)
                    expected = take_rows(whole, rows)
                    assert isinstance(expected, QuantizedTensor)
                    assert tensor.equal(expected), f"{sample.name}: rows {rows.start}:{rows.stop} differ"

    def test_threads_do_not_disturb_each_other(self, quantizer: Quantizer) -> None:
        """One quantizer serves several workers, each with its own scratch."""
        for sample, spec, proposal in self._taken(quantizer):
            inputs = [normal(sample.shape, seed) for seed in range(4)]
            expected = [_quantize(quantizer, x, spec, proposal) for x in inputs]
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda x: _quantize(quantizer, x, spec, proposal), inputs))  # noqa: B023
            assert all(a.equal(b) for a, b in zip(expected, found, strict=True)), sample.name

    def test_importance_keeps_every_promise(self, quantizer: Quantizer) -> None:
        """With a weight for every column, zero for some, the result is as sound as without."""
        for sample, spec, proposal in self._taken(quantizer):
            x = normal(sample.shape)
            importance = _importance(spec)
            importance[::3] = 0
            for weights in (importance, torch.zeros_like(importance), importance * 1e-30):
                tensor = _quantize(quantizer, x, spec, proposal, importance=weights)
                assert_sound(tensor, _encoding(proposal), sample.shape, f"{sample.name} with importance")
                if quantizer.nearest:
                    _assert_nearest(x, tensor, f"{sample.name} with importance")

    def _taken(self, quantizer: Quantizer) -> Iterator[tuple[ShapeSample, TensorSpec, Proposal]]:
        """The samples that the scheme quantizes; a cast is the core's work."""
        for sample in self.shapes:
            spec = sample.spec()
            proposal = quantizer.propose(spec)
            if isinstance(proposal, Proposal) and isinstance(proposal.encoding, Encoding):
                yield sample, spec, proposal


def _encoding(proposal: Proposal) -> Encoding:
    assert isinstance(proposal.encoding, Encoding)
    return proposal.encoding


def _quantize(
    quantizer: Quantizer,
    x: torch.Tensor,
    spec: TensorSpec,
    proposal: Proposal,
    *,
    rows: range | None = None,
    absmax: float | None = None,
    importance: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> QuantizedTensor:
    """Quantize as the engine does, with what the proposal needs; a copy, because results may live in the scratch."""
    if importance is None and "importance" in proposal.needs:
        importance = _importance(spec) + 0.5
    if "absmax" in proposal.needs and absmax is None:
        absmax = float(x.abs().max()) if x.numel() else 0.0
    context = Context(
        spec,
        rows if rows is not None else all_rows(spec.shape),
        scratch or Scratch(),
        absmax if "absmax" in proposal.needs else None,
        importance,
    )
    return quantizer.quantize(x, _encoding(proposal), context).clone()


def _importance(spec: TensorSpec) -> torch.Tensor:
    """A number for each input of the layer."""
    inputs = row_length(spec.shape)
    if spec.kind.startswith("conv"):
        inputs = math.prod(spec.shape[1:])
    elif spec.transposed:
        inputs = spec.shape[0]
    return torch.rand(inputs, generator=generator(5))


def _attempt(quantizer: Quantizer, x: torch.Tensor, spec: TensorSpec, proposal: Proposal) -> QuantizedTensor | None:
    """None where the scheme refuses magnitudes that the stored type of its scale cannot hold, naming the tensor."""
    if _encoding(proposal).scale in ("float32", "float64"):
        return _quantize(quantizer, x, spec, proposal)
    try:
        return _quantize(quantizer, x, spec, proposal)
    except QuantizationError as exc:
        if spec.name not in str(exc):
            raise AssertionError(f"{exc} does not name the tensor") from exc
        return None


def _assert_nearest(x: torch.Tensor, tensor: QuantizedTensor, where: str) -> None:
    excess = half_step_excess(x, tensor)
    if excess.numel():
        worst = int(excess.argmax())
        assert excess.max() <= 0, (
            f"{where}: element {worst} is {float(x.reshape(-1)[worst]):.9g}, "
            f"decodes to {float(tensor.dequantize().reshape(-1)[worst]):.9g}, "
            f"more than half a step away by {float(excess.max()):.3g}"
        )


def _views(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values in other memory."""
    if x.ndim == 0:
        return
    order = list(range(x.ndim))[::-1]
    yield "transposed in memory", x.permute(order).contiguous().permute(order)
    among: Callable[[tuple[int, ...]], torch.Tensor] = lambda shape: torch.full(shape, math.nan)  # noqa: E731
    wide = among((*x.shape[:-1], x.shape[-1] + 7))
    wide[..., 3 : 3 + x.shape[-1]] = x
    yield "columns of a wider tensor, NaN around them", wide[..., 3 : 3 + x.shape[-1]]
    spaced = among((*x.shape[:-1], 2 * x.shape[-1]))
    spaced[..., ::2] = x
    yield "every other column, NaN between them", spaced[..., ::2]
    tall = among((x.shape[0] + 2, *x.shape[1:]))
    tall[1:-1] = x
    yield "rows of a taller tensor, NaN around them", tall[1:-1]

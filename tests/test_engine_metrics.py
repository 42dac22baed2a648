"""How far two tensors, and two models, are apart: against plain float64 formulas."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from engine_kit import DictSource, Tiny

from monoquant_core import metrics
from monoquant_core.metrics import Energies, compare_sources, energies
from monoquant_core.model import TensorSpec
from monoquant_core.report import Comparison
from monoquant_core.rows import all_rows
from monoquant_core.schemes import Context
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import QuantizedTensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(x: torch.Tensor, scheme: Tiny) -> QuantizedTensor:
    spec = TensorSpec("x", tuple(x.shape), "float32")
    absmax = float(x.abs().max()) if scheme.group < 0 else None
    return scheme.quantize(x, scheme.propose(spec).encoding, Context(spec, all_rows(spec.shape), Scratch(), absmax))


def only(a: DictSource, b: DictSource) -> Comparison:
    (found,) = compare_sources(a, b)
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(0, 99), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 9))
def test_energies_are_sums_of_squares(n: int, seed: int, one: torch.dtype, other: torch.dtype, segment: int) -> None:
    a, b = (weights(n, seed=seed) * 5).to(one), (weights(n, seed=seed + 1) * 5).to(other)
    x, y = a.double().numpy(), b.double().numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "SEGMENT", segment)
        found = energies(a, b)
    assert found.signal == pytest.approx((x**2).sum())
    assert found.noise == pytest.approx(((x - y) ** 2).sum())
    assert found.max_error == pytest.approx(np.abs(x - y).max(initial=0))


def test_energies_add_up() -> None:
    assert Energies(1, 2, 3).plus(Energies(10, 20, 2)) == Energies(11, 22, 3)
    assert energies(torch.tensor([1e30]), torch.tensor([0.0])).noise == pytest.approx(1e60)
    assert energies(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])) == Energies(2, 4, 2)


def test_the_same_nan_is_no_difference_and_another_is_an_infinite_one() -> None:
    nan, inf = math.nan, math.inf
    assert energies(torch.tensor([nan, inf, -inf, 2.0]), torch.tensor([nan, inf, -inf, 3.0])) == Energies(4, 1, 1)
    for a, b in ((nan, 1.0), (1.0, nan), (inf, 1.0), (inf, -inf), (nan, inf)):
        found = energies(torch.tensor([a, 1.0]), torch.tensor([b, 1.0]))
        assert (found.noise, found.max_error) == (inf, inf)
        assert found.signal <= 2


@pytest.mark.parametrize("scheme", [Tiny(8), Tiny(4, 8), Tiny(8, -1), Tiny(4, 8, "zero_point"), Tiny(8, 0, "float8")])
def test_comparing_a_model_with_its_quantized_form(scheme: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SEGMENT", 100)
    x = weights(37, 16)
    q = quantized(x, scheme)
    reading = DictSource({"w": q})
    found = only(DictSource({"w": x}), reading)
    a, b = x.double().numpy(), q.dequantize().double().numpy()
    noise = ((a - b) ** 2).sum()
    assert found.status == "compared"
    assert found.sqnr_db == pytest.approx(10 * math.log10((a**2).sum() / noise))
    assert found.max_error == pytest.approx(np.abs(a - b).max())
    assert found.cosine == pytest.approx((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    assert len(reading.reads) > 4
    assert only(reading, reading) == Comparison("w", "compared", ((37, 16), (37, 16)))


def test_names_of_both_sides_in_order() -> None:
    a = DictSource({"x": weights(2, 3), "gone": weights(2), "y": weights(4)})
    b = DictSource({"y": weights(4), "new": weights(5), "x": weights(3, 2)})
    assert list(compare_sources(a, b)) == [
        Comparison("x", "shapes differ", ((2, 3), (3, 2))),
        Comparison("gone", "only in A", ((2,), None)),
        Comparison("y", "compared", ((4,), (4,))),
        Comparison("new", "only in B", (None, (5,))),
    ]


def test_a_tied_name_that_the_other_side_leaves_out_is_no_loss() -> None:
    x = weights(4, 3)
    both = DictSource({"embed": x, "head": x}, {"head": "embed"})
    one = DictSource({"embed": x})
    assert [c.name for c in compare_sources(both, one)] == ["embed"]
    assert [c.name for c in compare_sources(one, both)] == ["embed"]
    assert [c.name for c in compare_sources(both, both)] == ["embed", "head"]
    other = DictSource({"head": x})
    assert [c.status for c in compare_sources(both, other)] == ["only in A", "compared"]


def test_cosines_at_the_ends() -> None:
    x = weights(5, 3)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return only(DictSource({"w": a}), DictSource({"w": b})).cosine

    assert cosine(x, 2 * x) == pytest.approx(1)
    assert cosine(x, -x) == pytest.approx(-1)
    assert cosine(x, torch.zeros(5, 3)) == 0
    assert cosine(torch.zeros(5, 3), torch.zeros(5, 3)) == 1
    assert cosine(torch.zeros(0, 3), torch.zeros(0, 3)) == 1


def test_a_lost_signal_is_minus_infinity() -> None:
    broken = weights(5, 3)
    broken[1, 1] = math.nan
    found = only(DictSource({"w": weights(5, 3)}), DictSource({"w": broken}))
    assert (found.sqnr_db, found.max_error) == (-math.inf, math.inf)
    found = only(DictSource({"w": torch.zeros(3)}), DictSource({"w": torch.ones(3)}))
    assert (found.sqnr_db, found.max_error) == (-math.inf, 1.0)


def test_what_is_no_number_is_said_to_be_none() -> None:
    packed = DictSource({"w": torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)})
    assert only(packed, packed).status == "not numeric"
    real, imaginary = DictSource({"w": torch.zeros(3)}), DictSource({"w": torch.zeros(3, dtype=torch.complex64)})
    assert only(real, imaginary).status == "not numeric"
    assert only(imaginary, imaginary).status == "compared"
    assert only(DictSource({"w": torch.tensor([True])}), DictSource({"w": torch.tensor([1.5])})).max_error == 0.5

"""How outputs are cut into tasks: ranges of rows that are worked on together. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from monoquant_core.encoding import Encoding, param_shape
from monoquant_core.errors import EncodingError, PlanError
from monoquant_core.model import TensorSpec
from monoquant_core.planning import Step
from monoquant_core.reencode import can_reencode, lift
from monoquant_core.rows import all_rows, chunk_shape, chunks, quantum, row_count, row_length

CHUNK_ELEMENTS = 1 << 19  #: large beside what a task costs, small beside a cache (docs/performance.md)


def task_rows(step: Step) -> int:
    """Rows of the output that must be worked on together.

    The least common multiple of what the encodings on both sides, the parts, the permutation and the source ask for.
    """
    out, placed = step.placed.output, step.placed
    proposal = placed.proposal
    needs = proposal.needs if proposal is not None else frozenset()
    count = max(1, row_count(out.shape))
    if not step.specs or "whole" in needs or (out.transform is not None and out.transform.per == "tensor"):
        return count
    if any(row_length(s.shape) != row_length(out.shape) for s in step.specs):
        return count
    # What belongs to the whole tensor is known beforehand: from the file, or from the first pass.
    known = step.action != "quantize" or "absmax" in needs
    made = [placed.held.encoding, proposal.encoding if proposal is not None else None]
    own = [quantum(out.shape, e, tensor_wide=known) for e in made if isinstance(e, Encoding)]
    theirs = [quantum(s.shape, s.encoding, tensor_wide=True) for s in step.specs]
    stored = [part.rows for part in placed.parts if part.per == "rows"]
    mapped = out.rows.quantum if out.rows is not None else 1
    return min(count, math.lcm(mapped, *own, *theirs, *stored))


def task_ranges(step: Step, chunk_elements: int = CHUNK_ELEMENTS) -> list[range]:
    """The row ranges of an output that make one task each, in order."""
    shape = step.placed.output.shape
    found = list(chunks(shape, task_rows(step), chunk_elements))
    if len(found) > 1 and any(s.shape != shape for s in step.specs) and not _readable(step, found):
        return [all_rows(shape)]
    return found


def pieces(step: Step, rows: range) -> list[tuple[TensorSpec, range]]:
    """Which rows of which inputs are these rows of the output, before its permutation."""
    shape = step.placed.output.shape
    if len(rows) == row_count(shape):
        return [(spec, all_rows(spec.shape)) for spec in step.specs]
    found, first = [], 0
    for spec in step.specs:
        count = row_count(spec.shape)
        start, stop = max(rows.start - first, 0), min(rows.stop - first, count)
        if start < stop:
            found.append((spec, range(start, stop)))
        first += count
    return found


def waits_for(step: Step) -> tuple[tuple[str, str], ...]:
    """Parts of other outputs that an output is made of, by the names of both."""
    transform = step.placed.output.transform
    return transform.of if transform is not None else ()


def check_steps(steps: Sequence[Step]) -> None:
    """Refuse what no task could do, before anything is read.

    :raises PlanError: naming the output.
    """
    parts = {(s.placed.output.name, p.name) for s in steps for p in s.placed.parts if not waits_for(s)}
    for step in steps:
        out, rows = step.placed.output, step.placed.output.rows
        per_tensor = out.transform is not None and out.transform.per == "tensor"
        if len(steps) > 1 and waits_for(step) and not (per_tensor and parts.issuperset(waits_for(step))):
            raise PlanError(f"{out.name}: waits for parts that no other output has: a bug of the format")
        if not step.specs and out.transform is None:
            raise PlanError(f"{out.name}: has no inputs and nothing that computes it: a bug of the format")
        if not per_tensor and step.specs and sum(s.numel for s in step.specs) != out.numel:
            shapes = ", ".join(str(s.shape) for s in step.specs[:4])
            raise PlanError(f"{out.name}: {out.shape} cannot be made of {shapes}: a bug of the format")
        _check_repack(step)
        if rows is None:
            continue
        if per_tensor and len(step.specs) > 1:
            raise PlanError(f"{out.name}: joined inputs are permuted before a transform that wants each of them")
        if row_count(out.shape) % rows.quantum:
            raise PlanError(f"{out.name}: {row_count(out.shape)} rows are not whole blocks of {rows.quantum}")
        for spec in step.specs:
            if step.action == "keep" and spec.encoding is not None and not _follows_rows(spec.shape, spec.encoding):
                raise PlanError(
                    f"{spec.name}: rows are permuted, and blocks of {spec.encoding} span several of them",
                    hint="--on-unsupported dequantize",
                )


def _check_repack(step: Step) -> None:
    """A finished tensor, or several that are stacked, must fit the encoding that is to be stored."""
    out, held = step.placed.output, step.placed.held.encoding
    if step.action != "keep" or held is None:
        return
    encodings = {spec.encoding for spec in step.specs}
    (source,) = encodings if len(encodings) == 1 else (None,)
    if source is None:
        raise PlanError(f"{out.name}: is made of tensors of different encodings", hint="--on-unsupported dequantize")
    try:
        lifted = lift(source, len(step.specs[0].shape), len(out.shape))
        given = sum(math.prod(param_shape(s.shape, source.block)) for s in step.specs)
        wanted = math.prod(param_shape(out.shape, lifted.block))
        answer = can_reencode(lifted, held, out.shape) if given == wanted else f"{given} blocks are not {wanted}"
    except EncodingError as exc:
        answer = str(exc)
    if answer not in ("exact", "rounds"):
        raise PlanError(
            f"{out.name}: {source} cannot be stored as {held}: {answer}", hint="--on-unsupported dequantize"
        )


def _readable(step: Step, ranges: Sequence[range]) -> bool:
    """Whether every task reads boxes of whole blocks of its inputs, as :meth:`Source.read` wants them."""
    for spec, rows in itertools.chain.from_iterable(pieces(step, r) for r in ranges):
        own = quantum(spec.shape, spec.encoding, tensor_wide=True)
        if rows.start % own or (rows.stop % own and rows.stop != row_count(spec.shape)):
            return False
        try:
            chunk_shape(spec.shape, rows)
        except EncodingError:
            return False
    return True


def _follows_rows(shape: tuple[int, ...], encoding: Encoding) -> bool:
    """Whether every parameter belongs to one row, or to all of them, at every level."""
    block = encoding.block
    follows = len(block) == len(shape) and (
        all(b == 1 for b in block[:-1]) or quantum(shape, encoding) >= row_count(shape)
    )
    return follows and all(_follows_rows(shape, p) for _, p in encoding.params() if isinstance(p, Encoding))

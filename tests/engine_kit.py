"""A tiny source, tiny schemes and a tiny format, plain enough to be read with numpy, for tests of the engine."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monoquant_core.encoding import (
    FULL,
    ElementType,
    Encoding,
    integer,
    minifloat,
    param_shape,
    per_channel,
    per_group,
    per_tensor,
)
from monoquant_core.errors import SourceError
from monoquant_core.exporters import Drop, FileLayout, FilePlan, Held, Holds, Output, Part, PartAt, Placed, Repacks
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.planning import Decision, Plan, Step
from monoquant_core.rows import block_rows, chunk_shape, quantum
from monoquant_core.schemes import Context, Proposal
from monoquant_core.tensor import QuantizedTensor, decode, dtype_name, dtype_of, expand

MAGIC, TAIL = b"RAW-TEST" + bytes(24), b"<the end>"
FLOAT8 = minifloat("float8_e4m3fn", 4, 3, nan="fn")


def slice_rows(value: torch.Tensor, rows: range) -> torch.Tensor:
    shape = chunk_shape(tuple(value.shape), rows)
    length = value.shape[-1] if value.ndim else 1
    return value.reshape(math.prod(value.shape[:-1]), length)[rows.start : rows.stop].reshape(shape)


def slice_quantized(q: QuantizedTensor, rows: range) -> QuantizedTensor:
    """Rows of a quantized tensor whose blocks are runs of whole rows, parts of rows, or the tensor."""

    def cut(value: Any, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
        if all(b == FULL for b in block):
            return value
        total = math.prod(shape[:-1])
        own = block_rows(shape, block)
        first, last = rows.start // own, -(-rows.stop // own)
        if isinstance(value, QuantizedTensor):
            inner = value.encoding
            assert len(inner.block) == 2
            if all(b == FULL for b in inner.block):
                return QuantizedTensor(inner, value.codes[first:last], scale=value.scale)
            return slice_quantized(value, range(first, last))
        records = value.reshape(-(-total // own), -1)[first:last]
        return records.reshape(param_shape(chunk_shape(shape, rows), block))

    params = {k: cut(v, q.shape, q.encoding.block) for k, v in q.params().items()}
    return QuantizedTensor(q.encoding, slice_rows(q.codes, rows), **params)


class DictSource:
    """Tensors in memory; gives copies in the scratch buffers, as a reader of files does."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor | QuantizedTensor], ties: Mapping[str, str] | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self.info = ModelInfo("model.raw")
        self.reads: list[tuple[str, range]] = []
        self.fail_after: int | None = None
        self._ties = dict(ties or {})
        self._lock = threading.Lock()

    def specs(self) -> list[TensorSpec]:
        found = []
        for name, value in self.tensors.items():
            quantized = isinstance(value, QuantizedTensor)
            dtype = "float32" if quantized else dtype_name(value.dtype)
            encoding = value.encoding if quantized else None
            found.append(TensorSpec(name, tuple(value.shape), dtype, encoding, tied_to=self._ties.get(name)))
        return found

    def read(self, name: str, rows: range, scratch: Any = None) -> torch.Tensor | QuantizedTensor:
        with self._lock:
            self.reads.append((name, rows))
            if self.fail_after is not None and len(self.reads) > self.fail_after:
                raise SourceError(f"model.raw: {name}: the file shrank while it was being read")
        value = self.tensors[name]
        if isinstance(value, QuantizedTensor):
            return slice_quantized(value, rows)
        chunk = slice_rows(value, rows)
        if scratch is None:
            return chunk
        return scratch.take("source", tuple(chunk.shape), chunk.dtype).copy_(chunk)

    def close(self) -> None:
        pass


@dataclass
class Tiny:
    """Absmax quantization, as plainly as it can be written. ``spoil`` changes what it gives."""

    bits: int = 8
    group: int = 0  #: 0 is per channel, -1 per tensor
    kind: str = "symmetric"  #: "symmetric", "zero_point", "offset", "float8", "nested"
    scale_dtype: str = "float32"
    whole: bool = False
    keeps_zero: bool = True
    idempotent: bool = True
    nearest: bool = True
    spoil: Callable[[QuantizedTensor, Context], QuantizedTensor] | None = None
    seen: list[tuple[range, float | None]] = field(default_factory=list)

    def encoding(self, ndim: int) -> Encoding:
        block = per_tensor(ndim) if self.group < 0 else per_group(ndim, self.group) if self.group else per_channel(ndim)
        unsigned, signed = integer(self.bits, signed=False), integer(self.bits)
        if self.kind == "zero_point":
            return Encoding(unsigned, block, self.scale_dtype, zero_point=unsigned)
        if self.kind == "offset":
            return Encoding(unsigned, block, self.scale_dtype, offset=self.scale_dtype)
        if self.kind == "float8":
            return Encoding(FLOAT8, block, self.scale_dtype)
        if self.kind == "nested":
            return Encoding(signed, block, Encoding(integer(8), per_tensor(ndim), "float32"))
        return Encoding(signed, block, self.scale_dtype)

    def propose(self, spec: TensorSpec) -> Proposal:
        absmax = self.group < 0 or self.kind == "nested"
        needs = {*(("absmax",) if absmax else ()), *(("whole",) if self.whole else ())}
        return Proposal(self.encoding(len(spec.shape)), needs=frozenset(needs))

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        return False

    def fingerprint(self) -> str:
        return f"{self.bits} {self.group} {self.kind} {self.scale_dtype} {self.whole}"

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        self.seen.append((context.rows, context.absmax))
        x, shape, block = rows.float(), tuple(rows.shape), encoding.block
        grid = param_shape(shape, block)
        low, high = encoding.codes_range
        extents = tuple(n if b == FULL else b for n, b in zip(shape, block, strict=True))
        padded = torch.nn.functional.pad(
            x, [p for n, b in zip(shape[::-1], extents[::-1], strict=True) for p in (0, -n % b)]
        )
        split = [e for g, b in zip(grid, extents, strict=True) for e in (g, b)]
        inner = tuple(range(1, 2 * len(shape), 2))
        blocks = padded.reshape(split)
        absmax = (
            blocks.abs().amax(inner)
            if context.absmax is None or self.kind == "nested"
            else torch.full(grid, context.absmax)
        )
        params: dict[str, Any] = {}
        if self.kind in ("zero_point", "offset"):
            smallest = blocks.amin(inner) if self.kind == "offset" else blocks.amin(inner).clamp(max=0)
            largest = blocks.amax(inner) if self.kind == "offset" else blocks.amax(inner).clamp(min=0)
            scale = ((largest - smallest) / (high - low)).to(dtype_of(self.scale_dtype))
            safe = torch.where(scale == 0, 1, scale).float()
            if self.kind == "offset":
                params["offset"] = smallest.to(dtype_of(self.scale_dtype))
                shift = -params["offset"].float() / safe
            else:
                shift = (-smallest / safe).round().clamp(low, high)
                params["zero_point"] = shift.to(torch.uint8)
            params["scale"] = scale
        elif self.kind == "nested":
            assert context.absmax is not None
            outer = context.absmax / high / 127
            codes = torch.ceil(absmax / high / outer).clamp(1, 127) if outer else torch.ones(grid)
            inner_scale = torch.full((1,) * len(shape), outer)
            params["scale"] = QuantizedTensor(encoding.scale, codes.to(torch.int8), inner_scale)
            safe, shift = codes * outer if outer else torch.ones(grid), torch.zeros(grid)
        else:
            top = 448.0 if self.kind == "float8" else high
            params["scale"] = scale = (absmax / top).to(dtype_of(self.scale_dtype))
            safe, shift = torch.where(scale == 0, 1, scale).float(), torch.zeros(grid)
        levels = x / expand(safe, shape, block)
        if self.kind == "float8":
            codes = levels.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            codes = (levels + expand(shift, shape, block)).round().clamp(low, high)
            codes = codes.to(torch.int8 if encoding.element.signed else torch.uint8)
        q = QuantizedTensor(encoding, codes, **params)
        return q if self.spoil is None else self.spoil(q, context)


class RawExporter:
    """One file: magic, arrays at multiples of 64, a tail. 4-bit codes are two in a byte, in pairs along a row."""

    name = "raw"

    def __init__(
        self, outputs: Sequence[Output | Drop] | None = None, held: Mapping[str, Encoding] | None = None
    ) -> None:
        self._outputs, self._held = outputs, dict(held or {})
        self.folder = False
        self.spoil: Callable[[dict[str, torch.Tensor], range | int], Mapping[str, torch.Tensor]] | None = None
        self.sparing = False  #: parts per tensor come with the first rows only

    def fingerprint(self) -> str:
        return ""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        if self._outputs is not None:
            return self._outputs
        return [Output(s.name, s.shape, s.dtype, (s.name,)) for s in specs]

    def verdict(self, out: Output, proposal: Proposal | None) -> Held:
        encoding = proposal.encoding if proposal is not None and isinstance(proposal.encoding, Encoding) else None
        if out.name in self._held:
            return Repacks("raw", self._held[out.name], exact=False)
        return Holds("raw", encoding)

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        return list(self._parts(out.name, out.shape, held.encoding, lambda n: n))

    def _parts(self, name: str, shape: tuple[int, ...], encoding: Encoding, rows: Callable[[int], int]) -> Any:
        packed = packs(encoding.element, shape)
        stored = (*shape[:-1], shape[-1] // 2) if packed else shape
        signed = encoding.element.kind == "int" and encoding.element.signed and not packed
        yield Part(f"{name}.codes", "int8" if signed else "uint8", stored, rows=rows(1))
        wide = all(b == FULL for b in encoding.block)
        own = rows(block_rows(shape, encoding.block))
        for label, param in encoding.params():
            grid = param_shape(shape, encoding.block)
            if isinstance(param, Encoding):
                yield from self._parts(f"{name}.{label}", grid, param, lambda n, own=own: n * own)
            else:
                dtype = param if isinstance(param, str) else "int8" if param.signed else "uint8"
                yield Part(f"{name}.{label}", dtype, grid, "tensor" if wide else "rows", rows=1 if wide else own)

    def pack(self, rows: Any, out: Output, held: Held, first_row: int) -> Mapping[str, torch.Tensor]:
        if isinstance(rows, torch.Tensor):
            found = {out.name: rows.contiguous()}
        else:
            found = {}
            self._pack(out.name, rows, found)
        if self.sparing and first_row:
            tensor_wide = {p.name for p in self.parts(out, held) if p.per == "tensor"}
            found = {k: v for k, v in found.items() if k not in tensor_wide}
        return found if self.spoil is None else self.spoil(found, first_row)

    def _pack(self, name: str, q: QuantizedTensor, found: dict[str, torch.Tensor]) -> None:
        codes = q.codes.contiguous()
        if packs(q.encoding.element, q.shape):
            pairs = codes.to(torch.int16).reshape(*q.shape[:-1], -1, 2) & 15
            codes = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        found[f"{name}.codes"] = codes
        for label, value in q.params().items():
            if isinstance(value, QuantizedTensor):
                self._pack(f"{name}.{label}", value, found)
            else:
                found[f"{name}.{label}"] = value.contiguous()

    def unpack(self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int) -> Any:
        if held.encoding is None:
            return parts[out.name]
        return self._unpack(out.name, parts, held.encoding)

    def _unpack(self, name: str, parts: Mapping[str, torch.Tensor], encoding: Encoding) -> QuantizedTensor:
        codes = parts[f"{name}.codes"]
        if codes.dtype == torch.uint8 and encoding.element.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
            if encoding.element.signed:
                codes = ((codes.to(torch.int8) + 8) % 16 - 8).to(torch.int8)
        params = {
            label: self._unpack(f"{name}.{label}", parts, p) if isinstance(p, Encoding) else parts[f"{name}.{label}"]
            for label, p in encoding.params()
        }
        return QuantizedTensor(encoding, codes, **params)

    def files(self, layout: FileLayout) -> list[FilePlan]:
        if not self.folder:
            return [self._file("", layout.outputs)]
        half = -(-len(layout.outputs) // 2)
        return [
            self._file("one.safetensors", layout.outputs[:half]),
            self._file("two.safetensors", layout.outputs[half:]),
            FilePlan("config.json", b"{}"),
            *(
                FilePlan(name, copy_of=path, copy_nbytes=path.stat().st_size)
                for name, path in layout.info.side_files.items()
            ),
        ]

    def _file(self, path: str, outputs: Sequence[Placed]) -> FilePlan:
        offset, parts = len(MAGIC), []
        for placed in outputs:
            for part in placed.parts:
                offset = -(-offset // 64) * 64
                parts.append(PartAt(placed.output.name, part.name, offset, part.nbytes))
                offset += part.nbytes
        return FilePlan(path, MAGIC, tuple(parts), TAIL)


def packs(element: ElementType, shape: tuple[int, ...]) -> bool:
    return element.bits == 4 and shape[-1] % 2 == 0


def make_plan(
    source: DictSource,
    exporter: RawExporter | None,
    schemes: Mapping[str, Tiny] | None = None,
    actions: Mapping[str, str] | None = None,
) -> Plan:
    """A plan by hand: schemes and actions by the name of a tensor; what has neither is kept."""
    schemes, actions = dict(schemes or {}), dict(actions or {})
    specs = {s.name: s for s in source.specs()}
    decisions, dropped = [], {n for n, a in actions.items() if a == "drop"}
    outputs = (exporter or RawExporter()).outputs([s for s in specs.values() if s.name not in dropped], source.info)
    steps = []
    for out in outputs:
        assert isinstance(out, Output)
        inputs = tuple(specs[n] for n in out.inputs)
        scheme = next((schemes[n] for n in out.inputs if n in schemes), None)
        proposal = None
        if scheme is not None:
            action = "quantize"
            proposal = scheme.propose(dataclasses.replace(inputs[0], shape=out.shape, encoding=None))
        elif inputs and inputs[0].encoding is not None and actions.get(inputs[0].name) != "dequantize":
            action, proposal = "keep", Proposal(inputs[0].encoding)
        else:
            default = "derive" if out.transform else "cast" if out.dtype != inputs[0].dtype else "keep"
            action = next((actions[n] for n in out.inputs if n in actions), default)
        held = exporter.verdict(out, proposal) if exporter else Holds("", proposal.encoding if proposal else None)
        parts = tuple(exporter.parts(out, held)) if exporter else ()
        steps.append(Step(Placed(out, proposal, held, parts), inputs, action, "test", "tiny", scheme))
    for spec in specs.values():
        decisions.append(Decision(spec, actions.get(spec.name, "quantize" if spec.name in schemes else "keep"), "test"))
    files = tuple(exporter.files(FileLayout(tuple(s.placed for s in steps), source.info))) if exporter else ()
    return Plan(source.info, tuple(decisions), tuple(steps), files, "raw" if exporter else "", exporter)


def read_part(plan: Plan, path: Path, output: str, part: str = "") -> np.ndarray:
    """An array of the file, read by its offset alone."""
    name = part or output
    for file in plan.files:
        for at in file.parts:
            if (at.output, at.part) == (output, name):
                data = (path / file.path if file.path else path).read_bytes()[at.offset : at.offset + at.nbytes]
                step = next(s for s in plan.steps if s.placed.output.name == output)
                known = next(p for p in step.placed.parts if p.name == name)
                dtype = {"bfloat16": "uint16"}.get(known.dtype, known.dtype)
                return np.frombuffer(data, dtype).reshape(known.shape)
    raise KeyError(name)


def read_back(plan: Plan, path: Path, output: str) -> torch.Tensor | QuantizedTensor:
    """An output as the format's reader sees it."""
    step = next(s for s in plan.steps if s.placed.output.name == output)
    parts = {}
    for part in step.placed.parts:
        raw = torch.from_numpy(read_part(plan, path, output, part.name).copy())
        parts[part.name] = raw.view(dtype_of(part.dtype)) if part.dtype == "bfloat16" else raw
    return plan.exporter.unpack(parts, step.placed.output, step.placed.held, 0)


def same_rows(q: QuantizedTensor) -> int:
    return quantum(q.shape, q.encoding)


__all__ = [name for name in globals() if not name.startswith("_")] + ["decode"]

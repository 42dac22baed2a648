"""Weights and encodings that break things, and a model in memory that counts what is read of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FULL,
    INT4,
    INT8,
    UINT2,
    UINT4,
    UINT8,
    ElementType,
    Encoding,
    Param,
    codebook,
    integer,
    param_shape,
    per_channel,
    per_group,
    per_tensor,
)
from monoquant_core.errors import EncodingError
from monoquant_core.kinds import annotate
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.rows import Shape, all_rows, chunk_shape
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import ParamValue, QuantizedTensor, decode, dtype_name, dtype_of

#: every tensor of the samples is called that, unless the sample says otherwise
NAME = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class ShapeSample:
    """A shape that a weight may have."""

    name: str
    shape: Shape
    kind: str
    module: str = ""

    def spec(self, dtype: str = "float32") -> TensorSpec:
        """The tensor as a source would describe it."""
        return TensorSpec(NAME, self.shape, dtype, kind=self.kind, module=self.module)


SHAPES = (
    ShapeSample("matrix", (24, 256), "linear", "Linear"),
    ShapeSample("one row", (1, 256), "linear", "Linear"),
    ShapeSample("one column", (24, 1), "linear", "Linear"),
    ShapeSample("odd row", (6, 77), "linear", "Linear"),
    ShapeSample("transposed matrix", (128, 16), "linear_transposed", "Conv1D"),
    ShapeSample("vector", (64,), "vector"),
    ShapeSample("scalar", (), "vector"),
    ShapeSample("experts", (3, 8, 128), "experts"),
    ShapeSample("convolution 1d", (8, 16, 5), "conv", "Conv1d"),
    ShapeSample("convolution 2d", (8, 16, 3, 3), "conv", "Conv2d"),
    ShapeSample("convolution 3d", (4, 8, 2, 2, 2), "conv", "Conv3d"),
    ShapeSample("transposed convolution", (8, 6, 3, 3), "conv_transpose", "ConvTranspose2d"),
    ShapeSample("embedding", (10, 64), "embedding", "Embedding"),
    ShapeSample("no rows", (0, 64), "linear", "Linear"),
    ShapeSample("no columns", (4, 0), "linear", "Linear"),
)


def generator(seed: int) -> torch.Generator:
    """A random generator that gives the same numbers every time."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Shape, seed: int = 0) -> torch.Tensor:
    """Weights of an ordinary layer: float32, standard deviation 0.02."""
    return torch.randn(shape, generator=generator(seed)) * 0.02


def _zero_block(shape: Shape) -> torch.Tensor:
    values = normal(shape).reshape(-1)
    values[: values.numel() // 2] = 0
    return values.reshape(shape)


def _one_outlier(shape: Shape) -> torch.Tensor:
    values = normal(shape).reshape(-1)
    values[values.numel() // 3 : values.numel() // 3 + 1] = 1000.0
    return values.reshape(shape)


#: what a weight may hold; all finite, all within float16
VALUES: dict[str, Callable[[Shape], torch.Tensor]] = {
    "normal": normal,
    "all zero": torch.zeros,
    "half zero": _zero_block,
    "constant": lambda shape: torch.full(shape, 0.37),
    "negative constant": lambda shape: torch.full(shape, -0.37),
    "one outlier": _one_outlier,
    "subnormal": lambda shape: normal(shape) * 1e-40,
    "tiny": lambda shape: normal(shape) * 1e-6,
    "large": lambda shape: (normal(shape) * 3e6).clamp(-6e4, 6e4),
    "all positive": lambda shape: normal(shape).abs() + 1.0,
    "all negative": lambda shape: -(normal(shape).abs() + 1.0),
    "two values": lambda shape: torch.where(normal(shape) > 0, 1.0, -1.0),
    "negative zero": lambda shape: torch.full(shape, -0.0),
}

#: the 16 quantiles of QLoRA, appendix E (arXiv:2305.14314), as in bitsandbytes' csrc/kernels.cu
NF4 = codebook(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)

#: a type that no format and no scheme has heard of
NEVER_HEARD_OF = codebook("kit_five_values", (-4.0, -1.0, 0.0, 2.0, 8.0))

_K = Encoding(integer(6, signed=False), (1, 8), "float16")

#: one of every family of formats, for a matrix
ENCODINGS: dict[str, Encoding] = {
    "int8 per tensor": Encoding(INT8, per_tensor(2), "float32"),
    "int8 per channel": Encoding(INT8, per_channel(2), "float32"),
    "int8 per channel bfloat16": Encoding(INT8, per_channel(2), "bfloat16"),
    "int8 per column": Encoding(INT8, per_channel(2, 1), "float32"),
    "int8 per group": Encoding(INT8, per_group(2, 32), "float32"),
    "int8 per channel asymmetric": Encoding(UINT8, per_channel(2), "float32", zero_point=UINT8),
    **{f"int{n} group 64": Encoding(integer(n), per_group(2, 64), "float32") for n in range(2, 8)},
    "int4 per channel": Encoding(INT4, per_channel(2), "float32"),
    "int4 group 128": Encoding(INT4, per_group(2, 128), "float16"),
    "int4 group 32 bfloat16": Encoding(INT4, per_group(2, 32), "bfloat16"),
    "int4 group 128 asymmetric": Encoding(UINT4, per_group(2, 128), "float16", zero_point=UINT4),
    "hqq": Encoding(UINT4, per_group(2, 64), "float16", zero_point="float16"),
    "hqq zeros quantized": Encoding(UINT4, per_group(2, 64), "float16", Encoding(UINT8, (1, FULL), "float16")),
    "fp8 per tensor": Encoding(FLOAT8_E4M3FN, per_tensor(2), "float32"),
    "fp8 per channel": Encoding(FLOAT8_E4M3FN, per_channel(2), "float32"),
    "fp8 e5m2": Encoding(FLOAT8_E5M2, per_channel(2), "float32"),
    "fp8 16x128": Encoding(FLOAT8_E4M3FN, (16, 128), "float32"),
    "nf4": Encoding(NF4, (1, 64), "float32"),
    "nf4 double": Encoding(NF4, (1, 64), Encoding(INT8, (256,), "float32", offset="float32")),
    "mxfp4": Encoding(FLOAT4_E2M1FN, per_group(2, 32), FLOAT8_E8M0FNU),
    "mxfp8": Encoding(FLOAT8_E4M3FN, per_group(2, 32), FLOAT8_E8M0FNU),
    "nvfp4": Encoding(FLOAT4_E2M1FN, per_group(2, 16), Encoding(FLOAT8_E4M3FN, per_tensor(2), "float32")),
    "Q8_0": Encoding(INT8, (1, 32), "float16"),
    "Q4_0": Encoding(INT4, (1, 32), "float16"),
    "Q4_1": Encoding(UINT4, (1, 32), "float16", offset="float16"),
    "Q4_K": Encoding(UINT4, (1, 32), _K, offset=_K),
    "Q6_K": Encoding(integer(6), (1, 16), Encoding(INT8, (1, 16), "float16")),
    "Q2_K": Encoding(UINT2, (1, 16), Encoding(UINT4, (1, 16), "float16"), offset=Encoding(UINT4, (1, 16), "float16")),
    "three values": Encoding(integer(2), (1, 256), "float16", clip=(-1, 1)),
    "unknown codebook": Encoding(NEVER_HEARD_OF, per_channel(2), "float32"),
    "flattened group": Encoding(INT8, (64,), "float32"),
}


def for_rank(encoding: Encoding, rank: int) -> Encoding | None:
    """The same family for a tensor of another rank: more axes before the last two, the block one index wide on them."""
    if len(encoding.block) == 1 or rank == len(encoding.block):
        return encoding
    return _lifted(encoding, rank) if rank > len(encoding.block) else None


def _lifted(encoding: Encoding, rank: int) -> Encoding:
    if len(encoding.block) == 1:
        return encoding
    extra = FULL if all(b == FULL for b in encoding.block) else 1
    params: dict[str, Any] = {
        label: _lifted(p, rank) if isinstance(p, Encoding) else p for label, p in encoding.params()
    }
    return replace(encoding, block=(extra,) * (rank - len(encoding.block)) + encoding.block, **params)


def quantized(encoding: Encoding, shape: Shape, seed: int = 0) -> QuantizedTensor:
    """A tensor of random codes, every one of them finite and in range, with sensible parameters."""
    grid = param_shape(shape, encoding.block)
    codes = _codes(encoding.element, encoding.codes_range, shape, seed)
    scale = _param(encoding.scale, grid, seed + 1, "scale", encoding)
    zero_point = offset = None
    if encoding.zero_point is not None:
        zero_point = _param(encoding.zero_point, grid, seed + 2, "zero_point", encoding)
    if encoding.offset is not None:
        offset = _param(encoding.offset, grid, seed + 3, "offset", encoding)
    return QuantizedTensor(encoding, codes, scale, zero_point, offset)


def _codes(
    element: ElementType, limits: tuple[int, int], shape: Shape, seed: int, *, positive: bool = False
) -> torch.Tensor:
    """Random codes of finite values; ``positive``: of the ordinary positive numbers that scales are."""
    codes = torch.arange(limits[0], limits[1] + 1)
    values = decode(codes, element)
    codes = codes[(values > 2**-12) & (values < 2**12) if positive else values.isfinite()]
    drawn = codes[torch.randint(0, len(codes), shape, generator=generator(seed))]
    if element.kind == "int" and element.signed:
        return drawn.to(torch.int8 if element.bits <= 8 else torch.int16)
    return drawn.to(torch.uint8 if element.bits <= 8 else torch.int32)


def _param(spec: Param, grid: Shape, seed: int, role: str, parent: Encoding) -> ParamValue:
    positive = role == "scale"
    if isinstance(spec, Encoding):
        codes = _codes(spec.element, spec.codes_range, grid, seed, positive=positive)
        return replace(quantized(spec, grid, seed), codes=codes)
    if isinstance(spec, ElementType):
        return _codes(spec, spec.code_range, grid, seed, positive=positive)
    uniform = torch.rand(grid, generator=generator(seed))
    if role == "scale":
        values = uniform * 0.02 + 0.01
    elif role == "zero_point":
        low, high = parent.codes_range
        values = low + uniform * (high - low)
    else:
        values = uniform - 0.5
    return values.to(dtype_of(spec))


def take_rows(tensor: torch.Tensor | QuantizedTensor, rows: range) -> torch.Tensor | QuantizedTensor:
    """The rows of a tensor as one chunk of its rank (see ``rows.py``), with the parameters that belong to them.

    :raises EncodingError: for rows that are no whole blocks.
    """
    shape = tuple(tensor.shape)
    if rows == all_rows(shape):
        return tensor
    box = _box(shape, rows)
    if isinstance(tensor, torch.Tensor):
        return tensor[box]
    return _take_box(tensor, box)


def _box(shape: Shape, rows: range) -> tuple[slice, ...]:
    """The index that a range of rows is: a start and an extent on every axis."""
    extents = chunk_shape(shape, rows)
    starts, rest = [0] * len(shape), rows.start
    for axis in range(len(shape) - 2, -1, -1):
        rest, starts[axis] = divmod(rest, shape[axis])
    return tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True))


def _take_box(tensor: QuantizedTensor, box: tuple[slice, ...]) -> QuantizedTensor:
    encoding, shape = tensor.encoding, tensor.shape
    if len(encoding.block) == len(shape):
        logical, extents = box, shape
    elif len(encoding.block) == 2:  # [out, in * k * k]: whole output channels only
        logical = (box[0], slice(0, math.prod(shape[1:])))
        extents = (shape[0], math.prod(shape[1:]))
    else:
        first = torch.arange(math.prod(shape)).reshape(shape)[box].reshape(-1)
        logical, extents = (slice(int(first[0]), int(first[-1]) + 1),), (math.prod(shape),)
    grid_box = []
    for part, n, b in zip(logical, extents, encoding.block, strict=True):
        size = n if b == FULL else b
        if part.start % size or (part.stop % size and part.stop != n):
            if b != FULL:
                raise EncodingError(f"{part.start}:{part.stop} are no whole blocks of {size}")
            grid_box.append(slice(0, 1))  # a parameter of the whole axis comes with every chunk
        else:
            grid_box.append(slice(part.start // size, -(-part.stop // size)))
    params = {
        label: _take_box(value, tuple(grid_box)) if isinstance(value, QuantizedTensor) else value[tuple(grid_box)]
        for label, value in tensor.params().items()
    }
    return QuantizedTensor(encoding, tensor.codes[box], **params)


class MemorySource:
    """A model in memory that notes every read; safe for several threads.

    :param fail_after: reads after which the next one fails, as a disk would.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor | QuantizedTensor],
        info: ModelInfo | None = None,
        *,
        specs: Sequence[TensorSpec] = (),
        fail_after: int | None = None,
    ) -> None:
        self.info = info or ModelInfo("sample")
        self.reads: list[tuple[str, range]] = []
        self._tensors, self._fail_after, self._lock = dict(tensors), fail_after, threading.Lock()
        self._specs = list(specs) or annotate([describe(n, t) for n, t in self._tensors.items()], self.info)

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor."""
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor.

        :raises InjectedError: after ``fail_after`` reads.
        """
        with self._lock:
            self.reads.append((name, rows))
            if self._fail_after is not None and len(self.reads) > self._fail_after:
                raise InjectedError(f"read {len(self.reads)} fails")
        return take_rows(self._tensors[name], rows)

    def close(self) -> None:
        """Nothing to release."""

    def times_read(self, name: str) -> int:
        """How often the row that was read most often was read.

        :raises AssertionError: when some row was never read.
        """
        shape = tuple(self._tensors[name].shape)
        counts = [0] * len(all_rows(shape))
        for read, rows in self.reads:
            if read == name:
                for row in rows:
                    counts[row] += 1
        assert all(counts), f"{name}: rows {[i for i, c in enumerate(counts) if not c][:5]} were never read"
        return max(counts, default=1)


class InjectedError(Exception):
    """The failure of a read that a test asked for."""


def describe(name: str, tensor: torch.Tensor | QuantizedTensor) -> TensorSpec:
    """What a source says of a tensor."""
    if isinstance(tensor, QuantizedTensor):
        return TensorSpec(name, tensor.shape, "float32", tensor.encoding)
    return TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype))


def fitting(shape: Shape) -> Iterator[tuple[str, Encoding]]:
    """The sample encodings that a tensor of this shape can have."""
    for name, encoding in ENCODINGS.items():
        lifted = for_rank(encoding, len(shape))
        with suppress(EncodingError):
            if lifted is not None and param_shape(shape, lifted.block):
                yield name, lifted

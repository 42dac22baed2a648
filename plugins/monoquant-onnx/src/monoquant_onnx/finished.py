"""A finished file on a graph: the graph's weights are the file's codes, which nothing quantizes again.

Tensors are found by name, or, where a format has names of its own, by what they hold. Weights of MatMul lie as
``[inputs, outputs]`` in graphs, so codes and parameters are transposed when they are read; a BatchNorm that was folded
into a convolution goes into the scales. Every chunk is compared with the graph's own weight: a file of another model,
or one whose rows are in another order, is refused.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monoquant_core import rows as r
from monoquant_core.containers.entries import tensor_at
from monoquant_core.encoding import FULL, Encoding, Param
from monoquant_core.errors import SourceError
from monoquant_core.model import Source, TensorSpec

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import ParamValue, QuantizedTensor
    from monoquant_onnx.source import OnnxSource

SAMPLE = 8  #: rows by which tensors of other names are found
ALIKE = 0.9  #: cosine from which a tensor of another name is the graph's; two bits per weight have 0.9 to 0.95
SAME = 0.5  #: cosine below which a tensor of the same name is another one; that of unrelated weights is about 0


class GraphedSource:
    """A graph whose specs carry the encodings of a finished file, and whose reads give its codes.

    Floats are the graph's own.

    :raises SourceError: when no quantized tensor of the file is in the graph, or one cannot lie as the graph needs it.
    """

    def __init__(self, graph: OnnxSource, finished: Source) -> None:
        self._graph, self._finished = graph, finished
        self._whole: dict[str, QuantizedTensor] = {}  # the tensor that was transposed last
        self._lock = threading.Lock()
        floats = {spec.name: spec for spec in graph.specs() if spec.tied_to is None}
        quantized = {spec.name: spec for spec in finished.specs() if spec.encoding is not None and spec.tied_to is None}
        if not quantized:
            raise SourceError(f"{finished.info.name}: holds no quantized tensors to put onto {graph.info.name}")
        #: tensor of the graph -> tensor of the file
        self.matches = {
            name: name for name, spec in floats.items() if name in quantized and _fits(spec, quantized[name])
        }
        rest = {n: s for n, s in quantized.items() if n not in self.matches.values()}
        self.matches.update(self._by_content({n: s for n, s in floats.items() if n not in self.matches}, rest))
        if not self.matches:
            raise SourceError(
                f"{finished.info.name}: none of its {len(quantized)} quantized tensors is one of {graph.info.name}",
                hint="the graph must be of the model that was quantized",
            )
        #: those that lie the other way round in the graph
        self._turned = {n for n, m in self.matches.items() if self._is_turned(floats[n], quantized[m])}
        self._specs = [self._spec(spec, quantized) for spec in graph.specs()]
        self._by_name, self._sources = {spec.name: spec for spec in self._specs}, quantized
        notes = [*graph.info.notes, *finished.info.notes]
        if lost := sorted(set(quantized) - set(self.matches.values())):
            notes.append(
                f"{finished.info.name}: quantized there and not found in the graph, whose own values are taken: "
                f"{', '.join(lost[:6])}{f' and {len(lost) - 6} more' if len(lost) > 6 else ''}"
            )
        self.info = dataclasses.replace(
            graph.info,
            name=finished.info.name,
            config=finished.info.config or graph.info.config,
            side_files=finished.info.side_files or graph.info.side_files,
            paths=(*finished.info.paths, *graph.info.paths),
            notes=tuple(dict.fromkeys(notes)),
        )

    def fingerprint(self) -> str | None:
        """What both say."""
        own: str | None = getattr(self._finished, "fingerprint", lambda: None)()
        graph = self._graph.fingerprint()
        return None if own is None or graph is None else f"{own} {graph}"

    def specs(self) -> Sequence[TensorSpec]:
        """The graph's tensors, with the file's encodings as they lie in the graph."""
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor as the graph has it.

        :raises SourceError: when a file cannot be read, or a tensor of the file is not the graph's.
        """
        if name not in self.matches:
            return self._graph.read(name, rows, scratch)
        spec, source = self._by_name[name], self._sources[self.matches[name]]
        tensor = self._chunk(spec, source, rows)
        if name in self._graph.graph.folded:
            factor, axis = self._graph.graph.folded[name]
            tensor = scaled(tensor, factor, axis, spec.shape, rows, tensor_at(self.info.name, source.name))
        if _cosine(tensor.dequantize(), _floats(self._graph.read(name, rows, scratch))) < SAME:
            raise SourceError(
                f"{tensor_at(self.info.name, source.name)}: is not {name} of the graph {self._graph.info.name}: "
                "their values have nothing in common",
                hint="the graph must be of the model that was quantized, with rows in the same order",
            )
        return tensor

    def close(self) -> None:
        """Close both."""
        self._whole.clear()
        self._graph.close()
        self._finished.close()

    def _spec(self, spec: TensorSpec, quantized: dict[str, TensorSpec]) -> TensorSpec:
        first = spec.tied_to or spec.name
        if first not in self.matches:
            return spec
        source = quantized[self.matches[first]]
        assert source.encoding is not None
        encoding = source.encoding
        where = tensor_at(self._finished.info.name, source.name)
        if first in self._turned:
            encoding = transposed(encoding, where)
        if first in self._graph.graph.folded:
            check_foldable(encoding, self._graph.graph.folded[first][1], where)
        return dataclasses.replace(spec, encoding=encoding, activation=source.activation)

    def _chunk(self, spec: TensorSpec, source: TensorSpec, rows: range) -> QuantizedTensor:
        if spec.name not in self._turned:
            return _quantized(self._finished.read(source.name, rows))
        with self._lock:
            if source.name not in self._whole:
                self._whole.clear()
                tensor = _quantized(self._finished.read(source.name, r.all_rows(source.shape)))
                assert spec.encoding is not None
                self._whole[source.name] = turn(tensor, spec.encoding)
            whole = self._whole[source.name]
        return cut(whole, rows)

    def _is_turned(self, spec: TensorSpec, source: TensorSpec) -> bool:
        """Whether a matrix lies the other way round in the graph: where it is square, its values say so."""
        if spec.shape != source.shape or len(spec.shape) != 2 or spec.shape[0] != spec.shape[1]:
            return spec.shape != source.shape
        assert source.encoding is not None
        rows = range(min(spec.shape[0], max(SAMPLE, r.quantum(source.shape, source.encoding))))
        theirs = _floats(self._finished.read(source.name, rows))
        return _cosine(theirs, _floats(self._graph.read(spec.name, rows))) < SAME

    def _by_content(self, floats: dict[str, TensorSpec], quantized: dict[str, TensorSpec]) -> dict[str, str]:
        """Matches of tensors that have other names: the same values, as far as quantization leaves them."""
        found: dict[str, str] = {}
        samples: dict[str, torch.Tensor] = {}
        for source in quantized.values():
            if len(source.shape) < 2:
                continue
            assert source.encoding is not None
            count = min(r.row_count(source.shape), max(SAMPLE, r.quantum(source.shape, source.encoding)))
            theirs = _floats(self._finished.read(source.name, _head(source.shape, count))).flatten()
            best, name = 0.0, ""
            for spec in floats.values():
                if spec.name in found or not _fits(spec, source):
                    continue
                if spec.name not in samples:
                    values = _floats(self._graph.read(spec.name, r.all_rows(spec.shape)))
                    turned = spec.shape != source.shape or (len(spec.shape) == 2 and spec.transposed)
                    ours = values.T if turned else values.reshape(-1, values.shape[-1])
                    samples[spec.name] = ours[:count].flatten().clone()
                if samples[spec.name].numel() == theirs.numel():
                    cosine = _cosine(theirs, samples[spec.name])
                    best, name = max((best, name), (cosine, spec.name))
            if best >= ALIKE:
                found[name] = source.name
        return found


def transposed(encoding: Encoding, where: str = "") -> Encoding:
    """The encoding of the transpose of a matrix.

    :raises SourceError: for one whose blocks run over the flattened matrix.
    """
    if len(encoding.block) != 2:
        raise SourceError(
            f"{where}: {encoding} cannot be transposed, as the graph needs it: its blocks are not of rows"
        )

    def param(value: Param | None) -> Param | None:
        return transposed(value, where) if isinstance(value, Encoding) else value

    scale = param(encoding.scale)
    assert scale is not None
    block = (encoding.block[1], encoding.block[0])
    return Encoding(
        encoding.element, block, scale, param(encoding.zero_point), param(encoding.offset), clip=encoding.clip
    )


def turn(tensor: QuantizedTensor, encoding: Encoding) -> QuantizedTensor:
    """The transpose of a quantized matrix; ``encoding`` is :func:`transposed` of its own."""
    from monoquant_core.tensor import QuantizedTensor

    params: dict[str, ParamValue] = {}
    for label, value in tensor.params().items():
        inner = getattr(encoding, label)
        params[label] = turn(value, inner) if isinstance(value, QuantizedTensor) else value.T.contiguous()
    return QuantizedTensor(encoding, tensor.codes.T.contiguous(), **params)


def cut(tensor: QuantizedTensor, rows: range) -> QuantizedTensor:
    """Rows of a quantized matrix, whole blocks."""
    from monoquant_core.tensor import QuantizedTensor

    extent = tensor.encoding.block[0]
    inner = range(tensor.shape[0] and 1) if extent == FULL else range(rows.start // extent, -(-rows.stop // extent))
    params: dict[str, ParamValue] = {
        label: cut(value, inner) if isinstance(value, QuantizedTensor) else value[inner.start : inner.stop]
        for label, value in tensor.params().items()
    }
    return QuantizedTensor(tensor.encoding, tensor.codes[rows.start : rows.stop], **params)


def check_foldable(encoding: Encoding, axis: int, where: str) -> None:
    """Whether every output channel has scales of its own, which a factor per channel can go into.

    :raises SourceError: naming the tensor when not.
    """
    if encoding.offset is not None or encoding.block[axis if len(encoding.block) > 1 else 0] != 1:
        raise SourceError(
            f"{where}: the graph has the BatchNorm behind it folded in, and {encoding} has no scale of every output "
            "channel to take that",
            hint="quantize the graph itself, or with --granularity channel",
        )
    if not isinstance(encoding.scale, str):
        raise SourceError(f"{where}: the graph has the BatchNorm behind it folded in, and its scales are codes")


def scaled(
    tensor: QuantizedTensor, factor: torch.Tensor, axis: int, shape: tuple[int, ...], rows: range, where: str
) -> QuantizedTensor:
    """Codes with their scales multiplied per output channel; a negative factor turns the codes round.

    :raises SourceError: for a code whose negative does not exist.
    """
    import torch

    from monoquant_core.containers.strided import first_index
    from monoquant_core.tensor import QuantizedTensor

    start = first_index(shape, rows)[axis]
    mine = factor[start : start + tensor.shape[axis]]

    def along(values: torch.Tensor, rank: int) -> torch.Tensor:
        return values.view([-1 if i == axis else 1 for i in range(rank)])

    assert isinstance(tensor.scale, torch.Tensor)
    scale = (tensor.scale.double() * along(mine.abs(), tensor.scale.ndim)).to(tensor.scale.dtype)
    negative = along(mine < 0, tensor.codes.ndim)
    low, high = tensor.encoding.element.code_range
    turned = high - tensor.codes.int() if low == 0 else -tensor.codes.int()
    if bool((negative & (turned > high)).any()):
        raise SourceError(f"{where}: holds the code {low}, which a BatchNorm with a negative factor cannot turn round")
    codes = torch.where(negative, turned, tensor.codes.int()).to(tensor.codes.dtype)
    params: dict[str, ParamValue] = {"scale": scale}
    if tensor.zero_point is not None:
        assert isinstance(tensor.zero_point, torch.Tensor)
        points = tensor.zero_point
        backwards = along(mine < 0, points.ndim)
        params["zero_point"] = torch.where(backwards, high - points.int(), points.int()).to(points.dtype)
    return QuantizedTensor(tensor.encoding, codes, **params)


def _fits(spec: TensorSpec, source: TensorSpec) -> bool:
    return spec.shape == source.shape or (len(spec.shape) == 2 and spec.shape[::-1] == source.shape)


def _head(shape: tuple[int, ...], count: int) -> range:
    return range(count) if len(shape) == 2 else r.all_rows(shape)


def _quantized(value: QuantizedTensor | torch.Tensor) -> QuantizedTensor:
    from monoquant_core.tensor import QuantizedTensor

    assert isinstance(value, QuantizedTensor)
    return value


def _floats(value: QuantizedTensor | torch.Tensor) -> torch.Tensor:
    from monoquant_core.tensor import QuantizedTensor

    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.flatten(), b.flatten().float()
    size = float(x.norm()) * float(y.norm())
    return float(x @ y) / size if size else 1.0

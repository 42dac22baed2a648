"""ONNX models as sources: their initializers are the tensors, and the graph comes along as ``info.graph``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from monoquant_core import kinds
from monoquant_core.containers.entries import tensor_at
from monoquant_core.declarations import NoOptions
from monoquant_core.encoding import Encoding
from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS, ModelInfo, TensorSpec
from monoquant_onnx.wire import read_structure

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import QuantizedTensor
    from monoquant_onnx.graph import OnnxGraph


class OnnxReader:
    """Opens .onnx files."""

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, path: Path) -> bool:
        """A file of that name is opened whatever is in it, so that the error says what is wrong with it."""
        return path.is_file()

    def open(self, path: Path) -> OnnxSource:
        """Read its structure."""
        return open_onnx(path)


def open_onnx(path: Path) -> OnnxSource:
    """An .onnx file, with its external data; weights stay in the file until they are read.

    :raises SourceError: naming the file and the tensor or node that is wrong.
    """
    structure = read_structure(path)
    try:
        from monoquant_onnx.fold import fold_batch_norms
        from monoquant_onnx.parsing import parse
        from monoquant_onnx.recognise import recognise

        graph = parse(structure, path)
        recognise(graph)
        notes = [*graph.notes, *fold_batch_norms(graph)]
        if gone := graph.tidy():
            notes.append(f"{path}: left out, nothing uses them: {_some(gone)}")
        graph.infer_shapes()
        for name, value in graph.model.graph.initializers.items():
            if name not in graph.data and value.dtype is not None and value.dtype.bitwidth < 8 and value.const_value:
                raise SourceError(
                    f"{tensor_at(path, name)}: {value.dtype.name.lower()} that no DequantizeLinear takes; not read"
                )
        graph.names = {name: name for name in graph.data}
        paths = tuple(structure.readers)
        info = ModelInfo(str(path), paths=paths, graph=graph, metadata=dict(graph.model.metadata_props))
        source = OnnxSource(
            dataclasses.replace(info, notes=tuple(notes)), close=structure.close, fingerprint=structure.fingerprint
        )
        source.specs()
    except BaseException:
        structure.close()
        raise
    return source


class OnnxSource:
    """The initializers of a graph, under the names that the model knows them by.

    :param fingerprint: tells the files of a graph that was read; a graph that was made in this process has none.
    :raises SourceError: naming the tensor that has a type or a shape that is not read.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        tied: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        close: object = None,
        fingerprint: str | None = None,
    ) -> None:
        self.info = info
        self._fingerprint = fingerprint
        self.graph: OnnxGraph = info.graph
        self._tied, self._modules, self._close = tied or {}, modules or {}, close
        self._specs: list[TensorSpec] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        from monoquant_onnx.data import readers_of

        return sum(reader.bytes_read for reader in readers_of(self.graph.data.values()))

    def fingerprint(self) -> str | None:
        """Tells the files of a graph that was read; None of one that was made in this process."""
        return self._fingerprint

    def specs(self) -> Sequence[TensorSpec]:
        """Every initializer that is no constant of the graph, in the order in which the graph uses them."""
        if self._specs is None:
            self._specs = describe(self.graph, self.info, self._tied, self._modules)
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor, as the graph has it: weights of MatMul are ``[inputs, outputs]``.

        :raises SourceError: when there is no such tensor, or its file cannot be read.
        """
        from monoquant_onnx.data import QuantizedData

        initializer = self.graph.names.get(self._tied.get(name, name))
        if initializer is None:
            raise SourceError(f"{tensor_at(self.info.name, name)}: there is none of this name")
        data = self.graph.data[initializer]
        return data.quantized(rows, scratch) if isinstance(data, QuantizedData) else data.read(rows, scratch)

    def close(self) -> None:
        """Close the files."""
        if callable(self._close):
            self._close()


def describe(
    graph: OnnxGraph, info: ModelInfo, tied: Mapping[str, str], modules: Mapping[str, str]
) -> list[TensorSpec]:
    """Specs of a graph's initializers."""
    from monoquant_onnx.data import QuantizedData, stored_bytes
    from monoquant_onnx.layers import kind_of_use, use_order

    order = use_order(graph)
    names = {initializer: name for name, initializer in graph.names.items()}
    specs: list[TensorSpec] = []
    for initializer in sorted(graph.data, key=lambda n: order.get(n, len(order))):
        name, data = names[initializer], graph.data[initializer]
        if data.dtype not in DTYPE_BITS:
            raise SourceError(f"{tensor_at(info.name, name)}: {data.dtype}, which is not read")
        encoding: Encoding | None = None
        activation = nbytes = None
        if isinstance(data, QuantizedData):
            encoding, activation, nbytes = data.encoding, data.activation, stored_bytes(data)
        spec = TensorSpec(name, data.shape, data.dtype, encoding, activation, nbytes_stored=nbytes)
        spec = dataclasses.replace(spec, module=modules.get(name, ""))
        specs.append(dataclasses.replace(spec, kind=kind_of_use(graph, initializer, spec, info)))
    for name, first in tied.items():
        original = next(spec for spec in specs if spec.name == first)
        specs.append(dataclasses.replace(original, name=name, tied_to=first, module=modules.get(name, "")))
    return kinds.annotate(specs, info)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

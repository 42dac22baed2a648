"""Models as the core sees them: named tensors, known without reading them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from monoquant_core.encoding import FLOAT_BITS, ActivationQuant, Encoding
from monoquant_core.errors import EncodingError

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import QuantizedTensor

#: bits per element of every dtype a tensor may have, by torch's names
DTYPE_BITS: dict[str, int] = {
    **FLOAT_BITS,
    **{"bool": 8, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32},
    **{"int64": 64, "uint64": 64, "complex32": 32, "complex64": 64, "complex128": 128},
    **{"float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8},
    "float4_e2m1fn_x2": 8,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor, known without reading it.

    :raises EncodingError: for an unknown dtype, an impossible shape, or an encoding that does not fit them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  #: torch's name; for a quantized tensor, what it dequantizes to
    encoding: Encoding | None = None  #: already quantized in the file
    activation: ActivationQuant | None = None  #: how the file says the layer's input is quantized at run time
    kind: str = ""  #: "linear", "conv", "conv_transpose", "embedding", "norm", ... (kinds.py); "" is unknown
    module: str = ""  #: class name of the module that owns it, where there is one: "Conv2d"
    tied_to: str | None = None  #: first name of the same storage
    fuse: str | None = None  #: same string, same scheme: "model.layers.0.self_attn.qkv"
    nbytes_stored: int | None = None  #: bytes in the file, where that is not what shape and dtype say

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise EncodingError(f"{self.name}: unknown dtype {self.dtype!r}")
        if not isinstance(self.shape, tuple) or any(type(n) is not int or n < 0 for n in self.shape):
            raise EncodingError(f"{self.name}: impossible shape {self.shape}")
        if self.encoding is not None:
            if not self.is_float:
                raise EncodingError(f"{self.name}: {self.encoding} stands for floats, not for {self.dtype}")
            self.encoding.check_weight()
            self.encoding.nbits(self.shape)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the source."""
        if self.nbytes_stored is not None:
            return self.nbytes_stored
        if self.encoding is not None:
            return -(-self.encoding.nbits(self.shape) // 8)
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def transposed(self) -> bool:
        """Whether it is a matrix that lies as ``[inputs, outputs]``."""
        return self.kind in ("linear_transposed", "head_transposed")

    @property
    def is_float(self) -> bool:
        """Whether its values are floats that a scheme may quantize."""
        return self.dtype in FLOAT_BITS


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a source carries beside tensors."""

    name: str  #: for messages: the path, or the module's class
    config: Mapping[str, Any] | None = None  #: config.json
    side_files: Mapping[str, Path] = field(default_factory=dict)  #: name in the folder -> file to copy
    paths: tuple[Path, ...] = ()  #: files the tensors come from; empty for a model in memory
    graph: Any = None  #: nn.Module, ExportedProgram or ONNX model, where there is one
    metadata: Mapping[str, str] = field(default_factory=dict)  #: of the container, such as safetensors' __metadata__
    notes: tuple[str, ...] = ()  #: what the reader wants said: "legacy .pt: read whole"
    made_files: Mapping[str, bytes] = field(default_factory=dict)  #: like side_files, made by the source

    @property
    def model_type(self) -> str | None:
        """``model_type`` of config.json: present in checkpoints of the transformers library."""
        value = (self.config or {}).get("model_type")
        return value if isinstance(value, str) else None


@runtime_checkable
class Source(Protocol):
    """Where tensors come from. ``info`` and ``specs`` read headers only, and import no torch where that is possible.

    More methods are optional. ``checkpoint() -> Source | None`` is for a file that has other names than the checkpoint
    it was made of: the same model under those names, with its config.json, for formats that are model folders; closing
    either closes both. ``shares_storage(name, other) -> bool`` says that two tied names are the same bytes in the file,
    so that they need not be compared. ``fingerprint() -> str | None`` tells what decides its tensors beside the paths,
    sizes and times of the files in ``info.paths``, such as their states when they were opened
    (``FileReader.fingerprint``); None, as without the method, where a later run could not tell that it reads the same:
    it then does not go on with one that was interrupted.
    """

    info: ModelInfo

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in a fixed order."""
        ...

    def read(self, name: str, rows: range, scratch: Scratch | None = None) -> QuantizedTensor | torch.Tensor:
        """The rows of a tensor as one chunk of its rank (see ``rows.py``), safe to call from several threads.

        :param scratch: buffers of the calling worker; the result may live in them until the worker's next read.
        :return: a tensor of ``spec.dtype``, or a QuantizedTensor where the spec has an encoding; not to be written to.
        :raises SourceError: when the file has changed, shrunk, or cannot be read; names the file and the tensor.
        """
        ...

    def close(self) -> None:
        """Release files. A closed source cannot be read."""
        ...


class SourceReader(Protocol):
    """Opens files of one kind: what a :class:`~monoquant_core.declarations.SourceDeclaration` names."""

    def recognises(self, path: Path) -> bool:
        """Whether it is a file of this kind, from a look at its header. Never raises for a malformed file."""
        ...

    def open(self, path: Path) -> Source:
        """Open it.

        :raises SourceError: naming the file and what is wrong.
        """
        ...

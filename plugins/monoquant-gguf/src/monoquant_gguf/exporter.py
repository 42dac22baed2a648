"""``--format gguf``: one file, with everything before the data known from names and shapes. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from monoquant_core.encoding import Encoding
from monoquant_core.errors import PlanError
from monoquant_core.exporters import (
    Drop,
    FileLayout,
    FilePlan,
    Held,
    Holds,
    Output,
    Part,
    PartAt,
    Placed,
    Refuses,
    Repacks,
    Verdict,
)
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.plugins import Registry
from monoquant_core.reencode import can_reencode
from monoquant_core.rows import chunk_shape, row_count, row_length
from monoquant_core.schemes import Proposal
from monoquant_gguf import architectures, tokenizers
from monoquant_gguf.architectures.base import Architecture, Model
from monoquant_gguf.container import MAX_DIMS, MAX_NAME, PLAIN, read_header
from monoquant_gguf.layouts import LAYOUTS, QUANTIZED, Layout, by_name, float_layout, layouts_for
from monoquant_gguf.metadata import ALIGNMENT, Metadata, Stored, header, offsets
from monoquant_gguf.plugin import GgufOptions
from monoquant_gguf.source import VERSION_KEY

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor

#: layout -> llama.cpp's number for a file that is mostly that (llama.h, llama_ftype); only shown to users
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12},
    **{
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
        "IQ4_NL": 25,
        "IQ4_XS": 30,
        "BF16": 32,
        "TQ1_0": 36,
        "TQ2_0": 37,
        "MXFP4": 38,
    },
}
QUANTIZATION_VERSION = 2  #: GGML_QNT_VERSION

_OUTTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_NUMBERS = {dtype: number for number, dtype in PLAIN.items()}
_TOO_MANY = f"a GGUF tensor has at most {MAX_DIMS} dimensions"


class GgufExporter:
    """Writes a ``.gguf`` file for llama.cpp."""

    name = "gguf"
    recipe = ""
    fuses = False  #: llama.cpp keeps q, k and v apart, so each may have a type of its own

    def __init__(
        self, options: GgufOptions, architecture: Architecture | None = None, model: Model | None = None
    ) -> None:
        self._options = options
        self._architecture = architecture
        self._model = model
        self._registry: Registry | None = None

    def use(self, registry: Registry) -> None:
        """Whose plugins bring architectures."""
        self._registry = registry

    def resolve(self, specs: Sequence[TensorSpec], info: ModelInfo) -> GgufExporter:
        """The exporter for this model.

        :raises PlanError: when llama.cpp does not know its architecture.
        """
        wanted = self._options.architecture
        if wanted.lower() == architectures.GENERIC or (wanted == "auto" and VERSION_KEY in info.metadata):
            return self
        model = Model(info, {spec.name: spec.shape for spec in specs}, info.side_files)
        return GgufExporter(self._options, architectures.find(info, wanted, self._registry), model)

    def fingerprint(self) -> str:
        """Nothing: what it knows of the model follows from config.json and shows in the plan."""
        return ""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        """llama.cpp's names, orders and changes of values; every tensor as it is where there is no architecture."""
        if self._architecture is None or self._model is None:
            return [Output(spec.name, spec.shape, spec.dtype, (spec.name,)) for spec in specs]
        return self._architecture.outputs(specs, self._model, self._dtype(specs))

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        """The ggml type that stores it."""
        if len(out.shape) > MAX_DIMS:
            return Refuses(_TOO_MANY)
        if len(out.name.encode()) > MAX_NAME:
            return Refuses(f"a GGUF name has at most {MAX_NAME} bytes")
        if proposal is None or isinstance(proposal.encoding, str):
            layout = float_layout(out.dtype)
            if layout is None and out.dtype not in _NUMBERS:
                return Refuses(f"ggml has no type for {out.dtype}")
            return Holds(layout.name if layout is not None else out.dtype, None)
        found = _quantized(out, proposal, proposal.encoding)
        if proposal.activation is None or isinstance(found, Refuses):
            return found
        return Refuses("GGUF stores weights only", Proposal(proposal.encoding, None, proposal.layout, proposal.needs))

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        """One part, of bytes where it is quantized."""
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        row = by_name(held.layout).row_bytes(row_length(out.shape))
        return [Part(out.name, "uint8", (*out.shape[:-1], row))]

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        """Blocks of ggml."""
        if held.encoding is None:
            return {out.name: rows.contiguous()}  # type: ignore[union-attr]
        from monoquant_gguf.blocks import pack

        return {out.name: pack(rows, by_name(held.layout)).contiguous()}

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        """Inverse of ``pack``. Parts may come flat."""
        raw = parts[out.name]
        if held.encoding is None:
            return raw
        from monoquant_gguf.blocks import unpack

        layout = by_name(held.layout)
        row = layout.row_bytes(row_length(out.shape))
        count = raw.numel() // row if row else row_count(out.shape)
        shape = chunk_shape(out.shape, range(first_row, first_row + count))
        return unpack(raw.reshape(count, row), layout, shape)

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        """One file."""
        tensors = [_stored(placed) for placed in layout.outputs]
        metadata, copied = self._metadata(layout)
        prefix = header(metadata, tensors, copied=copied)
        found, length = offsets(tensors)
        parts = tuple(
            PartAt(tensor.name, tensor.name, len(prefix) + at, tensor.nbytes)
            for tensor, at in zip(tensors, found, strict=True)
        )
        end = max((p.offset + p.nbytes for p in parts), default=len(prefix))
        return [FilePlan("", prefix, parts, bytes(len(prefix) + length - end))]

    def notes(self, layout: FileLayout) -> Sequence[str]:
        """What llama.cpp will not know."""
        if self._architecture is None or self._model is None:
            if VERSION_KEY in layout.info.metadata:
                return []
            return ["architecture generic: tensors keep their names, and llama.cpp does not load the file"]
        notes = [*self._architecture.notes(self._model)]
        if self._options.tokenizer == "auto":
            notes += tokenizers.write(self._model, _rows(layout), Metadata())
        if "generation_config.json" in layout.info.side_files:
            notes.append("GGUF does not hold generation_config.json: pass its sampling settings to llama.cpp")
        return notes

    def _dtype(self, specs: Sequence[TensorSpec]) -> str:
        if self._options.outtype != "auto":
            return _OUTTYPES[self._options.outtype]
        sizes: Counter[str] = Counter()
        for spec in specs:
            if spec.is_float and len(spec.shape) > 1:
                sizes[spec.dtype] += spec.numel
        return "bfloat16" if sizes and sizes.most_common(1)[0][0] == "bfloat16" else "float16"

    def _metadata(self, layout: FileLayout) -> tuple[Metadata, tuple[bytes, int]]:
        out = Metadata()
        arch = self._architecture
        copied = (b"", 0)
        if arch is None and VERSION_KEY in layout.info.metadata:
            copied = _pairs_of(layout.info)
        else:
            out.text("general.architecture", arch.name if arch is not None else architectures.GENERIC)
            out.text("general.type", "model")
            out.text("general.name", _title(layout.info.name))
        out.u32("general.file_type", _file_type(layout.outputs))
        out.u32("general.quantization_version", QUANTIZATION_VERSION)
        out.u32("general.alignment", ALIGNMENT)
        if arch is None or self._model is None:
            return out, copied
        arch.hyperparameters(self._model, out)
        if self._options.tokenizer == "none":
            tokenizers.write_none(_rows(layout), arch.name, out)
        else:
            tokenizers.write(self._model, _rows(layout), out)
            if arch.name == "llama":
                out.u32("llama.vocab_size", _rows(layout))
        return out, copied


def _quantized(out: Output, proposal: Proposal, encoding: Encoding) -> Verdict:
    row = row_length(out.shape)
    held = layouts_for(encoding)
    if held:
        chosen = next((x for x in held if proposal.layout == x.name), held[0])
        if row % chosen.block_size:
            return Refuses(
                f"rows of {row} are not whole blocks of {chosen.block_size} ({chosen.name})",
                hint="types with blocks of 32 may fit: Q4_0, Q5_0, Q8_0",
            )
        return Holds(chosen.name, chosen.encoding_for(len(out.shape)))
    reasons: list[str] = []
    found: list[tuple[bool, float, Layout]] = []
    for layout in QUANTIZED:
        if row % layout.block_size or layout.encoding is None:
            continue
        answer = can_reencode(encoding, layout.encoding_for(len(out.shape)), out.shape)
        if answer in ("exact", "rounds"):
            found.append((answer != "exact", layout.bits_per_weight, layout))
        elif layout.encoding.element == encoding.element:
            reasons.append(f"{layout.name}: {answer}")
    if not found:
        why = reasons[0] if reasons else f"no ggml type has codes of {encoding.element.name}"
        return Refuses(f"{encoding}: {why}" + ("" if reasons else f", for rows of {row}"))
    rounds, _, layout = min(found, key=lambda item: item[:2])
    return Repacks(layout.name, layout.encoding_for(len(out.shape)), exact=not rounds)


def _stored(placed: Placed) -> Stored:
    out, held = placed.output, placed.held
    number = _NUMBERS[held.layout] if held.layout in _NUMBERS else by_name(held.layout).ggml_type
    return Stored(out.name, out.shape, number, placed.parts[0].nbytes)


def _rows(layout: FileLayout) -> int:
    shape = next((p.output.shape for p in layout.outputs if p.output.name == "token_embd.weight"), None)
    if shape is None:
        raise PlanError(f"{layout.info.name}: no token embedding among the tensors, which llama.cpp needs")
    return shape[0]


def _file_type(outputs: Sequence[Placed]) -> int:
    sizes: Counter[str] = Counter()
    for placed in outputs:
        if len(placed.output.shape) > 1:
            sizes[placed.held.layout] += placed.output.numel
    names = [name for name, _ in sizes.most_common() if name in FILE_TYPES]
    return FILE_TYPES[names[0]] if names else FILE_TYPES[LAYOUTS[0].name]


def _title(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _pairs_of(info: ModelInfo) -> tuple[bytes, int]:
    """The pairs of the GGUF file that is the source, but for those that are written anew."""
    from monoquant_core.containers.reader import FileReader

    anew = {"general.file_type", "general.quantization_version", "general.alignment"}
    with FileReader(info.paths[0]) as reader:
        spans = [span for key, span in read_header(reader).spans.items() if key not in anew]
        return b"".join(reader.read(start, stop - start) for start, stop in spans), len(spans)

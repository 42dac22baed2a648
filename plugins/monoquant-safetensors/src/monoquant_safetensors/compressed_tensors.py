"""The compressed-tensors convention: model folders that transformers, vLLM and SGLang load.

Only ``pack`` and ``unpack`` import torch.

Per quantized Linear ``P`` the tensor ``P.weight`` becomes (docs/formats/safetensors.md):

=================  ===========================================================================================
pack-quantized     ``P.weight_packed`` int32 ``[N, ceil(K * bits / 32)]``, ``P.weight_scale``, ``P.weight_shape``
int-quantized      ``P.weight`` int8 ``[N, K]``, ``P.weight_scale``
float-quantized    ``P.weight`` float8_e4m3fn ``[N, K]``, ``P.weight_scale``
mxfp4-pack-...     ``P.weight_packed`` uint8 ``[N, K / 2]``, ``P.weight_scale`` uint8 (an exponent)
mxfp8-quantized    ``P.weight`` float8_e4m3fn ``[N, K]``, ``P.weight_scale`` uint8 (an exponent)
nvfp4-pack-...     ``P.weight_packed`` uint8 ``[N, K / 2]``, ``P.weight_scale`` float8_e4m3fn, ``P.weight_global_scale``
                   float32 ``[1]``, a divisor: only read, because its reciprocal is not exact
=================  ===========================================================================================

Scales are ``[N, groups]``, ``[N, 1]`` per channel, ``[1]`` per tensor. Zero points are ``P.weight_zero_point``: int32
packed along N beside packed weights, else int8. A static range of the input is ``P.input_scale`` ``[1]``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monoquant_core.encoding import FLOAT_BITS, FULL, ActivationQuant, ElementType, param_shape
from monoquant_core.errors import PlanError
from monoquant_core.exporters import (
    Drop,
    FileLayout,
    FilePlan,
    Held,
    Holds,
    Output,
    Part,
    Refuses,
    Repacks,
    Verdict,
)
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.reencode import can_reencode
from monoquant_core.schemes import Proposal
from monoquant_safetensors import arguments as ct
from monoquant_safetensors.config import Scheme, model_config, must_tie
from monoquant_safetensors.consumers import layout_notes, refuse_unloadable
from monoquant_safetensors.files import CONFIG, HELD_DTYPES, json_file, side_files, tensor_files, unsupported_dtype
from monoquant_safetensors.recipe import LINEAR_KINDS

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor

METHOD = "compressed-tensors"

#: modules that are an Embedding by any account; what else is called one may be a Linear
_LOOKED_UP = re.compile(r"(^|\.)(\w*embeddings|embed_tokens|wte|wpe|shared)$")

_REASONS = {
    "embedding": "transformers 5 fails to load quantized embeddings",
    "position": "transformers 5 fails to load quantized embeddings",
    "router": "runtimes hold routers as floats",
}


@dataclass(frozen=True, slots=True)
class HoldsStatic(Holds):
    """Also stores the range of the layer's input."""

    input: ActivationQuant | None = None


@dataclass(frozen=True, slots=True)
class RepacksStatic(Repacks):
    """Also stores the range of the layer's input."""

    input: ActivationQuant | None = None


class CompressedTensorsExporter:
    """Writes one folder: config.json, tensors, and copies of what lay beside the source's tensors."""

    name = "safetensors (compressed-tensors)"
    recipe = "linear"

    def __init__(self, max_shard: int, specs: Sequence[TensorSpec], info: ModelInfo) -> None:
        self._max_shard, self._info = max_shard, info
        self._specs = {spec.name: spec for spec in specs}

    def fingerprint(self) -> str:
        """Nothing: all of it shows in the plan."""
        return ""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        """Every tensor under its own name, but for buffers that models compute."""
        return [
            Drop(spec.name, "computed by the model; transformers does not expect it in a file")
            if spec.name.rpartition(".")[2] == "position_ids" and not spec.is_float
            else Output(spec.name, spec.shape, spec.dtype, (spec.name,))
            for spec in specs
        ]

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        """Linear weights in the widths and groups that a consumer loads, scales in the weight's own dtype."""
        if proposal is None or isinstance(proposal.encoding, str):
            return Holds(out.dtype, None) if out.dtype in HELD_DTYPES else unsupported_dtype(out.dtype)
        reason = self._not_linear(out)
        if reason:
            return _refuse(reason)
        encoding, activation = proposal.encoding, proposal.activation
        try:
            weights = ct.weights_of(encoding, out.shape, activation)
        except ct.ArgumentError as exc:
            return _refuse(f"compressed-tensors does not hold {encoding}: {exc}")
        if activation is not None:
            try:
                ct.activation_args(activation, weights)
            except ct.ArgumentError as exc:
                instead = Proposal(encoding, needs=proposal.needs)
                offered = None if isinstance(self.verdict(out, instead), Refuses) else instead
                return dataclasses.replace(_refuse(f"compressed-tensors: {exc}"), instead=offered)
        wanted = encoding
        if isinstance(encoding.scale, str) and encoding.scale != out.dtype and out.dtype in FLOAT_BITS:
            # Consumers multiply in the scale's dtype and create it in the model's.
            wanted = dataclasses.replace(encoding, scale=out.dtype)
        exact = can_reencode(encoding, wanted, out.shape) == "exact"
        notes = _notes(weights, out)
        if activation is not None and not activation.dynamic:
            if wanted == encoding:
                return HoldsStatic(weights.format, encoding, notes, activation)
            return RepacksStatic(weights.format, wanted, exact, notes, activation)
        if wanted == encoding:
            return Holds(weights.format, encoding, notes)
        return Repacks(weights.format, wanted, exact, notes)

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        """The tensors of one module, as the module's docstring lists them."""
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        return module_parts(out, held)

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        """Unsigned codes, dense and lowest bit first, in 32-bit words; other codes as they are."""
        if held.encoding is None:
            return {out.name: rows.contiguous()}  # type: ignore[union-attr]
        pack, _ = _packing()
        return pack(rows, out, held)

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        """Inverse of ``pack``."""
        if held.encoding is None:
            return parts[out.name]
        _, unpack = _packing()
        return unpack(parts, out, held)

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        """Tensors in shards, config.json with the quantization, and the source's side files.

        :raises MonoquantError: for what no consumer could load together.
        """
        if layout.destination.endswith(".safetensors"):
            raise PlanError(
                f"{layout.destination}: compressed-tensors is a folder with config.json and tokenizer",
                hint="name a folder, or write a single file with --convention generic",
            )
        schemes = _schemes(layout)
        refuse_unloadable(schemes, layout.info)
        config = model_config(schemes, self._float_modules(layout), layout)
        files = tensor_files(layout, "model", self._max_shard, lambda _: {"format": "pt"})
        return [*files, json_file(CONFIG, config), *side_files(layout.info)]

    def notes(self, layout: FileLayout) -> Sequence[str]:
        """What consumers do with the file as a whole."""
        schemes = _schemes(layout)
        tied = bool(schemes) and must_tie(layout)
        return layout_notes(schemes, self._float_modules(layout), layout.info.config or {}, tied=tied)

    def _not_linear(self, out: Output) -> str:
        """Why a tensor is not the weight of an nn.Linear; "" when it may be."""
        foreign = (self._info.config or {}).get("quantization_config")
        if isinstance(foreign, Mapping) and foreign.get("quant_method") != METHOD:
            method = foreign.get("quant_method")
            return f"the model is already quantized ({method!r} in config.json): start from its float checkpoint"
        spec = self._specs.get(out.inputs[0]) if out.inputs else None
        kind = spec.kind if spec is not None else ""
        if kind in _REASONS:
            return _REASONS[kind]
        if len(out.shape) != 2 or kind not in LINEAR_KINDS:
            what = kind.replace("_", " ") or f"a tensor of {len(out.shape)} axes"
            return f"{what}: compressed-tensors holds Linear layers only"
        if not out.name.endswith(".weight"):
            return "compressed-tensors holds the 'weight' of a Linear layer, and this has another name"
        return ""

    def _float_modules(self, layout: FileLayout) -> list[str]:
        """Modules that may be Linear and stay floats; ``ignore`` must list them, or consumers look for their codes."""
        modules = []
        kept = [placed.output.name for placed in layout.outputs if placed.held.encoding is None]
        for name in [*kept, *layout.ties]:
            spec, module = self._specs.get(name), name.removesuffix(".weight")
            if spec is not None and len(spec.shape) == 2 and module != name and not _LOOKED_UP.search(module):
                modules.append(module)
        return modules


@functools.cache
def _packing() -> tuple[Callable[..., dict[str, torch.Tensor]], Callable[..., QuantizedTensor]]:
    """Imported with the first chunk, because it imports torch; once, because that takes a microsecond."""
    from monoquant_safetensors.modules import pack, unpack

    return pack, unpack


def module_parts(out: Output, held: Held) -> list[Part]:
    """The tensors that one quantized weight ``[N, K]`` is stored as."""
    encoding = held.encoding
    assert encoding is not None
    n, k = out.shape
    prefix, bits = out.name.removesuffix("weight"), encoding.element.bits
    packed = {ct.PACKED: "int32", ct.MXFP4: "uint8", ct.NVFP4: "uint8"}.get(held.layout)
    if packed is not None:
        parts = [Part(f"{prefix}weight_packed", packed, (n, -(-k * bits // (32 if packed == "int32" else 8))))]
    else:
        parts = [Part(out.name, "int8" if held.layout == ct.INT else "float8_e4m3fn", (n, k))]
    grid = param_shape(out.shape, encoding.block)
    stored = "uint8" if isinstance(encoding.scale, ElementType) else str(encoding.scale)
    if held.layout == ct.NVFP4:
        stored = "float8_e4m3fn"
        parts.append(Part(f"{prefix}weight_global_scale", "float32", (1,), per="tensor"))
    parts.append(_grid_part(f"{prefix}weight_scale", stored, out.shape, encoding.block))
    if encoding.zero_point is not None and held.layout == ct.PACKED:
        # Packed along N: a word holds zero points of several rows. Only whole words of whole rows can be cut.
        step = 32 // math.gcd(bits, 32)
        rows = step if bits * step == 32 or n % step == 0 else max(1, n)
        parts.append(Part(f"{prefix}weight_zero_point", "int32", (-(-n * bits // 32), grid[1]), rows=rows))
    elif encoding.zero_point is not None:
        parts.append(_grid_part(f"{prefix}weight_zero_point", "int8", out.shape, encoding.block))
    if held.layout == ct.PACKED:
        parts.append(Part(f"{prefix}weight_shape", "int64", (2,), per="tensor"))
    activation = static_input(held)
    if activation is not None:
        parts.append(Part(f"{prefix}input_scale", out.dtype, (1,), per="tensor"))
        if not activation.symmetric:
            parts.append(Part(f"{prefix}input_zero_point", "int8", (1,), per="tensor"))
    return parts


def static_input(held: Held) -> ActivationQuant | None:
    """The static range that is stored with a weight."""
    return held.input if isinstance(held, HoldsStatic | RepacksStatic) else None


def _grid_part(name: str, dtype: str, shape: tuple[int, ...], block: tuple[int, ...]) -> Part:
    if all(b == FULL for b in block):
        return Part(name, dtype, (1,), per="tensor")
    return Part(name, dtype, param_shape(shape, block), rows=block[0])


def _schemes(layout: FileLayout) -> dict[str, Scheme]:
    """Module -> how it is quantized, for all that are."""
    schemes = {}
    for placed in layout.outputs:
        encoding = placed.held.encoding
        if encoding is not None:
            activation = placed.proposal.activation if placed.proposal is not None else None
            weights = ct.weights_of(encoding, placed.output.shape, activation)
            schemes[placed.output.name.removesuffix(".weight")] = Scheme(weights, activation)
    return schemes


def _refuse(reason: str) -> Refuses:
    return Refuses(reason, hint="--convention generic holds it")


def _notes(weights: ct.Weights, out: Output) -> tuple[str, ...]:
    notes = []
    if weights.format == ct.PACKED:
        if not weights.symmetric:
            notes.append(
                "asymmetric packed weights: transformers 5.23 loads them only with "
                "CompressedTensorsConfig(dequantize=True); vLLM loads them"
            )
        if weights.strategy == "tensor":
            notes.append("packed weights with one scale per tensor: transformers loads them, vLLM does not")
        if weights.bits not in (4, 8):
            notes.append(
                f"{weights.bits}-bit weights: vLLM and transformers load them with a compressed-tensors of June 2026 "
                "or later; SGLang reads packed weights of 4 and 8 bits only"
            )
        if weights.group_size not in (None, 32, 64, 128):
            notes.append(f"groups of {weights.group_size}: vLLM's kernels take groups of 32, 64 and 128")
    if weights.format == ct.INT and not weights.symmetric:
        notes.append("asymmetric int8 weights with int8 activations: transformers loads them, vLLM does not")
    if weights.block is not None and (weights.block != (128, 128) or out.shape[1] % 128):
        notes.append(f"fp8 blocks of {weights.block}: vLLM's kernels take whole blocks of 128x128")
    if weights.format in (ct.MXFP4, ct.MXFP8) and out.dtype != "bfloat16":
        notes.append(f"{weights.format}: transformers 5.23 runs it in bfloat16 models only, and this is {out.dtype}")
    return tuple(notes)


def config_of(info: ModelInfo) -> dict[str, Any] | None:
    """``quantization_config`` of a source that compressed-tensors wrote."""
    config = (info.config or {}).get("quantization_config") or (info.config or {}).get("compression_config")
    if isinstance(config, Mapping) and config.get("quant_method", METHOD) == METHOD and "config_groups" in config:
        return dict(config)
    return None

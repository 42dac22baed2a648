"""The words of compressed-tensors for what the IR says, both ways. Imports no torch.

compressed-tensors describes weights and activations by ``QuantizationArgs`` (num_bits, type, strategy, ...) and how
they are stored by a format. What the keys mean is found in its version 0.20; its classes allow no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E4M3FN,
    FLOAT8_E8M0FNU,
    FULL,
    INT8,
    ActivationQuant,
    ElementType,
    Encoding,
    integer,
    per_channel,
    per_group,
    per_tensor,
)

PACKED = "pack-quantized"
INT = "int-quantized"
FLOAT = "float-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
NVFP4 = "nvfp4-pack-quantized"  # read, not written
MIXED = "mixed-precision"

MX_GROUP = 32  # OCP MX specification v1.0: elements that share a scale
NV_GROUP = 16

#: format -> bits and group size of its floats
_FLOATS: dict[str, tuple[int, int | None]] = {
    FLOAT: (8, None),
    MXFP4: (4, MX_GROUP),
    MXFP8: (8, MX_GROUP),
    NVFP4: (4, NV_GROUP),
}
_STRATEGIES = {"tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"}


class ArgumentError(Exception):
    """What cannot be said in the other language, and why."""


@dataclass(frozen=True, slots=True)
class Weights:
    """``QuantizationArgs`` of a weight, and the format that stores it."""

    format: str
    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        data: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
        }
        if self.group_size is not None:
            data["group_size"] = self.group_size
        if self.block is not None:
            data["block_structure"] = list(self.block)
        data["dynamic"] = False
        if self.format in (MXFP4, MXFP8):
            data["scale_dtype"] = data["zp_dtype"] = "torch.uint8"
        return data


def weights_of(encoding: Encoding, shape: tuple[int, ...], activation: ActivationQuant | None) -> Weights:
    """How compressed-tensors would describe and store a weight ``[N, K]``.

    :raises ArgumentError: when it has no words for it.
    """
    element = encoding.element
    if encoding.offset is not None:
        raise ArgumentError("it has zero points and no offsets")
    if isinstance(encoding.scale, Encoding):
        raise ArgumentError("its scales are numbers, not quantized themselves")
    strategy, group, block = _strategy(encoding.block)
    if group is not None and shape[-1] % group:
        raise ArgumentError(f"rows of {shape[-1]} are not a multiple of the group size {group}")
    if isinstance(encoding.scale, ElementType):
        for kind, format, bits in ((FLOAT4_E2M1FN, MXFP4, 4), (FLOAT8_E4M3FN, MXFP8, 8)):
            if (element, encoding.scale, group) == (kind, FLOAT8_E8M0FNU, MX_GROUP):
                return Weights(format, bits, "float", True, strategy, group)
        raise ArgumentError(f"it has no {element.name} with scales of {encoding.scale.name} per {strategy}")
    if element == FLOAT8_E4M3FN:
        if strategy == "group":
            raise ArgumentError("its fp8 weights have a scale per tensor, channel or block, not per group")
        return Weights(FLOAT, 8, "float", True, strategy, block=block)
    if element.kind != "int" or not 2 <= element.bits <= 8:
        raise ArgumentError(f"its elements are integers of 2 to 8 bits and float8_e4m3fn, not {element.name}")
    if strategy == "block":
        raise ArgumentError(f"its integers have no blocks of {encoding.block}")
    symmetric = encoding.zero_point is None
    if not symmetric and encoding.zero_point != integer(element.bits, signed=False):
        raise ArgumentError(f"its zero points are integers of the weight's {element.bits} bits")
    whole = activation is not None and activation.element.kind == "int" and element.bits == 8 and group is None
    if not symmetric and strategy == "tensor" and not whole:
        raise ArgumentError("it packs zero points per channel or group only")
    return Weights(INT if whole else PACKED, element.bits, "int", symmetric, strategy, group)


def activation_args(activation: ActivationQuant, weights: Weights) -> dict[str, Any]:
    """``input_activations`` beside such weights.

    :raises ArgumentError: when no consumer runs them together.
    """
    element = activation.element
    kind = {INT8: "int", integer(8, signed=False): "int", FLOAT8_E4M3FN: "float"}.get(element)
    if kind is None or (kind == "float" and not activation.symmetric):
        raise ArgumentError(f"it has no {activation} activations")
    fits = activation.granularity == ("token" if activation.dynamic else "tensor")
    if weights.strategy == "block":
        fits = activation.dynamic and activation.granularity == "group"
    if weights.format == PACKED:
        fits = fits and activation.dynamic and weights.symmetric and (kind == "int" or weights.bits == 4)
    elif weights.format != {"int": INT, "float": FLOAT}[kind]:
        fits = False
    if not fits:
        raise ArgumentError(f"no runtime takes {activation} activations with such weights")
    data = {"num_bits": 8, "type": kind, "symmetric": activation.symmetric, "strategy": activation.granularity}
    if activation.group_size is not None:
        data["group_size"] = activation.group_size
    return data | {"dynamic": activation.dynamic}


def read_weights(args: object, format: str) -> Weights:
    """The weights that a config group describes.

    :raises ArgumentError: for what is malformed or not supported, by name.
    """
    if not isinstance(args, Mapping):
        raise ArgumentError(f"weights: an object expected, got {args!r}")
    bits, kind, symmetric, strategy, group = _common(args, "weights")
    if args.get("dynamic"):
        raise ArgumentError("weights: dynamic is for activations")
    if args.get("actorder") in ("group", "dynamic", True):
        raise ArgumentError("weights: actorder 'group' permutes columns, which is not supported")
    block = args.get("block_structure")
    if isinstance(block, str):
        block = [int(n) if n.isdecimal() else 0 for n in block.split("x")]
    if strategy == "block":
        if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
            raise ArgumentError(f"weights: block_structure is two sizes, got {block!r}")
    elif strategy not in ("tensor", "channel", "group") and (strategy, format) != ("tensor_group", NVFP4):
        raise ArgumentError(f"weights: strategy {strategy!r} is not supported")
    if format == "naive-quantized":
        format = INT if kind == "int" else FLOAT
    if (format, kind) not in {(PACKED, "int"), (INT, "int"), *((f, "float") for f in _FLOATS)}:
        raise ArgumentError(f"format {format!r} of {kind} weights is not supported")
    if not 2 <= bits <= 8 or (format in _FLOATS and (bits, group) != _FLOATS[format]):
        raise ArgumentError(f"weights: num_bits {bits}, group_size {group} with {format!r} are not supported")
    if kind == "float" and not symmetric:
        raise ArgumentError("weights: asymmetric floats are not supported")
    size = (block[0], block[1]) if strategy == "block" and isinstance(block, list) else None
    return Weights(format, bits, kind, symmetric, strategy, group, size)


def encoding_of(weights: Weights, scale_dtype: str) -> Encoding:
    """The encoding of a weight ``[N, K]`` that is described and stored so."""
    block = {"tensor": per_tensor(2), "channel": per_channel(2), "block": weights.block}.get(weights.strategy)
    if weights.group_size is not None:
        block = per_group(2, weights.group_size)
    assert block is not None
    if weights.format == MXFP4:
        return Encoding(FLOAT4_E2M1FN, block, FLOAT8_E8M0FNU)
    if weights.format == NVFP4:
        return Encoding(FLOAT4_E2M1FN, block, Encoding(FLOAT8_E4M3FN, per_tensor(2), "float32"))
    if weights.type == "float":
        return Encoding(FLOAT8_E4M3FN, block, FLOAT8_E8M0FNU if weights.format == MXFP8 else scale_dtype)
    unsigned = integer(weights.bits, signed=False)
    if weights.symmetric:
        return Encoding(integer(weights.bits), block, scale_dtype)
    return Encoding(unsigned, block, scale_dtype, zero_point=unsigned)


def read_activation(args: object, scale: float | None, zero_point: int) -> ActivationQuant | None:
    """The activations that ``input_activations`` of a config group describes.

    :param scale: the ``input_scale`` of a static one.
    :raises ArgumentError: for what is malformed or not supported, by name.
    """
    if args is None:
        return None
    if not isinstance(args, Mapping):
        raise ArgumentError(f"input_activations: an object expected, got {args!r}")
    bits, kind, symmetric, strategy, group = _common(args, "input_activations")
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False) or bits != 8 or strategy not in ("tensor", "token", "group"):
        raise ArgumentError(f"input_activations: {kind}{bits} per {strategy}, dynamic={dynamic!r}, are not supported")
    element = INT8 if kind == "int" else FLOAT8_E4M3FN
    if dynamic:
        return ActivationQuant(element, _granularity(strategy), True, symmetric, group)
    if strategy != "tensor" or scale is None:
        raise ArgumentError("input_activations: static ones have one input_scale per tensor")
    low, high = static_range(element, scale, zero_point, symmetric)
    return ActivationQuant(element, "tensor", False, symmetric, low=low, high=high)


def static_range(element: ElementType, scale: float, zero_point: int, symmetric: bool) -> tuple[float, float]:
    """Low and high of a static activation, from what compressed-tensors stores. Inverse of :func:`static_scale`."""
    if symmetric:
        high = scale * _largest(element)
        return -high, high
    return scale * (-128 - zero_point), scale * (127 - zero_point)


def static_scale(activation: ActivationQuant) -> tuple[float, int]:
    """``input_scale`` and ``input_zero_point`` of a static activation.

    compressed-tensors stores ``round(x / scale) + zero_point`` in -128..127; a symmetric one uses no -128.
    """
    assert activation.low is not None
    assert activation.high is not None
    if activation.symmetric:
        return max(-activation.low, activation.high) / _largest(activation.element), 0
    scale = (activation.high - activation.low) / 255
    return scale, round(-128 - activation.low / scale) if scale else 0


def _largest(element: ElementType) -> float:
    return 448.0 if element == FLOAT8_E4M3FN else 127.0


def _strategy(block: tuple[int, ...]) -> tuple[str, int | None, tuple[int, int] | None]:
    """Strategy, group size and block structure of a block of a matrix."""
    if block == per_tensor(2):
        return "tensor", None, None
    if block == per_channel(2):
        return "channel", None, None
    if len(block) != 2 or FULL in block:
        raise ArgumentError(f"it has no scales per block of {'x'.join('*' if b == FULL else str(b) for b in block)}")
    if block[0] == 1:
        return "group", block[1], None
    return "block", None, (block[0], block[1])


def _common(args: Mapping[str, Any], what: str) -> tuple[int, str, bool, str, int | None]:
    bits, kind, symmetric = args.get("num_bits", 8), args.get("type", "int"), args.get("symmetric", True)
    strategy, group = args.get("strategy"), args.get("group_size")
    kind, strategy = (v.lower() if isinstance(v, str) else v for v in (kind, strategy))
    if type(bits) is not int or kind not in ("int", "float") or not isinstance(symmetric, bool):
        raise ArgumentError(f"{what}: num_bits {bits!r}, type {kind!r}, symmetric {symmetric!r} make no sense")
    if group is not None and (type(group) is not int or group < -1 or group == 0):
        raise ArgumentError(f"{what}: group_size {group!r} makes no sense")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy not in _STRATEGIES:
        raise ArgumentError(f"{what}: unknown strategy {strategy!r}")
    group = group if group != -1 else None
    if (strategy in ("group", "tensor_group")) != (group is not None):
        raise ArgumentError(f"{what}: group_size {group!r} with strategy {strategy!r}")
    return bits, kind, symmetric, strategy, group


def _granularity(strategy: str) -> Any:
    return strategy

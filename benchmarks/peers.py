"""compressed-tensors and torchao, called as their own users call them: a whole tensor at a time.

Both get what ours does too: the reduction to scales, then the codes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

Run = Callable[[torch.Tensor], object]

INT8 = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
INT4 = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
FP8 = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")


def absmax_scales(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """compressed-tensors' scales: those of its observers of extremes."""
    blocks = x.reshape(*x.shape[:-1], -1, args.group_size) if args.group_size else x
    low, high = blocks.amin(dim=-1, keepdim=not args.group_size), blocks.amax(dim=-1, keepdim=not args.group_size)
    scales: torch.Tensor = calculate_qparams(low, high, args)[0]
    return scales


def absmax_error(x: torch.Tensor, args: QuantizationArgs = INT4) -> float:
    """Sum of squared errors of compressed-tensors' absmax rule on a matrix, its products taken in float32."""
    scale = absmax_scales(x, args)
    codes = quantize(x, scale, None, args, dtype=torch.int8)
    values = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)
    return float((values.flatten(-2) - x.float()).square_().sum(dtype=torch.float64))


def _compressor(name: str, args: QuantizationArgs) -> Run:
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return lambda x: compressor.compress({"weight": x, "weight_scale": absmax_scales(x, args)}, scheme)


def _torchao() -> dict[str, Run]:
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

    int4: torch.dtype = getattr(torch, "int4")  # noqa: B009 - torch has it, its stubs do not
    return {
        "int8": lambda x: Int8Tensor.from_hp(x, PerRow()),
        "int4": lambda x: IntxUnpackedToInt8Tensor.from_hp(x, (1, 128), int4),  # the one for CPUs: not packed
        "fp8": lambda x: Float8Tensor.from_hp(x, granularity=PerRow()),
    }


#: by kernel: what compressed-tensors has for the same job
COMPRESSED_TENSORS: dict[str, Run] = {
    "int8": _compressor("int-quantized", INT8),
    "int4": _compressor("pack-quantized", INT4),
    "fp8": _compressor("float-quantized", FP8),
}
#: what torchao has; empty where it is not installed (requirements-dev.txt)
TORCHAO = _torchao()

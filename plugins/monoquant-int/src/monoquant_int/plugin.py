"""What monoquant-int registers."""

from __future__ import annotations

from dataclasses import dataclass

from monoquant_core.declarations import SchemeDeclaration
from monoquant_core.hookspecs import hookimpl
from monoquant_core.options import option

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class IntOptions:
    """Options of ``int2`` to ``int8``."""

    group_size: int = option(0, "Elements that share a scale; 0 is 128 where groups are used.", minimum=0)
    granularity: str = option(
        "auto",
        "What shares a scale; auto is group below 8 bits or with a group size, else channel.",
        choices=("auto", "tensor", "channel", "group"),
    )
    symmetric: bool = option(True, "Signed codes around zero; otherwise unsigned ones with a zero point.")
    rounding: str = option(
        "auto",
        "search finds the scale of least squared error, nearest clips nothing; auto is search below 8 bits.",
        choices=("auto", "search", "nearest"),
    )
    narrow_range: bool = option(False, "Leave out the most negative code, so that codes are symmetric too.")


@dataclass(frozen=True)
class W8A8Options:
    """Options of ``w8a8``."""

    activations: str = option(
        "auto",
        "Inputs of layers: dynamic quantizes them at run time, static with one scale that calibration found; auto is "
        "static where there are statistics, else dynamic.",
        choices=("auto", "dynamic", "static"),
    )
    granularity: str = option(
        "auto", "What shares a scale of the weights; auto is channel.", choices=("auto", "tensor", "channel")
    )
    rounding: str = option(
        "auto",
        "search finds the scale of least squared error, nearest clips nothing; auto is search where a format confines "
        "codes to less than 8 bits, else nearest.",
        choices=("auto", "search", "nearest"),
    )
    narrow_range: bool = option(False, "Leave out the code -128, for hardware whose products would overflow.")


@hookimpl
def monoquant_register_schemes() -> list[SchemeDeclaration]:
    """``int2`` to ``int8`` and ``w8a8``."""
    widths = [
        SchemeDeclaration(
            f"int{bits}",
            f"{bits}-bit integers, {'one scale per output channel' if bits == 8 else 'one scale for 128 weights'}",
            f"monoquant_int.quantizer:int{bits}",
            IntOptions,
            aliases=(f"i{bits}", f"W{bits}A16"),
        )
        for bits in WIDTHS
    ]
    summary = "8-bit integers, one scale per output channel; layer inputs to 8 bits at run time, or as calibrated"
    return [
        *widths,
        SchemeDeclaration("w8a8", summary, "monoquant_int.quantizer:w8a8", W8A8Options, aliases=("W8A8-INT8",)),
    ]

"""Names and wordings that several probes share."""

from __future__ import annotations

#: schemes that store integer codes and multiply floats
WEIGHT_ONLY = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")

CASTS = ("float16", "bfloat16")


def gigabytes(nbytes: int | None) -> str:
    """Bytes as GB, for a summary."""
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.1f} GB"

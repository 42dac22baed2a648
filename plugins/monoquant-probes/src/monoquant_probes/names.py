"""Names and wordings that several probes share."""

from __future__ import annotations

#: schemes that store integer codes and multiply floats
WEIGHT_ONLY = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")

#: types of ggml that are schemes of their own
GGML_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
)

CASTS = ("float16", "bfloat16")


def gigabytes(nbytes: int | None) -> str:
    """Bytes as GB, for a summary."""
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.1f} GB"

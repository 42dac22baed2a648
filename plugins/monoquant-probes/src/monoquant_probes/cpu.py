"""The processor: what it multiplies by itself, and what has to be widened to float first."""

from __future__ import annotations

import os
import platform

from monoquant_core.declarations import NoOptions
from monoquant_core.memory import usable_cores
from monoquant_core.probes import Finding, ProbeResult
from monoquant_probes import instructions, memory
from monoquant_probes.names import WEIGHT_ONLY, gigabytes


class CpuProbe:
    """Asks the operating system."""

    def __init__(self, options: NoOptions) -> None:
        del options

    def probe(self) -> ProbeResult:
        """Instruction sets, cores and memory. Never raises."""
        try:
            sets, asked = instructions.instruction_sets()
            name = instructions.model_name()
            total, available = memory.memory()
            cores = usable_cores()
        except OSError as exc:
            return ProbeResult("cpu", True, f"{platform.machine()}; nothing more is known: {exc}")
        shown = ", ".join(sets) or "no instruction sets known"
        room = f"{gigabytes(available or total)} of memory free" if available or total else "memory unknown"
        summary = f"{platform.machine()} {name}".strip()
        notes = () if sets else ("no instruction sets could be asked for on this system",)
        fast = [
            element
            for element, products in (
                ("int8", instructions.INT8_PRODUCTS),
                ("bfloat16", instructions.BF16_PRODUCTS),
                ("float16", instructions.FP16_PRODUCTS),
            )
            if set(products) & set(sets)
        ]
        return ProbeResult(
            "cpu",
            True,
            f"{summary}; {cores} of {os.cpu_count()} cores; {room}; {shown}",
            fast_elements=("float32", *fast),
            memory_bytes=available or total,
            facts={
                "architecture": platform.machine(),
                "model": name,
                "system": platform.system(),
                "cores": os.cpu_count(),
                "usable_cores": cores,
                "memory_total": total,
                "memory_available": available,
                "instruction_sets": list(sets),
                "asked": asked,
            },
            findings=findings(sets),
            notes=notes,
        )


def findings(sets: tuple[str, ...]) -> dict[str, Finding]:
    """What a processor with these instruction sets makes of each scheme."""
    found = {f"scheme:{name}": _WIDENED for name in WEIGHT_ONLY}
    found["scheme:w8a8"] = _int8(sets)
    found["scheme:fp8"] = Finding("slow", "no float8 arithmetic that this system reports: widened to float first")
    found["scheme:bfloat16"] = _half(sets, "bfloat16", instructions.BF16_PRODUCTS, ())
    found["scheme:float16"] = _half(sets, "float16", instructions.FP16_PRODUCTS, ("f16c", "neon"))
    return found


_WIDENED = Finding("slow", "codes are widened to float before every product: saves memory and disk, not arithmetic")


def _int8(sets: tuple[str, ...]) -> Finding:
    products = [name for name in instructions.INT8_PRODUCTS if name in sets]
    if products:
        return Finding("fast", f"int8 products by {products[0]}, in runtimes that use them")
    if "avx2" in sets:
        # Measured on AVX2 and AVX-512 without VNNI: 4 points of accuracy lost, and none with 7-bit weights.
        reason = "no VNNI: sums of two uint8 x int8 products saturate at 16 bits; weights of 7 bits avoid it"
        return Finding("slow", reason)
    return Finding("slow", "no int8 dot product instruction that this system reports")


def _half(sets: tuple[str, ...], dtype: str, products: tuple[str, ...], converts: tuple[str, ...]) -> Finding:
    for name in products:
        if name in sets:
            return Finding("fast", f"{dtype} products by {name}")
    for name in converts:
        if name in sets:
            return Finding("slow", f"converted by {name}, multiplied as float32")
    return Finding("slow", f"no {dtype} arithmetic: widened to float32")

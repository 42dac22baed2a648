"""Which vector instructions the processor has, by the operating system's own word."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

#: what we call it -> how operating systems do: Linux on x86-64 and on arm64, then macOS's sysctl
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "avx": ("avx", "avx1.0"),
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512": ("avx512f",),
    "avx_vnni": ("avx_vnni",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_fp16": ("avx512_fp16",),
    "avx10": ("avx10", "avx10_1", "avx10_2"),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "amx_fp16": ("amx_fp16",),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
    "arm_bf16": ("bf16", "feat_bf16"),
    "arm_fp16": ("asimdhp", "feat_fp16"),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme", "feat_sme"),
}

INT8_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "dotprod")
BF16_PRODUCTS = ("amx_bf16", "avx512_bf16", "arm_bf16")
FP16_PRODUCTS = ("amx_fp16", "avx512_fp16", "arm_fp16")


def named(flags: Iterable[str]) -> tuple[str, ...]:
    """Our names for the flags that an operating system reports, in the table's order."""
    lower = {flag.lower() for flag in flags}
    return tuple(name for name, spellings in SPELLINGS.items() if lower & set(spellings))


def instruction_sets() -> tuple[tuple[str, ...], str]:
    """(names, who said so). Empty where nobody can be asked."""
    if CPUINFO.is_file():
        found = named(cpuinfo_flags(CPUINFO.read_text(encoding="utf-8", errors="replace")))
        if found:
            return found, str(CPUINFO)
    if sys.platform == "darwin":
        return named(sysctl_flags(_run("sysctl", "hw.optional", "machdep.cpu"))), "sysctl"
    return _torch_capability()


def cpuinfo_flags(text: str) -> set[str]:
    """Flags of the first processor in /proc/cpuinfo: ``flags`` on x86-64, ``Features`` on arm64."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def sysctl_flags(text: str) -> set[str]:
    """Flags in what ``sysctl hw.optional machdep.cpu`` prints."""
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.startswith("hw.optional.") and value == "1":
            flags.add(key.rpartition(".")[2])
        elif key.startswith("machdep.cpu.") and key.endswith("features"):
            flags.update(value.split())
    return flags


def model_name() -> str:
    """What the processor calls itself."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return platform.processor()


def _torch_capability() -> tuple[tuple[str, ...], str]:
    """Windows has no list to read; torch looked at the processor when it chose its kernels."""
    try:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
    except (ImportError, AttributeError, OSError):
        return (), ""
    levels = {"AVX2": ("avx", "avx2", "fma"), "AVX512": ("avx", "avx2", "fma", "avx512")}
    return levels.get(capability, ()), f"torch ({capability})"


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""

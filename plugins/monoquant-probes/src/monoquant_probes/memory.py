"""How much memory this process may use, by the operating system's own word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from monoquant_core.memory import control_groups

MEMINFO = Path("/proc/meminfo")


def memory() -> tuple[int | None, int | None]:
    """(total, available) in bytes; None where nobody can be asked. A container's limit counts as the total."""
    if MEMINFO.is_file():
        total, available = meminfo(MEMINFO.read_text(encoding="utf-8"))
        return _within_groups(total, available)
    if sys.platform == "darwin":
        return _sysctl_memory()
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def meminfo(text: str) -> tuple[int | None, int | None]:
    """(total, available) from /proc/meminfo."""
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal"), found.get("MemAvailable")


def _within_groups(total: int | None, available: int | None) -> tuple[int | None, int | None]:
    """The least that the machine and any control group leave."""
    for folder, unified in control_groups("memory"):
        names = ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        left = max(0, limit - used)
        total = limit if total is None else min(total, limit)
        available = left if available is None else min(available, left)
    return total, available


def _sysctl_memory() -> tuple[int | None, int | None]:
    try:
        text = subprocess.run(
            ("sysctl", "-n", "hw.memsize"), capture_output=True, text=True, timeout=5, check=False
        ).stdout
        return int(text), None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None


def _windows_memory() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "page", "page_left", "virtual", "virtual_left", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - only there on Windows
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.available)

"""Kernels that numba compiles, where it is installed: same arguments, same bits as those in torch. Imported late."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

NUMBA_BYTES = 150 << 20  #: numba, LLVM and compiled kernels from the cache; compiling them takes 90 MB more, once


def accelerator() -> str:
    """What runs searches on the CPU: ``numba`` where it is installed, else ``torch``."""
    return "numba" if importlib.util.find_spec("numba") is not None else "torch"


@functools.cache
def compiled(module: str) -> ModuleType | None:
    """A module of compiled kernels; None, with a warning, where numba is installed and does not work here."""
    if accelerator() != "numba":
        return None
    try:
        return importlib.import_module(module)
    except ImportError as exc:  # numba's of numpy, say, when it is of a version that it does not know
        warnings.warn(f"numba is installed and cannot be used, so searches run in torch: {exc}", stacklevel=2)
        return None


def jit(function: _Function, helpers: tuple[str, ...] = ()) -> _Function:
    """Compile a kernel when it is first called, and keep it on disk for the next process. It runs without the GIL.

    Without fastmath no product and sum are fused, and nothing is reordered.

    :param helpers: files, other than the kernel's, whose functions become part of it.
    """
    import numba

    def made(*, cache: bool) -> Any:
        return numba.njit(nogil=True, cache=cache, error_model="numpy", fastmath=False, boundscheck=False)(function)

    try:
        kernel = made(cache=True)
    except RuntimeError:  # numba finds no folder that it may write to: it compiles in every process then
        return cast("_Function", made(cache=False))
    # numba looks at the file of the kernel only, and would go on using it when what it calls has changed.
    index = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, [_digest(file) for file in (__file__, *helpers)])
    return cast("_Function", kernel)


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()

"""llama.cpp's quantizers in C: ``ggml_quantize_chunk`` of the shared object in the xllamacpp wheel, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from monoquant_gguf.layouts import Layout

MISSING = "pip install xllamacpp"


def available() -> bool:
    """Whether the shared object is there."""
    return _path() is not None


def quantize(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The bytes of a float32 matrix, uint8 ``[rows, bytes of a row]``, on one thread.

    :raises RuntimeError: when there is no shared object, or it wrote another number of bytes.
    """
    rows, columns = x.shape
    out = torch.empty(rows, layout.row_bytes(columns), dtype=torch.uint8)
    written = _library().ggml_quantize_chunk(layout.ggml_type, x.data_ptr(), out.data_ptr(), 0, rows, columns, None)
    if written != out.numel():
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {layout.name}, not {out.numel()}")
    return out


@functools.cache
def _path() -> Path | None:
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in Path(folder).glob("xllamacpp*.so")), None)


@functools.cache
def _library() -> ctypes.CDLL:
    path = _path()
    if path is None:
        raise RuntimeError(f"no shared object of xllamacpp: {MISSING}")
    library = ctypes.CDLL(str(path))
    library.ggml_cpu_init.restype = None
    library.ggml_cpu_init()  # fills tables
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library

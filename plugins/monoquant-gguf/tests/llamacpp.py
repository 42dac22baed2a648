"""llama.cpp as the tests need it, called in the library that the xllamacpp wheel brings. For x86-64 Linux.

Its Python classes offer a server; logits, token ids and the quantizers are functions of C that the library exports.
``conftest.py`` loads this file as the fixture ``llamacpp``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import platform
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]

if platform.system() != "Linux" or platform.machine() != "x86_64":
    raise ImportError("structs are passed as x86-64 Linux passes them")


class _Parameters(ctypes.Structure):
    """Parameters that C hands out and takes by value: only some fields are known, the rest is carried along.

    A struct of more than 16 bytes is passed on the stack, so declaring it larger than it is does no harm while it is
    the last argument.
    """

    _fields_ = (("raw", ctypes.c_uint8 * 512),)

    def put(self, offset: int, spelling: str, *values: int, before: Sequence[int]) -> None:
        """Set fields, which hold their defaults: another layout of another version is noticed."""
        found = struct.unpack_from(spelling, self.raw, offset)
        if found != tuple(before):
            raise ImportError(f"this llama.cpp has {found} at {offset} of its parameters, expected {tuple(before)}")
        struct.pack_into(spelling, self.raw, offset, *values)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.POINTER(ctypes.c_float)),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_NUMBERS = ctypes.POINTER(ctypes.c_float)
_TOKENS = ctypes.POINTER(ctypes.c_int32)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)

#: name -> what it gives, and its arguments
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_cpu_init": (None, []),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _POINTER],
    ),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Parameters]),
    "llama_model_free": (None, [_POINTER]),
    "llama_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_bos": (_INT, [_POINTER]),
    "llama_vocab_get_add_bos": (ctypes.c_bool, [_POINTER]),
    "llama_model_n_embd": (_INT, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (_NUMBERS, [_POINTER]),
    "llama_get_embeddings_seq": (_NUMBERS, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, ctypes.c_char_p, _INT, _TOKENS, _INT, ctypes.c_bool, ctypes.c_bool]),
}

_said: list[str] = []


@_LOG
def _hear(level: int, text: bytes, _: int) -> None:
    if level >= 3:  # warnings and errors
        _said.append(text.decode("utf-8", "replace"))


def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pip install xllamacpp")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.so")
    library = ctypes.CDLL(str(path))
    for name, (gives, takes) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = gives, takes
    library.llama_log_set(_hear, None)
    library.ggml_cpu_init()
    library.llama_backend_init()
    return library


_C = _library()


def quantize(values: Floats, name: str, importance: Floats | None = None) -> bytes:
    """What ``ggml_quantize_chunk`` makes of rows, float32 ``[rows, columns]``."""
    values = np.ascontiguousarray(values, np.float32)
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    if columns % block or (importance is not None and importance.shape != (columns,)):
        raise ValueError(f"{name}: rows of {columns}")  # C would abort, or read beyond the end
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.empty(values.size // block * size, np.uint8)
    pointer = None if weights is None else weights.ctypes.data
    written = _C.ggml_quantize_chunk(kind.value, values.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
    assert written == out.nbytes
    return out.tobytes()


def dequantize(data: bytes, name: str, count: int) -> Floats:
    """What ``dequantize_row_*`` makes of blocks."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    if count % block or len(data) != count // block * size:
        raise ValueError(f"{name}: {len(data)} bytes for {count} elements")
    raw, out = np.frombuffer(data, np.uint8), np.empty(count, np.float32)
    function = getattr(
        _C, f"dequantize_row_{name[:-1].lower()}K" if name.endswith("_K") else f"dequantize_row_{name.lower()}"
    )
    function.restype, function.argtypes = None, [_POINTER, _POINTER, ctypes.c_int64]
    function(raw.ctypes.data, out.ctypes.data, count)
    return out


class Model:
    """A loaded file.

    :param flash: flash attention: 0 off, 1 on, None for llama.cpp's choice. It rounds keys and values to float16.
    :param kv_f32: keep keys and values in float32.
    """

    def __init__(
        self, path: str, n_ctx: int = 512, *, embeddings: bool = False, flash: int | None = None, kv_f32: bool = False
    ) -> None:
        _said.clear()
        self._context: int | None = None
        self._model = _C.llama_model_load_from_file(str(path).encode(), _C.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path}: {''.join(_said)}")
        how = _C.llama_context_default_params()
        how.put(0, "<4I", n_ctx, n_ctx, n_ctx, 1, before=(512, 2048, 512, 1))  # context, batches, sequences
        how.put(28, "<2i", 1, 1, before=(4, 4))  # threads
        if flash is not None:
            how.put(52, "<i", flash, before=(-1,))
        if kv_f32:
            how.put(104, "<2i", 0, 0, before=(1, 1))  # GGML_TYPE_F16 -> F32
        how.put(136, "<6?", embeddings, True, True, True, True, False, before=(False, True, True, True, True, False))
        self._context = _C.llama_init_from_model(self._model, how)
        if not self._context:
            self.close()
            raise RuntimeError(f"{path}: {''.join(_said)}")
        self._vocabulary = _C.llama_model_get_vocab(self._model)
        self.n_vocab: int = _C.llama_vocab_n_tokens(self._vocabulary)
        self.n_embd: int = _C.llama_model_n_embd(self._model)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free it."""
        if self._context:
            _C.llama_free(self._context)
        if self._model:
            _C.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str, special: bool = True, parse: bool = False) -> list[int]:
        """Token ids of a text.

        :param special: whether bos and its like are put around it.
        :param parse: whether special tokens are found in it.
        """
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = _C.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), special, parse)
        assert count >= 0
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> Floats:
        """Float32 ``[tokens, vocabulary]``."""
        self._run(ids, 0)
        return np.ctypeslib.as_array(_C.llama_get_logits(self._context), (len(ids), self.n_vocab)).copy()

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """The ids with the likeliest next ones appended."""
        found = list(ids)
        self._run(found, 0)
        given = len(found)
        for _ in range(count):
            logits = np.ctypeslib.as_array(_C.llama_get_logits(self._context), (given, self.n_vocab))
            found.append(int(logits[-1].argmax()))
            self._run(found[-1:], len(found) - 1)
            given = 1
        return found

    def embed_ids(self, ids: Sequence[int]) -> Floats:
        """The pooled embedding, float32 ``[width]``."""
        self._run(ids, 0)
        return np.ctypeslib.as_array(_C.llama_get_embeddings_seq(self._context, 0), (self.n_embd,)).copy()

    @property
    def first(self) -> int | None:
        """The token that texts begin with, if there is one."""
        return int(_C.llama_vocab_bos(self._vocabulary)) if _C.llama_vocab_get_add_bos(self._vocabulary) else None

    def _run(self, ids: Sequence[int], position: int) -> None:
        memory = _C.llama_get_memory(self._context)
        if position == 0 and memory:
            _C.llama_memory_clear(memory, True)
        with _batch(ids, position) as batch:
            if status := _C.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {status}: {''.join(_said)}")


@contextlib.contextmanager
def _batch(ids: Sequence[int], position: int) -> Iterator[_Batch]:
    batch = _C.llama_batch_init(len(ids), 0, 1)
    try:
        batch.count = len(ids)
        for i, token in enumerate(ids):
            batch.tokens[i], batch.positions[i] = int(token), position + i
            batch.sequence_counts[i], batch.sequences[i][0], batch.wanted[i] = 1, 0, 1
        yield batch
    finally:
        _C.llama_batch_free(batch)


def logits(path: str, ids: Sequence[int], *, flash: int | None = None, kv_f32: bool = False) -> Floats:
    """Of one sequence, float32 ``[tokens, vocabulary]``."""
    with Model(path, max(64, len(ids)), flash=flash, kv_f32=kv_f32) as model:
        return model.logits(ids)


def embed(path: str, texts: Sequence[str]) -> Floats:
    """Normalized embeddings, float32 ``[texts, width]``."""
    with Model(path, embeddings=True) as model:
        found = np.stack([model.embed_ids(model.tokenize(text)[:512]) for text in texts])
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def perplexity(path: str, ids: Sequence[int], window: int) -> float:
    """As llama-perplexity defines it: the later half of windows, which begin with bos where texts do."""
    losses: list[float] = []
    with Model(path, window) as model:
        for start in range(0, len(ids) - window + 1, window):
            part = list(ids[start : start + window])
            given = part if model.first is None else [model.first, *part[1:]]
            scores = model.logits(given).astype(np.float64)
            for i in range(window // 2, window - 1):
                row = scores[i] - scores[i].max()
                losses.append(float(np.log(np.exp(row).sum()) - row[part[i + 1]]))
    return math.exp(sum(losses) / len(losses))

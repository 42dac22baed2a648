"""Opening models: folders, files, modules and state dicts, as named tensors that are read when they are wanted.

Importing this module, and opening safetensors, imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core import kinds, named_code
from monoquant_core.containers import folder as folders
from monoquant_core.containers.entries import TensorEntry, shown, tensor_at
from monoquant_core.containers.pt2_graph import Pt2Graph
from monoquant_core.containers.reader import FileReader
from monoquant_core.containers.safetensors import Header, read_header
from monoquant_core.declarations import SourceDeclaration
from monoquant_core.errors import PluginError, SourceError
from monoquant_core.model import ModelInfo, Source, SourceReader, TensorSpec

if TYPE_CHECKING:
    import torch

    from monoquant_core.plugins import Registry
    from monoquant_core.scratch import Scratch

    Model = str | os.PathLike[str] | torch.nn.Module | torch.export.ExportedProgram | Mapping[str, torch.Tensor]

#: suffixes of files that the core reads
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *CHECKPOINTS, ".pt2")
ACCEPTED = (
    "a model folder (config.json with model.safetensors, its shards, or pytorch_model.bin), "
    f"a file ({', '.join(SUFFIXES)}), pkg.mod:factory with --weights, an nn.Module, an ExportedProgram or a state_dict"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def open_source(
    src: Model,
    registry: Registry | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    unsafe_pickle: bool = False,
) -> Source:
    """Open a model. Readers of plugins are asked first, then the core's own.

    :param src: a path, a module, a program, a state dict, or ``pkg.mod:factory``: code that makes the module.
    :param weights: a checkpoint for the module that ``src`` is, or makes.
    :param unsafe_pickle: run the code in pickles that carry some, instead of refusing them.
    :raises SourceError: naming the file, what is wrong with it, and what is accepted.
    """
    torch = sys.modules.get("torch")  # without it there is no module either
    if isinstance(src, str) and named_code.is_reference(src):
        return _made(src, weights, registry, unsafe_pickle=unsafe_pickle)
    if weights is not None:
        if torch is None or not isinstance(src, torch.nn.Module):
            raise SourceError(
                f"{src if isinstance(src, str | os.PathLike) else type(src).__name__}: weights belong to a module",
                hint="give pkg.mod:factory as the model, or open the weights themselves",
            )
        _load_weights(src, weights, registry, unsafe_pickle=unsafe_pickle)
    if isinstance(src, str | os.PathLike):
        return _open_path(src, registry, unsafe_pickle=unsafe_pickle)
    if isinstance(src, Mapping):
        return StateDictSource(src)
    if torch is not None and isinstance(src, torch.nn.Module):
        return ModuleSource(src)
    if torch is not None and isinstance(src, torch.export.ExportedProgram):
        return ProgramSource(src)
    raise SourceError(f"{type(src).__name__}: not a model", hint=f"accepted: {ACCEPTED}")


class TensorSource:
    """Named tensors, in files or in memory: what the sources below have in common."""

    def __init__(
        self,
        info: ModelInfo,
        entries: Mapping[str, TensorEntry],
        readers: Iterable[FileReader] = (),
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        tied: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self.info = info
        self.entries = entries  #: where tensors are that are read from files
        self.tensors = tensors or {}  #: those that are in memory
        self._readers = {reader.path: reader for reader in readers}
        self._tied, self._modules = tied or {}, modules or {}
        self._specs: list[TensorSpec] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return sum(reader.bytes_read for reader in self._readers.values())

    def fingerprint(self) -> str | None:
        """Tells its files, as they were when they were opened; None where tensors are in memory."""
        return None if self.tensors else self._files_fingerprint()

    def _files_fingerprint(self) -> str:
        return " ".join(reader.fingerprint for reader in self._readers.values())

    def specs(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order in which they are stored."""
        if self._specs is None:
            specs = [
                TensorSpec(name, e.shape, e.dtype, tied_to=self._tied.get(name)) for name, e in self.entries.items()
            ]
            if self.tensors:
                from monoquant_core.containers.in_memory import describe

                specs += describe(self.info.name, self.tensors)
            specs = [dataclasses.replace(spec, module=self._modules.get(spec.name, "")) for spec in specs]
            self._specs = kinds.annotate(specs, self.info)
        return self._specs

    def read(self, name: str, rows: range, scratch: Scratch | None = None, *, slot: str = "source") -> torch.Tensor:
        """The rows of a tensor as one contiguous chunk of its rank (see ``rows.py``), from any thread.

        :param slot: the buffer of ``scratch`` that the chunk lives in until the slot is used again. Formats that
            store one tensor as several read each into a slot of its own.
        :raises SourceError: when there is no such tensor, or its file has changed, shrunk or cannot be read.
        """
        if name in self.tensors:
            from monoquant_core.containers.in_memory import rows_of

            return rows_of(self.tensors[name], rows, scratch, slot)
        if name not in self.entries:
            known = any(spec.name == name for spec in self.specs())  # what was in memory is let go of
            why = "read after close" if known else "there is none of this name"
            raise SourceError(f"{tensor_at(self.info.name, name)}: {why}")
        entry = self.entries[name]
        return _row_reader()(self._readers[entry.path], name, entry, rows, scratch, slot)

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()


class SafetensorsSource(TensorSource):
    """A safetensors file, or a model folder of them: plain tensors, as they are stored.

    :raises SourceError: naming the file and the tensor that is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        weights = _weights(path)
        with contextlib.ExitStack() as opened:
            readers = [opened.enter_context(FileReader(file)) for file in weights.files]
            #: what each file's header says
            self.headers: dict[Path, Header] = {reader.path: read_header(reader) for reader in readers}
            notes = folders.check_shards(weights, ((file, header.tensors) for file, header in self.headers.items()))
            entries = {name: entry for header in self.headers.values() for name, entry in header.tensors.items()}
            if not entries:
                raise SourceError(f"{path}: holds no tensors")
            first, *others = (header.metadata for header in self.headers.values())
            metadata = first if all(other == first for other in others) else {}
            super().__init__(_info(path, weights, notes, metadata=metadata), entries, readers)
            opened.pop_all()


class TorchSource(TensorSource):
    """A file of torch.save, or a model folder of them: see ``containers/torch_zip.py``.

    :raises SourceError: naming the file and the tensor that is wrong, or the code that it carries.
    """

    def __init__(self, path: str | os.PathLike[str], *, unsafe_pickle: bool = False) -> None:
        from monoquant_core.containers.torch_zip import read_checkpoint

        path = Path(path)
        weights = _weights(path)
        with contextlib.ExitStack() as opened:
            readers = [opened.enter_context(FileReader(file)) for file in weights.files]
            found = {reader.path: read_checkpoint(reader, unsafe_pickle=unsafe_pickle) for reader in readers}
            module = next((c.module for c in found.values() if c.module is not None), None)
            modules: dict[str, str] = {}
            for checkpoint in found.values():
                if checkpoint.module is not None:
                    checkpoint.tensors, notes = _state(checkpoint.module)
                    checkpoint.notes += notes
                    modules.update(_owners(checkpoint.module, checkpoint.tensors))
            notes = [note for checkpoint in found.values() for note in checkpoint.notes]
            notes += folders.check_shards(weights, ((file, [*c.entries, *c.tensors]) for file, c in found.items()))
            super().__init__(
                _info(path, weights, notes, graph=module),
                {name: entry for c in found.values() for name, entry in c.entries.items()},
                readers,
                tensors={name: tensor for c in found.values() for name, tensor in c.tensors.items()},
                tied={name: first for c in found.values() for name, first in c.tied.items()},
                modules=modules,
            )
            self.specs()  # tensors that cannot be read are refused now
            opened.pop_all()

    def fingerprint(self) -> str | None:
        """Tells its files, as they were when they were opened; None for those of a module, which is code."""
        return None if self.info.graph is not None else self._files_fingerprint()


class Pt2Source(TensorSource):
    """The parameters and buffers of a program saved by torch.export: see ``containers/pt2.py``.

    :raises SourceError: naming the file and the tensor that is wrong, or stored as a pickle.
    """

    def __init__(self, path: str | os.PathLike[str], *, unsafe_pickle: bool = False) -> None:
        from monoquant_core.containers.pt2 import read_program

        path = Path(path)
        with contextlib.ExitStack() as opened:
            reader = opened.enter_context(FileReader(path))
            program = read_program(reader, unsafe_pickle=unsafe_pickle)
            if not program.entries and not program.tensors:
                raise SourceError(f"{path}: holds no parameters and no buffers")
            super().__init__(
                ModelInfo(str(path), paths=(path,), graph=Pt2Graph(path), notes=tuple(program.notes)),
                program.entries,
                [reader],
                tensors=program.tensors,
                tied=program.tied,
                modules=program.modules,
            )
            self.specs()
            opened.pop_all()


class StateDictSource(TensorSource):
    """A state dict in memory. It is only read, and must not be changed before the source is closed.

    :raises SourceError: naming the tensor that cannot be read.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        from monoquant_core.containers.in_memory import find_state

        tensors, notes = find_state("state_dict", state)
        super().__init__(ModelInfo("state_dict", notes=tuple(notes)), {}, tensors=tensors)
        self.specs()

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}


class ModuleSource(TensorSource):
    """What a module's ``state_dict()`` holds, with its classes and, where it has one, its config.

    The module is only read, and must not be changed before the source is closed.

    :raises SourceError: naming the tensor that cannot be read.
    """

    def __init__(self, module: torch.nn.Module, name: str = "", paths: tuple[Path, ...] = ()) -> None:
        name = name or type(module).__name__
        tensors, notes = _state(module)
        info = ModelInfo(name, config=_config(module), paths=paths, graph=module, notes=tuple(notes))
        super().__init__(info, {}, tensors=tensors, modules=_owners(module, tensors))
        self.specs()

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}


class ProgramSource(TensorSource):
    """The parameters and persistent buffers of an exported program in memory.

    :raises SourceError: naming the tensor that cannot be read.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        from monoquant_core.containers.in_memory import find_state
        from monoquant_core.containers.pt2 import program_modules

        tensors, notes = find_state("ExportedProgram", dict(program.state_dict))
        info = ModelInfo("ExportedProgram", graph=program, notes=tuple(notes))
        super().__init__(info, {}, tensors=tensors, modules=program_modules(program))
        self.specs()

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}


def _made(
    reference: str, weights: str | os.PathLike[str] | None, registry: Registry | None, *, unsafe_pickle: bool
) -> Source:
    """A module that code of the user's makes."""
    import torch

    module = named_code.find(reference)
    if not isinstance(module, torch.nn.Module):
        if not callable(module):
            raise SourceError(
                f"{reference}: is a {type(module).__name__}, and a function that makes a module is wanted"
            )
        module = named_code.call(reference, module)
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{reference}: makes a {type(module).__name__}, and an nn.Module is wanted")
    paths: tuple[Path, ...] = ()
    if weights is not None:
        paths = _load_weights(module, weights, registry, unsafe_pickle=unsafe_pickle)
    return ModuleSource(module, reference, paths)


def _load_weights(
    module: torch.nn.Module, weights: Any, registry: Registry | None, *, unsafe_pickle: bool
) -> tuple[Path, ...]:
    """Load a checkpoint into a module, and tell which files it was read from."""
    from monoquant_core.graphs import load_weights

    if not isinstance(weights, str | os.PathLike):
        kind = type(weights).__name__
        raise SourceError(f"{kind}: weights are a file or a folder", hint="module.load_state_dict() loads tensors")
    source = _open_path(weights, registry, unsafe_pickle=unsafe_pickle)
    try:
        load_weights(module, source)
        return source.info.paths
    finally:
        source.close()


@functools.cache
def _row_reader() -> Callable[..., torch.Tensor]:
    """Imported with the first tensor that is read, because it imports torch; once, because that takes a microsecond."""
    from monoquant_core.containers.strided import read_rows

    return read_rows


def _open_path(src: str | os.PathLike[str], registry: Registry | None, *, unsafe_pickle: bool) -> Source:
    if sys.byteorder != "little":
        raise SourceError(f"{src}: checkpoints are little-endian, and this machine is not")
    path = Path(src)
    try:
        if not os.fspath(src):
            raise FileNotFoundError
        path.stat()
    except FileNotFoundError as exc:
        hub = f"; a model of the hub is downloaded first: hf download {src}" if _HUB_NAME.fullmatch(str(src)) else ""
        raise SourceError(f"{os.fspath(src)!r}: no such file or folder", hint=f"accepted: {ACCEPTED}{hub}") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise SourceError(f"{path}: cannot be opened: {getattr(exc, 'strerror', None) or exc}") from exc
    notes: list[str] = []
    source = _open_by_plugin(path, registry, notes)
    if source is None:
        source = _open_by_core(path, registry, unsafe_pickle=unsafe_pickle)
        if isinstance(quantized := (source.info.config or {}).get("quantization_config"), Mapping):
            method = shown(quantized.get("quant_method"))
            notes.append(
                f"{path}: config.json says quantized by {method}, which no installed reader knows: read as it is"
            )
    if notes:
        source.info = dataclasses.replace(source.info, notes=(*source.info.notes, *notes))
    return source


def _open_by_plugin(path: Path, registry: Registry | None, notes: list[str]) -> Source | None:
    if registry is None:
        return None
    for declared in registry.sources.values():
        if not _takes(declared, path):
            continue
        try:
            reader: SourceReader = registry.make(declared, declared.options())
            recognised = reader.recognises(path)
        except Exception as exc:  # noqa: BLE001 - a broken reader must not take those of others down
            reason = exc.reason if isinstance(exc, PluginError) else repr(exc)
            notes.append(f"{path}: the reader of plugin source {declared.name!r} was left out: {reason}")
            continue
        if recognised:
            return reader.open(path)
    return None


def _takes(declared: SourceDeclaration, path: Path) -> bool:
    if path.is_dir():
        return "/" in declared.suffixes
    return path.name.lower().endswith(tuple(s.lower() for s in declared.suffixes if s != "/"))


def _open_by_core(path: Path, registry: Registry | None, *, unsafe_pickle: bool) -> Source:
    suffix = (folders.find_weights(path).files[0] if path.is_dir() else path).suffix.lower()
    if suffix == ".safetensors":
        return SafetensorsSource(path)
    if suffix in CHECKPOINTS:
        return TorchSource(path, unsafe_pickle=unsafe_pickle)
    if suffix == ".pt2":
        return Pt2Source(path, unsafe_pickle=unsafe_pickle)
    if path.name.endswith(".index.json"):
        raise SourceError(f"{path}: the index of a sharded model", hint="give the folder that it is in")
    more = {s for d in (registry.sources.values() if registry is not None else ()) for s in d.suffixes} - {
        "/",
        *SUFFIXES,
    }
    others = f"; installed readers add {', '.join(sorted(more))}" if more else ""
    raise SourceError(
        f"{path}: no reader for {f'{suffix!r} files' if suffix else 'files without a suffix'}",
        hint=f"accepted: {ACCEPTED}{others}",
    )


def _weights(path: Path) -> folders.Weights:
    return folders.find_weights(path) if path.is_dir() else folders.Weights((path,), None, None)


def _info(
    path: Path,
    weights: folders.Weights,
    notes: list[str],
    *,
    metadata: Mapping[str, str] | None = None,
    graph: torch.nn.Module | None = None,
) -> ModelInfo:
    config: Mapping[str, Any] | None = None if graph is None else _config(graph)
    beside: Mapping[str, Path] = {}
    if path.is_dir():
        config, beside = folders.read_config(path), folders.side_files(path)
        notes = [*notes, *folders.unread_weights(path, weights)]
    elif found := _SHARD.search(path.name):
        notes = [*notes, f"{path}: one of {int(found[1])} shards; give the folder for the whole model"]
    elif (path.parent / "config.json").is_file():
        notes = [*notes, f"{path}: read without the config.json beside it; give the folder to use that"]
    return ModelInfo(str(path), config, beside, weights.files, graph, metadata or {}, tuple(notes))


def _state(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    from monoquant_core.containers.in_memory import find_state

    # keep_vars: the parameters themselves, so that tied ones are seen to be one
    return find_state(type(module).__name__, module.state_dict(keep_vars=True))


def _owners(module: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Tensor -> class of the module that owns it, or that has it parametrized."""
    classes = {path: _class_name(child) for path, child in module.named_modules(remove_duplicate=False)}
    found = {}
    for name in names:
        path, parametrized, _ = f".{name}".partition(".parametrizations.")
        found[name] = classes.get(path[1:] if parametrized else name.rpartition(".")[0], "")
    return found


def _class_name(module: torch.nn.Module) -> str:
    name = type(module).__name__
    return name.removeprefix("Parametrized") if hasattr(module, "parametrizations") else name


def _config(module: torch.nn.Module) -> dict[str, Any] | None:
    """The config of a model of the transformers library, as its config.json would have it."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    if not isinstance(config, Mapping):
        return None
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    if "model_type" in plain and not plain.get("architectures"):
        plain["architectures"] = [type(module).__name__]  # what save_pretrained fills in
    return plain

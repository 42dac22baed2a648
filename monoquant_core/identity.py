"""What decides the bytes of a run, as texts that are compared: only a run with the same ones goes on with another."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from monoquant_core import __version__
from monoquant_core.errors import SourceError
from monoquant_core.exporters import FilePlan
from monoquant_core.model import Source
from monoquant_core.planning import Plan, Step
from monoquant_core.tasks import Task
from monoquant_core.tensor import as_bytes

if TYPE_CHECKING:
    from monoquant_core.stats import TensorStats

#: of a file of the source: what a copy with another content and all times alike differs in
PIECES, PIECE_BYTES = 16, 4096

#: what it means that a text differs from that of another run
DIFFERENCES = {
    "source": "the source is another, or has changed",
    "plan": "it wrote something else: another scheme, format, rule or option",
    "statistics": "its statistics were others",
    "tasks": "it was cut into other tasks",
    "nonfinite": "--nonfinite was another",
    "versions": "the versions of monoquant, its plugins or torch were others",
    "machine": "it ran on another kind of processor or device",
}


class NotResumable(Exception):
    """A run whose bytes are decided by something that cannot be told from another."""


def run_key(
    plans: Sequence[Plan],
    source: Source,
    stats: Mapping[str, TensorStats] | None,
    tasks: Sequence[Task],
    *,
    device: torch.device,
    nonfinite: str,
) -> dict[str, str]:
    """Everything that decides the bytes of a run, by what it is. Threads and accelerated kernels do not.

    :raises NotResumable: naming what cannot be told from another.
    :raises SourceError: when a file of the source cannot be read.
    """
    if not source.info.paths:
        raise NotResumable(f"{source.info.name}: its tensors are not those of files")
    own = _fingerprint(source, source.info.name)
    steps = {id(step.quantizer): step for plan in plans for step in plan.steps if step.quantizer is not None}
    named = [_fingerprint(step.quantizer, f"scheme {step.scheme}") for step in steps.values()]
    named += [_fingerprint(plan.exporter, f"format {plan.format}") for plan in plans]
    used = [source, *(step.quantizer for step in steps.values()), *(plan.exporter for plan in plans)]
    return {
        "source": _digest([type(source).__qualname__, own, _files(source.info.paths)]),
        "plan": _digest([*map(_plan, plans), named]),
        "statistics": _digest(None if stats is None else {p: _statistics(s) for p, s in stats.items()}),
        "tasks": _digest(_numbers(tasks)),
        "nonfinite": nonfinite,
        "versions": _versions(used),
        "machine": _machine(device),
    }


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What of another run was different; "" if nothing was."""
    return "; ".join(text for label, text in DIFFERENCES.items() if ours.get(label) != theirs.get(label)) or (
        "" if set(ours) == set(theirs) else "its journal has another form"
    )


def _fingerprint(found: Any, name: str) -> str:
    """What a plugin's object says that it holds beside its options."""
    ask: Callable[[], str | None] | None = getattr(found, "fingerprint", None)
    try:
        said = ask() if callable(ask) else None
    except Exception as exc:  # a plugin may fail in any way, and that is no reason to end a run
        raise NotResumable(f"{name}: its fingerprint failed: {' '.join(repr(exc).split())}") from exc
    if not isinstance(said, str):
        raise NotResumable(f"{name} does not say what its result depends on (it has no fingerprint)")
    return said


def _files(paths: Sequence[Path]) -> list[tuple[str, int, int, str]]:
    """Path within the source, size, modification time and a digest of some pieces of every file."""
    unique = list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
    names = list(map(str, unique))
    with contextlib.suppress(ValueError):  # files on two drives of Windows
        base = os.path.commonpath([path.parent for path in unique])
        names = [os.path.relpath(path, base) for path in unique]
    return [(name, *_size_and_time(path), _pieces(path)) for name, path in zip(names, unique, strict=True)]


def _plan(plan: Plan) -> list[Any]:
    """What of a plan decides bytes."""
    decisions = [(d.spec.name, d.action, d.scheme, d.spec.tied_to) for d in plan.decisions]
    known = [plan.info.config, plan.info.metadata]
    return [plan.format, known, decisions, list(map(_step, plan.steps)), list(map(_file, plan.files))]


def _step(step: Step) -> list[Any]:
    return [step.placed, list(step.specs), step.action, step.scheme, type(step.quantizer).__qualname__]


def _file(file: FilePlan) -> list[Any]:
    # What is copied is copied anew when a run is gone on with.
    return [file.path, file.prefix, list(file.parts), file.suffix, list(file.between), file.last, file.copy_nbytes]


def _numbers(tasks: Sequence[Task]) -> bytes:
    """All tasks in order; a model has many."""
    found = array.array("q")
    for task in tasks:
        found.append(len(task.outputs))
        for index, rows in task.outputs:
            found.extend((index, rows.start, rows.stop))
    return found.tobytes()


def _statistics(stats: TensorStats) -> dict[str, Any]:
    return {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}


def _versions(objects: Iterable[object]) -> str:
    own = [
        f"monoquant {__version__}",
        f"torch {torch.__version__}",
        f"numpy {numpy.__version__}",
        f"python {sys.version_info[0]}.{sys.version_info[1]}",
    ]
    modules = {type(found).__module__ for found in objects}
    return ", ".join([*own, *sorted({_version(m) for m in modules if m.partition(".")[0] != __package__})])


def _version(module: str) -> str:
    """Of the distribution that a module is of; without one, the state of its file."""
    package = module.partition(".")[0]
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}"
    if found := metadata.packages_distributions().get(package):
        return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(found)))
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        raise NotResumable(f"{module}: nothing tells its version")
    return f"{module} {_size_and_time(Path(file))}"


def _machine(device: torch.device) -> str:
    """What kernels are chosen by: their sums may round otherwise."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability(), device.type]
    if device.type == "cuda":
        found.append(torch.cuda.get_device_name(device))
    return " ".join(found)


def _pieces(path: Path) -> str:
    """Digest of a few pieces of a file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(PIECES):
                file.seek((size - PIECE_BYTES) * number // (PIECES - 1) if size > PIECE_BYTES else 0)
                digest.update(file.read(PIECE_BYTES))
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    return digest.hexdigest()


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    return status.st_size, status.st_mtime_ns


def _digest(value: object) -> str:
    return _Digest().of(value).hex()


class _Digest:
    """Digests of values of plans: the same for equal ones in any process, and another for any difference."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}  # of dataclasses, of which plans hold the same ones many times
        self._inside: set[int] = set()  # functions whose variables are being looked at, themselves perhaps among them

    def of(self, value: object) -> bytes:
        """Digest of a value.

        :raises NotResumable: for an object that it does not know.
        """
        digest = hashlib.blake2b(digest_size=16)
        self._feed(digest, value)
        return digest.digest()

    def _feed(self, digest: hashlib.blake2b, value: Any) -> None:
        if value is None or isinstance(value, bool | int | float | str):
            text = repr(value).encode("utf-8", "surrogatepass")
            digest.update(b"%s %d " % (type(value).__name__.encode(), len(text)))
            digest.update(text)
        elif isinstance(value, bytes | bytearray | memoryview):
            digest.update(b"bytes %d " % len(value))
            digest.update(value)
        elif isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(as_bytes(value.detach().cpu().contiguous()).numpy().data)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            digest.update(self._dataclass(value))
        elif isinstance(value, Mapping):
            self._all(digest, b"mapping", sorted(((k, v) for k, v in value.items()), key=lambda item: repr(item[0])))
        elif isinstance(value, AbstractSet):
            self._all(digest, b"set", sorted(value, key=repr))
        elif isinstance(value, Sequence):
            self._all(digest, b"sequence", value)
        elif callable(value):
            digest.update(self._callable(value))
        else:
            raise NotResumable(f"nothing tells a {type(value).__name__} in the plan from another")

    def _all(self, digest: hashlib.blake2b, kind: bytes, values: Sequence[Any]) -> None:
        digest.update(b"%s %d " % (kind, len(values)))
        for value in values:
            self._feed(digest, value)

    def _callable(self, value: Any) -> bytes:
        """Its name, and the values that it was made with as far as they are plain: what plugins say covers the rest."""
        named = value if hasattr(value, "__qualname__") else type(value)
        found = [self.of(f"{named.__module__}:{named.__qualname__}")]
        if id(value) not in self._inside:
            self._inside.add(id(value))
            held = [getattr(value, name, None) for name in ("func", "args", "keywords")]
            held += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            for one in held:
                try:
                    found.append(self.of(one))
                except NotResumable:
                    found.append(self.of(type(one).__qualname__))
            self._inside.remove(id(value))
        return b"".join(found)

    def _dataclass(self, value: Any) -> bytes:
        known = self._known.get(id(value))
        if known is None:
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            content = itertools.chain([type(value).__qualname__], itertools.chain.from_iterable(fields))
            known = self._known[id(value)] = self.of(list(content))
        return known

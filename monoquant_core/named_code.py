"""Code that the user names as ``pkg.mod:name``: the only code that is imported because a command says so.

Nothing is ever imported from a model folder, or because a file asks for it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from monoquant_core.errors import MonoquantError, SourceError

T = TypeVar("T")

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_reference(text: str) -> bool:
    """Whether a text names code, and no file: ``pkg.mod:name``."""
    return _REFERENCE.fullmatch(text) is not None and not os.path.lexists(text)


def find(reference: str) -> Any:
    """What ``pkg.mod:name`` names. Modules are found as Python finds them, and then in the current folder.

    :raises SourceError: when there is no such module or name, or importing it fails.
    """
    module, _, path = reference.partition(":")
    with _current_folder():
        try:
            value: Any = importlib.import_module(module)
        except ModuleNotFoundError as exc:
            if exc.name is not None and (module == exc.name or module.startswith(exc.name + ".")):
                raise SourceError(
                    f"{reference}: there is no module {exc.name!r}",
                    hint="install it, run the command in the folder that it is in, or set PYTHONPATH",
                ) from exc
            raise SourceError(f"{reference}: {module} needs a module that is missing: {exc.name!r}") from exc
        except (Exception, SystemExit) as exc:  # the user's code may fail in any way
            raise SourceError(f"{reference}: importing {module} failed: {_reason(exc)}") from exc
    for part in path.split("."):
        if not hasattr(value, part):
            raise SourceError(f"{reference}: {module} has no {path!r}")
        value = getattr(value, part)
    return value


def call(reference: str, function: Callable[..., T], *args: Any) -> T:
    """Call code of the user's.

    :raises SourceError: when it fails, with its own words.
    """
    with _current_folder():
        try:
            return function(*args)
        except MonoquantError:
            raise
        except Exception as exc:  # the user's code may fail in any way
            raise SourceError(f"{reference}: it failed: {_reason(exc)}") from exc


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder can be imported, after all others; later not: it may be a model's."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _reason(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}".rstrip(": ")

"""The monoquant command. Commands parse, call :mod:`monoquant_core.api` and print; errors become exit codes here."""

import gc
import os
import sys
from collections.abc import Sequence

from monoquant_core.cli import signals

OK, REFUSED, INTERNAL = 0, 2, 3
GARBAGE = 50_000  #: objects more than there were, before the garbage collector looks at them


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, the only place that knows them.

    0; 1 when ``conformance`` found a fault or ``verify`` a difference; 2 for usage errors and refusals (``error:`` and
    ``hint:`` on stderr); 3 for a bug (traceback); 130 on Ctrl-C; 143 on SIGTERM; 141 when stdout has no reader.
    """
    # Half a million objects of torch are not garbage: looking at them while it is imported, and again when the
    # interpreter ends, would take a third of a short command's time.
    gc.set_threshold(GARBAGE)
    try:
        signals.install()
        status = _run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except signals.Quit as quit:
        status = quit.status
    except BrokenPipeError:
        status = signals.BROKEN_PIPE
    except OSError as exc:
        status = _refuse(f"standard output: {exc.strerror or exc}")
    _settle()
    gc.freeze()
    return status


def _run(args: Sequence[str] | None) -> int:
    from monoquant_core.cli.app import build_app
    from monoquant_core.cli.render import printable
    from monoquant_core.errors import MonoquantError
    from monoquant_core.plugins import load_registry

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of tensors need not be valid in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        build_app(load_registry())(args, prog_name="monoquant")
    except SystemExit as exc:  # how typer ends, also after a usage error
        return exc.code if isinstance(exc.code, int) else OK if exc.code is None else REFUSED
    except MonoquantError as exc:
        return _refuse(printable(str(exc)), printable(exc.hint))
    except MemoryError:
        return _refuse("out of memory", "close other programs, or lower --threads")
    except Exception:  # noqa: BLE001 - whatever it is, it is a bug of ours or of a plugin's
        import traceback

        traceback.print_exc()
        print("This is a bug in monoquant or in a plugin of it: please report it with these lines.", file=sys.stderr)
        return INTERNAL
    return OK


def _refuse(message: str, hint: str = "") -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return REFUSED


def _settle() -> None:
    """Keep the interpreter's own last flush from complaining about a stream that is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())

"""Signals: Ctrl-C and SIGTERM end the command quickly and quietly. Installed before anything heavy is imported."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

BROKEN_PIPE = 141  #: what a shell reports for a program that SIGPIPE ended
GRACE_SECONDS = 4.0  #: for partial files to be removed; PROMISES 6 allows five seconds in all

_SHOW_CURSOR = b"\033[?25h"  #: progress bars hide it

_leaving = False


class Quit(BaseException):
    """Leave the command with a status. Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def install() -> None:
    """Let SIGINT and SIGTERM raise :class:`Quit`; a SIGINT that the caller ignores (a background job) stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    global _leaving  # noqa: PLW0603 - signals belong to the process
    status = 128 + number
    # An exception inside an import may be swallowed or turned into another one by C code, and there is nothing to
    # clean up yet; a second signal means that the first was not quick enough.
    if _leaving or _importing(frame):
        _exit(status)
    _leaving = True
    # Also when the exception is lost, as in a finalizer, or a long call does not return: the process ends in time.
    timer = threading.Timer(GRACE_SECONDS, _exit, [status])
    timer.daemon = True
    timer.start()
    raise Quit(status)


def _exit(status: int) -> None:
    """Leave at once, the terminal as it was."""
    if sys.stderr is not None and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(status)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

"""Checkpoints: every so often what is done is brought to the disk and noted in a journal, which the next run reads.

A thread of its own does it, so that neither the workers nor progress wait for the disk. Nothing is written before the
first checkpoint is due: a run that is over by then costs nothing more.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from monoquant_core.commit import Destination
from monoquant_core.errors import SourceError
from monoquant_core.identity import NotResumable, difference
from monoquant_core.journal import Damaged, Header, Journal, Recorded, Results, read_journal
from monoquant_core.scratch import Scratch
from monoquant_core.workers import Workers

SECONDS = 10.0  #: until the first checkpoint, and between them
SHARE = 10.0  #: a checkpoint that took long is followed by this many times as long a break

I = TypeVar("I")  # noqa: E741

#: a file of an output, by its number among the plan's files
FileAt = tuple[Destination, int]


class Checkpoints:
    """What is done of a run, by passes and the numbers of their tasks.

    A context manager, inside those of the outputs. Entering looks for the journal of an interrupted run, and begins the
    outputs: with what that run left, if it was the same. Leaving by an interruption makes a last checkpoint, if there
    was one before.

    :param key: what decides the bytes of the run; asked in another thread perhaps.
    :param say: told, in this thread, what the user should know right away.
    :param chunk_elements: the size of tasks, see :func:`noted_chunk`.
    :param fresh: whether what an interrupted run left is of no interest.
    """

    def __init__(
        self,
        outputs: Sequence[Destination],
        key: Callable[[], Mapping[str, str]],
        say: Callable[[str], None],
        *,
        chunk_elements: int,
        seconds: float = SECONDS,
        fresh: bool = False,
    ) -> None:
        self._outputs, self._key, self._say, self._seconds, self._fresh = outputs, key, say, seconds, fresh
        self._chunk_elements = chunk_elements
        self.notes: list[str] = []  #: what the user should know, once each
        self._said = 0
        self._known: Mapping[str, Results] = {}
        self._journal: Journal | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, dict[int, Sequence[float]]] = {}
        self._written: set[FileAt] = set()
        self._over, self._interrupted, self._abandoned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="monoquant checkpoints", daemon=True)

    def __enter__(self) -> Checkpoints:
        found = None if self._fresh else self._find()
        if found is not None:
            self._known, self._journal = found.done, Journal.reopen(self._outputs[0].journal, found)
        try:
            for output in self._outputs:
                output.begin(adopt=found is not None)
            self._check()
        except BaseException:
            self._close()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._interrupted = kind is not None and not issubclass(kind, Exception)
        self._stop()

    def known(self, phase: str) -> Results:
        """What an interrupted run had done of a pass, by the numbers of tasks."""
        return self._known.get(phase, {})

    def map(
        self,
        workers: Workers,
        phase: str,
        function: Callable[[I, Scratch], Sequence[float]],
        items: Sequence[I],
        numbers: Iterable[int],
        finished: Callable[[Sequence[I]], None] = lambda _: None,
        writes: Callable[[I], Iterable[FileAt]] = lambda _: (),
    ) -> list[Sequence[float]]:
        """As :meth:`Workers.map`, without the tasks that an interrupted run had done.

        :param items: all tasks of the pass.
        :param numbers: which of them to do now.
        :param writes: the files that a task writes into.
        :return: what was measured of these tasks, those included that are not done again.
        """
        known, made, numbers = self.known(phase), dict[int, Sequence[float]](), list(numbers)

        def work(number: int, scratch: Scratch) -> None:
            made[number] = function(items[number], scratch)

        def note(done: Sequence[int]) -> None:
            done = [number for number in done if number in made]  # one that has just failed may be among them
            if not done:
                return
            self._add(phase, {number: made[number] for number in done}, {f for n in done for f in writes(items[n])})
            finished([items[number] for number in done])

        workers.map(work, [number for number in numbers if number not in known], note)
        return [made[number] if number in made else known[number] for number in numbers]

    def finish(self) -> None:
        """Everything is done: no more checkpoints.

        :raises OutputError: when the disk had refused at one.
        """
        self._stop()
        self._check()

    def _find(self) -> Recorded | None:
        """What an interrupted run left, if this one can go on with it; if not, the user hears why."""
        if not any(os.path.lexists(output.journal) for output in self._outputs):
            return None
        try:
            found = [read_journal(output.journal) for output in self._outputs]
        except Damaged as exc:
            self.notes.append(f"warning: {exc}; what an interrupted run had done is done again")
            return None
        if not any(found):
            return None  # it had not noted anything yet
        if reason := self._speaks_against(found):
            path = self._outputs[0].path
            self.notes.append(f"{path}: an interrupted run cannot be resumed: {reason}; starting anew")
            return None
        return found[0]

    def _speaks_against(self, found: Sequence[Recorded | None]) -> str:
        """Why a run cannot go on with what these journals are of; "" if nothing speaks against it."""
        headers = [one.header for one in found if one is not None]
        run = [(headers[0].run, number, len(found)) for number in range(len(found))]
        if [(header.run, header.number, header.outputs) for header in headers] != run:
            return "it wrote other outputs"
        try:
            reason = difference(self._key(), headers[0].key)
        except (NotResumable, SourceError) as exc:
            return str(exc)
        return reason or ("" if all(o.as_planned() for o in self._outputs) else "its files are not as it left them")

    def _add(self, phase: str, done: Mapping[int, Sequence[float]], written: set[FileAt]) -> None:
        self._check()
        with self._lock:
            self._pending.setdefault(phase, {}).update(done)
            self._written |= written

    def _check(self) -> None:
        """Say what is to be said, and fail where the thread failed."""
        for note in self.notes[self._said :]:
            self._said += 1
            self._say(note)
        if self._failure is not None:
            raise self._failure

    def _stop(self) -> None:
        self._over.set()
        try:
            self._thread.join()
        except BaseException:
            self._abandoned = True  # interrupted once more: nothing is noted that may not be on the disk
            raise
        self._close()

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _run(self) -> None:
        pause = self._seconds
        try:
            while not self._over.wait(min(pause, threading.TIMEOUT_MAX)):
                began = time.monotonic()
                if not self._checkpoint():
                    return
                pause = max(self._seconds, SHARE * (time.monotonic() - began))
            if self._interrupted and self._journal is not None:
                self._checkpoint()
        except BaseException as exc:  # noqa: BLE001 - raised in the calling thread
            # Data that could not be brought to the disk are lost, and the disk says so only once.
            self._failure = exc

    def _checkpoint(self) -> bool:
        """Note what was done since the last one; False if there is no sense in trying again.

        :raises OutputError: when data could not be brought to the disk.
        """
        with self._lock:
            done, self._pending = self._pending, {}
            written, self._written = self._written, set()
        if not done:
            return True
        try:
            key = self._key() if self._journal is None else {}
        except (NotResumable, SourceError) as exc:
            self.notes.append(f"if this run is interrupted it cannot be resumed: {exc}")
            return False
        for output in self._outputs:
            # The first time everything, with the names: from then on the journal says that the files are there.
            output.flush({file for at, file in written if at is output} if self._journal is not None else None)
        if self._abandoned:
            return False
        try:
            if self._journal is None:
                self._journal = self._create(key)
            self._journal.append(done)
        except OSError as exc:  # such as a disk that is full: the files have their space already
            if self._journal is None:
                for output in self._outputs:
                    output.drop_journal()
            self.notes.append(
                f"{self._outputs[0].journal}: cannot be written: {exc.strerror or exc}; if this run is interrupted, "
                "what it does from now on is lost"
            )
            return False
        return True

    def _create(self, key: Mapping[str, str]) -> Journal:
        """The journals of all outputs, the first one last, because it counts only with the others."""
        run = Header(os.urandom(16).hex(), key, 0, len(self._outputs), self._chunk_elements)
        for number, output in enumerate(self._outputs[1:], 1):
            Journal.create(output.journal, dataclasses.replace(run, number=number)).close()
            output.flush_names()
        journal = Journal.create(self._outputs[0].journal, run)
        self._outputs[0].flush_names()
        return journal


def noted_chunk(output: Destination, sizes: Collection[int], usual: int) -> int:
    """The size of tasks of an interrupted run, if it is one of these; else the usual one.

    It follows from the number of threads, with which another run may go on.
    """
    try:
        found = read_journal(output.journal)
    except Damaged:
        return usual
    return found.header.chunk_elements if found is not None and found.header.chunk_elements in sizes else usual

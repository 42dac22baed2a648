"""Threads that take tasks in order, each with buffers of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from monoquant_core.scratch import Scratch

POLL_SECONDS = 0.1  #: between looks at the threads: for progress, and for signals

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741


class Stopped(Exception):
    """A task that was under way when the run was given up."""


class Workers:
    """Threads for tasks, each with buffers of its own; torch's own threads rest meanwhile."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stopped = threading.Event()

    def __enter__(self) -> Workers:
        # Process-wide, and for the threads that start from now on.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads, "monoquant")
        self._scratches = [Scratch() for _ in range(self.threads)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
        finally:
            torch.set_num_threads(self._torch_threads)

    def map(
        self,
        function: Callable[[I, Scratch], T],
        items: Sequence[I],
        finished: Callable[[Sequence[I]], None] = lambda _: None,
    ) -> list[T]:
        """Results in the order of the items. A thread takes the next item when it is done with one.

        :param finished: called in this thread, a few times a second, with the items that were finished since.
        :raises Exception: the failure of the first item, in order, that failed.
        """
        results: dict[int, T] = {}
        failures: dict[int, BaseException] = {}
        done: deque[I] = deque()
        following = enumerate(items)
        turn = threading.Lock()

        def work(scratch: Scratch) -> None:
            with torch.inference_mode():
                while not (failures or self.stopped.is_set()):
                    with turn:
                        index, item = next(following, (-1, None))
                    if item is None:
                        return
                    try:
                        results[index] = function(item, scratch)
                    except BaseException as exc:  # noqa: BLE001 - raised in the calling thread
                        failures[index] = exc
                    done.append(item)

        running = [self._pool.submit(work, scratch) for scratch in self._scratches[: len(items)]]
        while running:
            # A wait without end cannot be interrupted everywhere.
            running = list(wait(running, timeout=POLL_SECONDS).not_done)
            if not failures and done:
                finished([done.popleft() for _ in range(len(done))])
        if failures:  # items are taken in order, so that the first failure does not depend on threads
            raise failures[min(failures)]
        return [results[i] for i in range(len(items))]

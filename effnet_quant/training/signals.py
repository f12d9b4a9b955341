"""Signals that ask a run to stop. They are noted at once; the trainer reacts between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SAME_REQUEST_SECONDS = 5.0
PATIENCE_SECONDS = 2.0  # Docker kills after 10 s; by then a layer must have ended and the checkpoint be written
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal asked the run to stop, and the checkpoint has been written.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Abandoned(BaseException):
    """The work of an ``abandonable`` block did not end soon after a signal. No ``except Exception`` catches this."""


class SignalWatch:
    """Notes SIGINT, SIGTERM and SIGUSR1 in a ``with`` block of the main thread. In other threads it does nothing.

    A second signal has its usual effect and ends the process at once. Within five seconds of the first it is ignored as
    the same request: schedulers signal every process of a job, and multiproc.py passes its signals on.

    Args:
        abandons: whether blocks of ``abandonable`` end two seconds after the first signal. SIGALRM then ends them.

    Attributes:
        noted: number of the first signal; 0 before any.
    """

    def __init__(self, *, abandons: bool = False) -> None:
        self.noted = 0
        self._abandons = abandons
        self._since = 0.0
        self._overdue = False
        self._may_end = False
        self._previous: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.noted:
            self.noted, self._since = number, now
            if signal.SIGALRM in self._previous:
                # again each second, because a callback may have swallowed the exception
                signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, 1.0)
        elif now - self._since > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block of work that may be left at any point.

        Raises:
            Abandoned: a signal was noted two seconds ago.
        """
        self._may_end = True
        try:
            if self._overdue:
                raise Abandoned
            yield
        finally:
            self._may_end = False

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``. The wait for each is ``abandonable``."""
        iterator, end = iter(items), object()
        while True:
            with self.abandonable():
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def __enter__(self) -> SignalWatch:
        self.noted, self._overdue = 0, False
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self.note)
            if self._abandons:
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *exception: object) -> None:
        if signal.SIGALRM in self._previous and self.noted:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self._overdue = True
        if self._may_end:
            raise Abandoned

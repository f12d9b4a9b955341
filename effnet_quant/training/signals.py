"""Signals that ask a run to stop. They are noted at once; the trainer reacts between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 5.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal asked the run to stop, and the checkpoint has been written.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalWatch:
    """Notes SIGINT, SIGTERM and SIGUSR1 in a ``with`` block of the main thread. In other threads it does nothing.

    A second signal has its usual effect and ends the process at once. Within five seconds of the first it is ignored as
    the same request: schedulers signal every process of a job, and multiproc.py passes its signals on.

    Attributes:
        noted: number of the first signal; 0 before any.
    """

    def __init__(self) -> None:
        self.noted = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.noted:
            self.noted, self._since = number, now
        elif now - self._since > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __enter__(self) -> SignalWatch:
        self.noted = 0
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

"""How a script ends when a signal asks it to: within ten seconds, whatever it is doing."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from effnet_quant.training.signals import SAME_REQUEST_SECONDS, STOPPING

_KICK_SECONDS = 1.0  # a system call of the main thread may be waiting, while another thread got the signal
_INSIST_SECONDS = 4.0  # a callback may have swallowed the exception
_LIMIT_SECONDS = 8.0  # then the process ends without its main thread
_END = 0  # no signal has this number
_ending = threading.Lock()


class Stopped(BaseException):
    """A signal asked the script to stop. Raised in the main thread, outside of a training's steps.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; no file is left half-written")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status, as shells count it."""
        return 128 + self.number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise ``Stopped`` in the block when a stop signal arrives, and see to it that the process ends.

    A main thread that is stuck in a library's call can't raise anything. After eight seconds, or at a second signal, a
    thread of its own then ends the process. While other code has put its own handlers in place, as a training has, this
    waits. Outside the main thread the block has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch()
    watch.start()
    try:
        yield
    except Stopped:
        raise  # the thread stays: what follows must end too
    except BaseException as error:
        if watch.raised is not None:  # an import that is interrupted may fail in any way
            raise watch.raised from error
        watch.end()
        raise
    watch.end()


def end_now_on_signals(status: int) -> None:
    """From now on, end with ``status`` at once when a stop signal arrives. For a script whose work is done."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: os._exit(status))


def ignore_signals() -> None:
    """Ignore the stop signals that have handlers. Python takes all handlers away at its end, and a signal then kills."""
    for number in STOPPING:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)


def end_process(stop: Stopped) -> NoReturn:
    """Say why, and end the process without what Python and the libraries do at their ends, which can take seconds."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the other thread ends the process
    with contextlib.suppress(OSError):
        os.write(2, f"{stop}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(stop.status)


def flush() -> None:
    """Write out what the standard streams hold, where that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def leave(status: int) -> NoReturn:
    """Call the exit functions, and end the process without the rest of Python's end, which took ten seconds under load."""
    atexit._run_exitfuncs()
    flush()
    os._exit(status)


def end_children() -> None:
    """End this process's data workers without waiting for what they read. Only for a script that is about to end."""
    workers = sys.modules.get("effnet_quant.data.workers")
    if workers is not None:  # else there are none, and loading torch would take seconds
        workers.end_at_once()


class _Watch:
    """The signal handlers, and the thread that learns of each signal even if no handler can run."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._main = threading.get_ident()
        self.raised: Stopped | None = None  # by the handler, if it was called
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = -1

    def start(self) -> None:
        for number in STOPPING:
            # a shell that starts a script with & has it ignore SIGINT
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()

    def end(self) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write, bytes([_END]))

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a child has this handler until it sets its own
            self.raised = Stopped(number)
            end_children()  # what is left on the way out would wait for them
            raise self.raised

    def _watch(self) -> None:
        noted = 0  # the first signal
        since = counted = 0.0  # when it came, and for how long it has been this handler's
        kicks = [_KICK_SECONDS, _INSIST_SECONDS]
        while True:
            before = time.monotonic() if noted else 0.0
            ready, _, _ = select.select([self._read], [], [], 0.25 if noted else None)
            now = time.monotonic()
            for number in os.read(self._read, 64) if ready else b"":
                if number == _END:
                    return
                if number not in STOPPING or not self._is_mine(number):
                    continue
                if noted and now - since > SAME_REQUEST_SECONDS:
                    end_process(Stopped(number))
                if not noted:
                    noted, since = number, now
            if not before or not self._is_mine(noted):  # the wait for the first signal does not count
                continue
            counted += now - before
            if counted > _LIMIT_SECONDS:
                end_process(Stopped(noted))
            if kicks and counted > kicks[0] and (kicks.pop(0) == _INSIST_SECONDS or self.raised is None):
                signal.pthread_kill(self._main, noted)

    def _is_mine(self, number: int) -> bool:
        return signal.getsignal(number) == self.handle


def say(sentence: object) -> None:
    """Print a script's last sentence on standard error, where that can be written to."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)

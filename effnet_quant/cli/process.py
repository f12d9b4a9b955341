"""How every script starts and ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from effnet_quant.cli.stopping import Stopped, end_now_on_signals, end_process, flush, leave, say, stopping
from effnet_quant.errors import PeerLost, UserError
from effnet_quant.training.signals import STOPPING

LOST_PEER_STATUS = 75  # EX_TEMPFAIL: nothing is wrong with this process itself


def typed_command() -> str:
    """The command that the user typed, e.g. "main.py" or "effnet-quant verify", for usage lines."""
    return os.path.basename(sys.argv[0])


def run(job: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script's job on the command line's arguments, and exit with its status.

    A UserError prints its sentence on standard error and exits with status 2. With ``--debug`` it prints the traceback.
    SIGINT, SIGTERM and SIGUSR1 exit with status 130, 143 or 138 within ten seconds. The end of another process of the job
    exits with status 75.
    """
    try:
        with stopping():
            status = _status(job, sys.argv[1:])
    except Stopped as stop:
        flush()
        end_process(stop)
    if status in [128 + number for number in STOPPING]:  # a training or multiproc.py has reacted to a signal
        leave(status)
    end_now_on_signals(status)
    sys.exit(status)


def _status(job: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        status = job(arguments)
        sys.stdout.flush()  # a full disk is said here, not by a traceback at the process's end
    except UserError as error:
        _record(error)
        if "--debug" in arguments:
            raise
        say(f"error: {error}")
        status = 2
    except PeerLost as error:
        if "--debug" in arguments:
            raise
        say(error)
        status = LOST_PEER_STATUS
    except BrokenPipeError:
        status = reader_left()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or "--debug" in arguments:
            raise
        discard_output()
        say("error: the output can't be written, because its disk is full; free some space, or send it elsewhere.")
        status = 2
    return status


def reader_left() -> int:
    """The status of a script whose reader has closed the pipe, as ``head`` does; nothing more is written to it."""
    discard_output()
    return 128 + 13  # SIGPIPE


def discard_output() -> None:
    """Send what is left of standard output nowhere, so that the process's end does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _record(error: UserError) -> None:
    """If torchrun or multiproc.py started this process, write the error to the file that they read."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):  # the disk may be full; then the file is empty
            get_error_handler().record_exception(error)

"""How every script starts and ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from effnet_quant.errors import PeerLost, UserError

LOST_PEER_STATUS = 75  # EX_TEMPFAIL: nothing is wrong with this process itself


def typed_command() -> str:
    """The command that the user typed, e.g. "main.py" or "effnet-quant verify", for usage lines."""
    return os.path.basename(sys.argv[0])


def run(job: Callable[[Sequence[str]], int]) -> None:
    """Run a script's job on the command line's arguments, and exit with its status.

    A UserError prints its sentence on standard error and exits with status 2. With ``--debug`` it prints the traceback.
    Ctrl-C exits with status 130. The end of another process of the job exits with status 75.
    """
    arguments = sys.argv[1:]
    try:
        status = job(arguments)
    except UserError as error:
        _record(error)
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except PeerLost as error:
        if "--debug" in arguments:
            raise
        print(error, file=sys.stderr)
        status = LOST_PEER_STATUS
    except BrokenPipeError:
        status = reader_left()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def reader_left() -> int:
    """The status of a script whose reader has closed the pipe, as ``head`` does; nothing more is written to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + 13  # SIGPIPE


def _record(error: UserError) -> None:
    """If torchrun or multiproc.py started this process, write the error to the file that they read."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):  # the disk may be full; then the file is empty
            get_error_handler().record_exception(error)

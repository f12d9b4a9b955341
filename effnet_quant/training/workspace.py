"""The folder of a run, which no other run may use at the same time or overwrite unasked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.files import cant_write

LOCK = "run.lock"
_PEER_SECONDS = 30.0  # for which a job that was started again waits for its earlier processes to end


def check_unused(workspace: Path, names: tuple[str, ...]) -> None:
    """Check that a new run would overwrite no checkpoint.

    Raises:
        UserError: one of ``names`` is in the workspace.
    """
    for name in names:
        path = workspace / name
        if path.exists():
            raise UserError(
                f"{path} is an earlier run's checkpoint; go on from it with --resume {path}, choose another --workspace, "
                "or replace it with --overwrite."
            )


@contextmanager
def locked(workspace: Path, job: str = "", *, setting: str = "--workspace") -> Iterator[None]:
    """Hold a lock file in the workspace for the duration of the block.

    The file names process and host. A lock whose process has ended on this host is taken over.

    Args:
        workspace: the folder.
        job: torchrun's name of the job. A job takes over its own lock from another host, where its processes have ended.
        setting: the flag that chooses another folder, for messages.

    Raises:
        UserError: another run holds the lock, or may hold it on a host that can't be asked.
    """
    path, own = workspace / LOCK, _this_process() | {"job": job}
    deadline = time.monotonic() + _PEER_SECONDS
    while not _acquired(path, own, deadline, setting):
        time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # also if another host was told to take it over
            if _read(path) == own:
                path.unlink()


def _acquired(path: Path, own: dict[str, Any], deadline: float, setting: str) -> bool:
    """Try to write the lock file; returns False if a process of the same job holds it and may soon be gone."""
    with _alone_in(path.parent):
        if path.exists():
            owner = _read(path)
            same_job = bool(own["job"]) and owner.get("job") == own["job"]
            alive = _is_alive(owner, own)
            if alive and same_job and time.monotonic() < deadline:
                return False
            if alive or (alive is None and not same_job):
                raise UserError(_refusal(path, owner, setting, known=bool(alive)))
            path.unlink(missing_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
        except OSError as error:
            if not isinstance(error, FileExistsError):
                path.unlink(missing_ok=True)
            raise cant_write(path, error) from error
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes of this host out of the block, so that two can't take over one lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise cant_write(folder / LOCK, error) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _state(os.getpid())[1],
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        # containers of one host may share its name, but not see each other's processes
        "processes": _link(Path("/proc/self/ns/pid")),
    }


def _is_alive(owner: dict[str, Any], own: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a lock still runs; None if it can't be known here."""
    process = owner.get("pid")
    if owner.get("host") != own["host"] or not isinstance(process, int) or process <= 0:
        return None
    if owner.get("boot") != own["boot"]:
        return False
    if owner.get("processes") != own["processes"]:
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, started = _state(process)
    if state in ("Z", "X"):  # dead, but its parent has not asked for its status
        return False
    return owner.get("started") in (None, started)  # another process may have its number by now


def _refusal(path: Path, owner: dict[str, Any], setting: str, *, known: bool) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}, since {owner.get('since', '?')}"
    if known:
        return f"another run uses {path.parent} ({who}); wait for its end, or choose another {setting}."
    return (
        f"another run may be using {path.parent} ({who}), which can't be checked from here; if it has ended, delete {path}, "
        f"else choose another {setting}."
    )


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says; nothing if it is damaged."""
    try:
        said = json.loads(path.read_bytes()[:10_000])
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _state(process: int) -> tuple[str | None, str | None]:
    """State of a process and its start in clock ticks (proc_pid_stat(5), fields 3 and 22); None if unknown."""
    stat = _text(Path(f"/proc/{process}/stat"))
    if stat is None:
        return None, None
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None

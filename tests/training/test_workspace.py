"""One run at a time uses a workspace, and a crash leaves no lock that holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from effnet_quant.errors import UserError
from effnet_quant.training import workspace as module
from effnet_quant.training.workspace import LOCK, check_unused, locked

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from effnet_quant.training.workspace import locked
with locked(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, job=""):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), job], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def change(folder, **values):
    path = folder / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_lock_is_there_during_a_run_and_gone_after_it(tmp_path):
    with locked(tmp_path):
        said = json.loads((tmp_path / LOCK).read_text())
        assert said["pid"] == os.getpid()
        assert said["host"] == os.uname().nodename
        with pytest.raises(UserError, match=rf"another run uses .* \(process {os.getpid()} on .*--workspace"):
            locked(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_running_process_keeps_others_out_and_a_killed_one_does_not(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=rf"another run uses .* \(process {process.pid} on "):
            locked(tmp_path).__enter__()
        process.kill()
        process.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("stale", "values"),
    [
        (True, {"boot": "another start of this machine"}),
        (True, {"started": "1"}),  # another process has its number now
        (True, {"pid": 2**22 + 1}),
        (False, {"host": "elsewhere"}),
        (False, {"processes": "pid:[1]"}),  # of another container
        (False, {"pid": -1}),
        (False, {"pid": "x"}),
    ],
)
def test_what_can_be_checked_is_and_what_cant_is_asked(tmp_path, stale, values):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        change(tmp_path, **values)
        if stale:
            with locked(tmp_path):
                pass
        else:
            with pytest.raises(
                UserError, match=rf"can't be checked from here; if it has ended, delete .*/{LOCK}, else"
            ):
                locked(tmp_path).__enter__()
            (tmp_path / LOCK).unlink()
            with locked(tmp_path):
                pass
        process.kill()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"\xff\xfe", b"{}"])
def test_a_damaged_lock_is_asked_about(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(UserError, match=f"delete .*/{LOCK}"):
        locked(tmp_path).__enter__()
    assert (tmp_path / LOCK).read_bytes() == content


def test_a_job_that_is_started_again_takes_over_its_own_lock(tmp_path, monkeypatch):
    with holder(tmp_path, "job 7") as process:
        change(tmp_path, host="elsewhere")
        with locked(tmp_path, "job 7"):
            pass
        process.kill()
    with holder(tmp_path, "job 7") as process:
        threading.Timer(0.5, process.kill).start()
        began = time.monotonic()
        with locked(tmp_path, "job 7"):  # it waits for the end
            assert time.monotonic() - began > 0.3
        assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(module, "_PEER_SECONDS", 0.3)
    with holder(tmp_path, "job 7") as process:
        with pytest.raises(UserError, match="another run uses"):
            locked(tmp_path, "job 7").__enter__()
        process.kill()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
    code = HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), ""],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    while sum(racer.poll() is not None for racer in racers) < 3:
        time.sleep(0.05)
    outputs = [racer.communicate()[0] for racer in racers]
    assert sorted(outputs) == ["", "", "", "held\n"]
    assert not (tmp_path / LOCK).exists()


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path):
    check_unused(tmp_path, ("a", "b"))
    check_unused(tmp_path / "nowhere", ("a", "b"))
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match=r"/b is an earlier run's checkpoint; go on from it with --resume .*/b, choose"):
        check_unused(tmp_path, ("a", "b"))

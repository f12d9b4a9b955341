"""A signal at any moment ends a script within ten seconds, in one sentence, with nothing half-written."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import stop_signals
from stop_signals import PHASES

BY_NAME = {phase.name: phase for phase in PHASES}
QUICK = ("start-up", "calibration", "packing")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Weights and images for the scripts."""
    folder = tmp_path_factory.mktemp("stage")
    stop_signals.prepare(folder)
    return folder


@pytest.mark.slow
def test_three_phases_end_on_sigterm(stage):
    with ThreadPoolExecutor() as pool:
        stops = [
            pool.submit(stop_signals.stop, BY_NAME[name], stage, signal.SIGTERM, random.Random(name)) for name in QUICK
        ]
    for name, stopped in zip(QUICK, stops, strict=True):
        assert stopped.result().wrong == [], (name, stopped.result())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("name", BY_NAME)
def test_ten_moments_of_each_phase(stage, name, number):
    if name in ("export", "verify") and not (stage / "small.onnx").exists():
        stop_signals.prepare_engine(stage)
    moment = random.Random(f"{number} {name}")
    endings = [stop_signals.stop(BY_NAME[name], stage, number, moment) for _ in range(10 if number == 15 else 3)]
    assert [ending for ending in endings if ending.wrong] == []


STUCK = """
import signal, sys, time
from effnet_quant.cli import stopping
from effnet_quant.cli.process import run
{change}

def job(arguments):
    print("ready", flush=True)
    {stuck}
    return 0

run(job)
"""
SWALLOWED = """
    for _ in range(1000):
        try:
            time.sleep(0.01)
        except BaseException:
            pass
"""
# the main thread waits in C, where no handler can run
IN_C = "import ctypes; library = ctypes.CDLL(None); [library.sleep(60) for _ in range(9)]"
FAST = "stopping._KICK_SECONDS, stopping._INSIST_SECONDS, stopping._LIMIT_SECONDS = 0.2, 0.4, 1.0"


def start(start_process, tmp_path, repository, stuck, change=FAST):
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(repository)!r})\n" + STUCK.format(stuck=stuck, change=change))
    process = start_process(path, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("stuck", [IN_C, "while True: [].sort()", SWALLOWED.strip().replace("\n    ", "\n    ")])
def test_a_main_thread_that_does_not_react_is_ended(start_process, repository, tmp_path, stuck):
    with start(start_process, tmp_path, repository, stuck) as process:
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 143
    assert err == "stopped by SIGTERM; no file is left half-written\n"


def test_a_main_thread_that_reacts_has_its_time(start_process, repository, tmp_path):
    # the line is printed within the block: the signal may arrive as soon as it is read
    stuck = """
    time.sleep(2.2)
    try:
        print("waited longer than the limit", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)
        print("cleaned up", flush=True)
"""
    with start(
        start_process, tmp_path, repository, stuck.strip(), FAST.replace("0.2, 0.4, 1.0", "5, 5, 2.0")
    ) as process:
        assert process.stdout.readline() == "waited longer than the limit\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "cleaned up\n")
    assert err.count("stopped by SIGTERM") == 1


def test_what_fails_because_of_the_signal_is_no_traceback(start_process, repository, tmp_path):
    """Importing NumPy, for one, swallows the exception and then fails in another way."""
    stuck = """
    try:
        time.sleep(60)
    except BaseException:
        pass
    raise RecursionError("half an import")
"""
    with start(start_process, tmp_path, repository, stuck.strip()) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "stopped by SIGTERM; no file is left half-written\n")


def test_a_second_signal_ends_at_once(start_process, repository, tmp_path):
    change = "stopping.SAME_REQUEST_SECONDS, stopping._LIMIT_SECONDS = 0.3, 60"
    with start(
        start_process, tmp_path, repository, IN_C.replace("library.sleep(60)", "library.sleep(30)"), change
    ) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.count("stopped by SIGINT") == 1


def test_a_signal_that_the_shell_has_switched_off_stays_off(start_process, repository, tmp_path):
    stuck = "time.sleep(1); print('done', flush=True)"
    script = tmp_path / "script.py"
    script.write_text(
        f"import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsys.path.insert(0, {str(repository)!r})\n"
        + STUCK.format(stuck=stuck, change="")
    )
    with start_process(script, cwd=tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "done\n", "")

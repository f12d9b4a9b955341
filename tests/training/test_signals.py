"""Signals are noted, not obeyed at once, and one request counts once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from effnet_quant.training import signals
from effnet_quant.training.signals import STOPPING, SignalWatch


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_and_the_handler_given_back(number):
    before = signal.getsignal(number)
    watch = SignalWatch()
    with watch:
        assert watch.noted == 0
        os.kill(os.getpid(), number)
        assert watch.noted == number
        os.kill(os.getpid(), number)  # the same request by another way
        assert watch.noted == number
    assert signal.getsignal(number) is before


def test_a_second_signal_later_ends_the_process():
    script = f"""
import os, sys
sys.path.insert(0, {str(signals.__file__).removesuffix("effnet_quant/training/signals.py")!r})
from effnet_quant.training import signals
signals.SAME_REQUEST_SECONDS = 0
with signals.SignalWatch() as watch:
    os.kill(os.getpid(), 15)
    print(watch.noted, flush=True)
    os.kill(os.getpid(), 15)
    print("still here", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "15\n"), result.stderr

"""Signals are noted, not obeyed at once, and one request counts once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from queue import Queue

import pytest
import torch

from effnet_quant.training import signals
from effnet_quant.training.callback import Callback
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.signals import STOPPING, Abandoned, Interrupted, SignalWatch
from effnet_quant.training.step_start import interruptible_backward


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


class Slow(torch.nn.Module):
    """Passes values on; from its call number ``at`` on, in short sleeps that take forever, forward or backward."""

    def __init__(self, at, where, act):
        super().__init__()
        self.calls, self.at, self.where, self.act = 0, at, where, act

    def forward(self, values):
        if self.training:
            self.calls += 1
        if self.calls == self.at and self.training:
            if self.where == "forward":
                self._never_end()
            elif self.where == "backward":
                values.register_hook(lambda gradient: self._never_end())
        return values

    def _never_end(self):
        self.act()
        for _ in range(3000):
            time.sleep(0.01)
        raise AssertionError("nothing ended this")


def stalled(loader, at, act):
    """A loader that waits forever for its batch number ``at``."""

    class Stalled:
        def __len__(self):
            return len(loader)

        def names(self, epoch, batch):
            return loader.names(epoch, batch)

        def epoch(self, epoch=0, first=0):
            for number, batch in enumerate(loader.epoch(epoch, first), first):
                if number == at:
                    act()
                    Queue().get(timeout=60)
                yield batch

    return Stalled()


@pytest.mark.parametrize(
    ("where", "accumulated"),
    [("forward", 1), ("backward", 2), ("waiting", 1), ("waiting", 2), ("callback", 1), ("validation", 1)],
)
def test_a_step_that_does_not_end_is_given_up_and_trained_again_to_the_same_bits(
    where, accumulated, tiny_network, make_trainer, make_loaders, tmp_path, monkeypatch, same_weights
):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.05)
    config = {"optimizer_batch_size": 4 * accumulated, "epochs": 1, "use_ema": 0.9, "mixup": 0.2}

    def act():
        os.kill(os.getpid(), signal.SIGTERM)

    def network(at, where):
        model = tiny_network()
        model.insert(4, Slow(at, where, act))
        return model

    def callbacks(trainer, where):
        noise = Callback()
        noise.on_epoch_end = lambda epoch: (trainer.model[1].running_mean.add_(1), where == "callback" and act())
        if where == "callback":
            waits = Callback()
            waits.on_epoch_end = lambda epoch: Queue().get(timeout=60)
            return [noise, waits]
        return [noise]

    def fit(workspace, at=0, where="", resume=False):
        torch.manual_seed(7)
        trainer = make_trainer(network(at, where), workspace, **config)
        train, val = make_loaders(count=24)
        if resume:
            torch.manual_seed(99)
            trainer.resume(load_checkpoint(tmp_path / "checkpoint.pth.tar"), "it")
        trainer.callbacks = callbacks(trainer, where)
        train = stalled(train, 3, act) if where == "waiting" else train
        val = stalled(val, 1, act) if where == "validation" else val
        trainer.fit(train, val)
        return trainer

    (tmp_path / "straight").mkdir()
    straight = fit(tmp_path / "straight")
    began = time.monotonic()
    with pytest.raises(Interrupted):
        fit(tmp_path, 4, where)
    assert time.monotonic() - began < 5
    state = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    # the fourth of six batches; of two accumulated ones, the third is given up with it
    stands = 6 if where in ("callback", "validation") else 3 if accumulated == 1 else 2
    assert (state["epoch"], state["batch"], state["step"]) == (0, stands, stands // accumulated)
    resumed = fit(tmp_path, resume=True)
    assert same_weights(straight.model, resumed.model)
    assert same_weights(straight.models[1], resumed.models[1])
    losses = [
        load_checkpoint(folder / "checkpoint.pth.tar")["best_prec1"] for folder in (tmp_path, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]


def test_a_long_backward_pass_ends_between_two_layers():
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
    before = signal.getsignal(signal.SIGALRM)
    loss = model(torch.ones(1024, 512)).sum()
    with SignalWatch(abandons=True) as watch, interruptible_backward(model):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Abandoned), watch.abandonable():
            loss.backward()
    assert model[-1].weight.grad is not None
    assert model[0].weight.grad is None
    assert signal.getsignal(signal.SIGALRM) is before

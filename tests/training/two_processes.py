"""What test_distributed.py runs in two processes: several trainings, whose results it writes to the folder it is given."""

# ruff: noqa: E402  (the path to this checkout comes first)

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch

from effnet_quant.errors import PeerLost, UserError
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.distributed import joined_world
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.signals import Interrupted
from training.conftest import WatchedLoader, _make_loaders, _make_trainer, _tiny_network

FOLDER = Path(sys.argv[1])
CHECKPOINT = "checkpoint.pth.tar"


def folder(name):
    path = FOLDER / name
    path.mkdir(exist_ok=True)
    return path


def doubled_batch(world):
    """Without BatchNorm and dropout; 101 images to validate on, in batches of 4 a process."""
    model = _tiny_network(batch_norm=False, dropout=0.0)
    workspace = folder("doubled")
    recorder = Recorder(workspace / "raport.json" if world.is_main else None)
    trainer = _make_trainer(model, workspace, recorder, world, use_ema=0.9, clip_grad_norm=0.5)
    trainer.fit(*_make_loaders(4, count=49, val_count=101, world=world))


def straight(world):
    """With BatchNorm, dropout, mixup and an average of the weights."""
    model = _tiny_network()
    torch.manual_seed(11 + world.rank)
    trainer = _make_trainer(model, folder("straight"), None, world, use_ema=0.9, mixup=0.2)
    trainer.fit(*_make_loaders(4, count=49, world=world))


def interrupted(world):
    """The same, stopped by a signal that only process 1 gets after its second step, and resumed."""
    workspace = folder("interrupted")
    torch.manual_seed(11 + world.rank)
    config = {"use_ema": 0.9, "mixup": 0.2}
    model = _tiny_network()
    torch.manual_seed(11 + world.rank)
    trainer = _make_trainer(model, workspace, None, world, **config)
    train, val = _make_loaders(4, count=49, world=world)
    watched = WatchedLoader(train, 2, lambda: world.rank == 1 and trainer.note_signal(signal.SIGUSR1))
    try:
        trainer.fit(watched, val)
    except Interrupted as stop:
        numbers = world.gather(torch.tensor(stop.signal_number))
    world.wait()
    state = load_checkpoint(workspace / CHECKPOINT)
    model = _tiny_network(seed=5 + world.rank)
    torch.manual_seed(99)
    trainer = _make_trainer(model, workspace, None, world, **config)
    trainer.resume(state, CHECKPOINT)
    trainer.fit(*_make_loaders(4, count=49, world=world))
    if world.is_main:
        position = {"signals": [int(number) for number in numbers], "epoch": state["epoch"], "batch": state["batch"]}
        (workspace / "position.json").write_text(json.dumps(position))


def uneven_validation(world):
    """Batches of 50 cut 51 and 50 images into two and one; of a single image, one process has none."""
    metrics = []
    for count, batch_size in ((101, 50), (1, 4)):
        trainer = _make_trainer(_tiny_network(), folder("uneven"), None, world, batch_size=batch_size)
        _, val = _make_loaders(batch_size, val_count=count, world=world)
        metrics.append(trainer.evaluate(val))
    if world.is_main:
        (folder("uneven") / "metrics.json").write_text(json.dumps(metrics))


def diverging(world):
    """The loss of process 1 is not finite in its second batch."""
    trainer = _make_trainer(_tiny_network(), folder("diverging"), None, world)
    own, batches = trainer.loss, iter(range(99))
    trainer.loss = lambda *of: own(*of) * (torch.nan if (next(batches), world.rank) == (1, 1) else 1)
    note_failure("diverging", world, lambda: trainer.fit(*_make_loaders(4, count=49, world=world)))


def apart(world):
    """Process 1 has a checkpoint that process 0 has not."""
    trainer = _make_trainer(_tiny_network(), folder("apart"), None, world)
    if world.rank == 1:
        trainer.resume({"epoch": 1, "state_dict": trainer.model.state_dict()}, CHECKPOINT)
    note_failure("apart", world, lambda: trainer.fit(*_make_loaders(4, count=49, world=world)))


def note_failure(name, world, action):
    try:
        action()
    except (UserError, PeerLost) as error:
        (folder(name) / f"{world.rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def main():
    with joined_world() as world:
        for training in (uneven_validation, doubled_batch, straight, interrupted, diverging, apart):
            training(world)
            world.wait()


if __name__ == "__main__":
    main()

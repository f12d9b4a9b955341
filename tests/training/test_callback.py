"""What hooks into training: callbacks, and another loss."""

from __future__ import annotations

import json

import pytest
import torch

from effnet_quant.data.transforms import normalize
from effnet_quant.errors import UserError
from effnet_quant.training.callback import Callback
from effnet_quant.training.metrics import Recorder


class StepCounter(Callback):
    """Keeps what the trainer says of its steps."""

    def __init__(self):
        self.seen = []

    def on_epoch_start(self, epoch):
        self.seen.append(("start", epoch))

    def on_step_end(self, step):
        self.seen.append(step)

    def on_epoch_end(self, epoch):
        self.seen.append(("end", epoch))


def test_callbacks_hear_of_epochs_and_steps(tiny_network, make_trainer, make_loaders, tmp_path):
    trainer = make_trainer(tiny_network(), tmp_path, optimizer_batch_size=8)
    counter = StepCounter()
    trainer.callbacks.append(counter)
    trainer.fit(*make_loaders())
    assert counter.seen == [("start", 0), 1, 2, 3, ("end", 0), ("start", 1), 4, 5, 6, ("end", 1)]


def test_another_loss_can_be_put_in(tiny_network, make_trainer, make_loaders, tmp_path, same_weights):
    shapes = []
    model = tiny_network(batch_norm=False)
    raport = tmp_path / "raport.json"
    trainer = make_trainer(model, tmp_path, Recorder(raport), epochs=1, lr=0.1, weight_decay=0.0)

    def loss(logits, targets, images):
        shapes.append((tuple(logits.shape), tuple(targets.shape), tuple(images.shape)))
        return 0 * logits.sum() + 3.5

    trainer.loss = loss
    trainer.fit(*make_loaders())
    assert set(shapes) == {((4, 3), (4,), (4, 3, 8, 8))}
    assert json.loads(raport.read_text())["data"]["train.loss"] == 3.5
    assert same_weights(model, tiny_network(batch_norm=False))


class Blame(Callback):
    """Keeps the images whose loss is not finite, and blames a layer."""

    def on_divergence(self, images):
        self.images = images
        return "layer 5"


def test_callbacks_say_where_a_loss_stops_being_a_number(
    tiny_network, make_trainer, make_loaders, watch, preprocessing, tmp_path
):
    model = tiny_network()
    trainer = make_trainer(model, tmp_path)
    trainer.callbacks += [Callback(), blame := Blame()]
    train, val = make_loaders()

    def spoil():
        with torch.no_grad():
            model[5].weight.fill_(torch.nan)

    with pytest.raises(UserError, match=r"batch 3 \(NaN or infinity first met in layer 5\): training has diverged"):
        trainer.fit(watch(train, 3, spoil), val)
    expected, _ = list(make_loaders()[0].epoch(0))[2]
    assert torch.equal(blame.images, normalize(expected, preprocessing))


def test_another_loss_is_called_in_autocast(tiny_network, make_trainer, make_loaders, tmp_path):
    dtypes = []
    trainer = make_trainer(tiny_network(), tmp_path, epochs=1, amp=True)
    teacher = tiny_network(seed=1).eval()

    def loss(logits, targets, images):
        with torch.no_grad():
            dtypes.append((logits.dtype, teacher(images).dtype))
        return torch.nn.functional.cross_entropy(logits, targets)

    trainer.loss = loss
    trainer.fit(*make_loaders())
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}

"""Mixed precision and the scale of the loss."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.metrics import Recorder

CHECKPOINT = "checkpoint.pth.tar"


class Overflow(nn.Module):
    """Multiplies by 1e6 at the given calls, which float16 can't hold."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.calls = 0

    def forward(self, x):
        if not self.training:
            return x
        self.calls += 1
        return x * 1e6 if self.calls in self.at else x


def network(tiny_network, at=()):
    return nn.Sequential(tiny_network(batch_norm=False, dropout=0.0), Overflow(at))


@pytest.mark.parametrize(
    ("amp_dtype", "dtype"), [(None, torch.bfloat16), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_amp_computes_in_the_type_asked_for(tiny_network, make_trainer, make_loaders, tmp_path, amp_dtype, dtype):
    dtypes = []
    model = network(tiny_network)
    model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    make_trainer(model, tmp_path, epochs=1, amp=True, amp_dtype=amp_dtype).fit(*make_loaders())
    assert set(dtypes) == {dtype}


def test_loss_scale_cancels_out(tiny_network, make_trainer, make_loaders, tmp_path):
    weights = {}
    for scale in (1.0, 128.0):
        model = network(tiny_network)
        make_trainer(model, tmp_path, epochs=1, amp=True, amp_dtype="fp16", static_loss_scale=scale).fit(
            *make_loaders()
        )
        weights[scale] = model[0][5].weight.detach()
    torch.testing.assert_close(weights[128.0], weights[1.0], rtol=1e-2, atol=1e-4)


def test_steps_that_overflow_are_skipped_and_counted_with_their_images(
    tiny_network, make_trainer, make_loaders, tmp_path, capsys
):
    raport = tmp_path / "raport.json"
    trainer = make_trainer(
        network(tiny_network, at=(2, 4)), tmp_path, Recorder(raport), epochs=1, amp=True, amp_dtype="fp16",
        static_loss_scale=128.0,
    )  # fmt: skip
    train, val = make_loaders()
    trainer.fit(train, val)
    data = json.loads(raport.read_text())["data"]
    assert data["train.skipped_steps"] == 2
    assert data["train.loss"] == pytest.approx(1.1, abs=0.5)  # of the batches whose loss is a number
    assert f"the loss of batch 2 overflowed, of {', '.join(train.names(0, 1))}" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert state["scaler"]["scale"] == 128.0 / 4  # a scale is halved by each overflow
    assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())


def test_only_a_dynamic_scale_grows(tiny_network, make_trainer, make_loaders, tmp_path):
    for dynamic, expected in ((False, 8.0), (True, 16.0)):  # after 100 steps, as in NVIDIA's scripts
        trainer = make_trainer(
            network(tiny_network), tmp_path, epochs=21, lr=1e-4, amp=True, amp_dtype="fp16", training_only=True,
            static_loss_scale=8.0, dynamic_loss_scale=dynamic,
        )  # fmt: skip
        trainer.fit(*make_loaders())
        assert load_checkpoint(tmp_path / CHECKPOINT)["scaler"]["scale"] == expected


def test_an_epoch_of_nothing_but_overflow_stops(tiny_network, make_trainer, make_loaders, tmp_path):
    trainer = make_trainer(network(tiny_network, at=range(99)), tmp_path, amp=True, amp_dtype="fp16")
    with pytest.raises(UserError, match=r"every step of epoch 1 overflowed.*--static-loss-scale"):
        trainer.fit(*make_loaders())


def test_resuming_keeps_this_runs_choice_of_a_growing_scale(tiny_network, make_trainer, make_loaders, tmp_path):
    config = {"amp": True, "amp_dtype": "fp16", "static_loss_scale": 64.0, "training_only": True}
    make_trainer(network(tiny_network), tmp_path, epochs=1, **config).fit(*make_loaders())
    state = load_checkpoint(tmp_path / CHECKPOINT)
    trainer = make_trainer(network(tiny_network), tmp_path, epochs=2, dynamic_loss_scale=True, **config)
    trainer.resume({**state, "scaler": {**state["scaler"], "scale": 16.0}}, CHECKPOINT)
    trainer.fit(*make_loaders())
    resumed = load_checkpoint(tmp_path / CHECKPOINT)["scaler"]
    assert (resumed["scale"], resumed["growth_interval"]) == (16.0, 100)

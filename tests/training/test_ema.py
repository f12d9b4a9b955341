"""The average of the weights against NVIDIA's formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effnet_quant import create_model, quantize
from effnet_quant.quantization.calibration.loop import track_outputs
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.ema import WeightAverage

CHECKPOINT = "checkpoint.pth.tar"


def test_average_follows_the_formula_of_nvidias_scripts():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.6)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        mu = min(0.6, (1 + step) / (10 + step))  # 0.1, 0.18 …, 0.6 from step 13 on
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
                expected[name] = mu * expected[name] + (1 - mu) * tensor.double()
            else:
                tensor.add_(1)
        average.update(model, step)
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert int(average.state_dict()["1.num_batches_tracked"]) == 20


def test_ranges_of_outputs_that_are_measured_later_leave_the_average_in_order():
    """NVIDIA's quantized weights bring none; the first epoch's end measures them, of each model by itself."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.SiLU(), torch.nn.Conv2d(4, 2, 1)
    )
    quantize(model)
    average = WeightAverage(model, 0.5)
    track_outputs(model, [torch.randn(2, 3, 8, 8)])
    with torch.no_grad():
        model[0].weight += 1
    before = average.state_dict()["0.weight"].clone()
    average.update(model, 100)
    torch.testing.assert_close(average.state_dict()["0.weight"], before + 0.5)
    track_outputs(average.model, [torch.randn(2, 3, 8, 8)])
    average.update(model, 101)
    assert all(torch.isfinite(tensor).all() for name, tensor in average.state_dict().items() if name.endswith("_low"))


def test_ranges_that_do_not_change_stay_to_the_bit():
    model = create_model("efficientnet-quant-b0", 3)
    generator = torch.Generator().manual_seed(0)
    ranges = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_amax")}
    for tensor in ranges.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    average = WeightAverage(model, 0.9999)
    for step in range(3):
        average.update(model, step)
    for name, tensor in ranges.items():
        assert torch.equal(average.state_dict()[name], tensor), name


def test_average_is_evaluated_saved_and_resumed(tiny_network, make_trainer, make_loaders, tmp_path, same_weights):
    straight = tiny_network()
    trainer = make_trainer(straight, tmp_path / "straight", save_checkpoints=False, use_ema=0.9)
    trainer.fit(*make_loaders())
    expected = trainer.validate(make_loaders()[1])
    assert expected["val_ema.loss"] != expected["val.loss"]

    make_trainer(tiny_network(), tmp_path, run_epochs=1, use_ema=0.9).fit(*make_loaders())
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert state["state_dict_ema"].keys() == state["state_dict"].keys()
    model = tiny_network(seed=7)
    trainer = make_trainer(model, tmp_path, use_ema=0.9)
    trainer.resume(state, CHECKPOINT)
    trainer.fit(*make_loaders())
    assert same_weights(model, straight)
    metrics = trainer.validate(make_loaders()[1])
    for name in ("val.loss", "val_ema.loss", "val_ema.top1"):
        assert metrics[name] == expected[name]


def test_resuming_a_checkpoint_without_an_average_starts_it_from_the_weights(
    tiny_network, make_trainer, make_loaders, tmp_path
):
    make_trainer(tiny_network(), tmp_path, run_epochs=1).fit(*make_loaders())
    trainer = make_trainer(tiny_network(seed=7), tmp_path, use_ema=0.9)
    trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)
    metrics = trainer.validate(make_loaders()[1])
    assert metrics["val_ema.loss"] == metrics["val.loss"]


@pytest.mark.parametrize("optimizer_batch_size", [-1, 8])
def test_average_is_updated_once_a_step_of_the_optimizer(
    tiny_network, make_trainer, make_loaders, tmp_path, monkeypatch, optimizer_batch_size
):
    steps = []
    monkeypatch.setattr(WeightAverage, "update", lambda self, model, step: steps.append(step))
    trainer = make_trainer(tiny_network(), tmp_path, use_ema=0.9, epochs=1, optimizer_batch_size=optimizer_batch_size)
    trainer.fit(*make_loaders())
    assert steps == list(range(5 if optimizer_batch_size < 0 else 3))

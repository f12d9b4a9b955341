"""Which parameters decay, and steps against the update rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet_quant import create_model
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.optimizers import build_optimizer

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "training.json").read_text())


def decay_by_name(model, config):
    of_parameter = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups
        for parameter in group["params"]
    }
    return {name: of_parameter[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_batch_norm_does_not_decay(optimizer):
    decay = decay_by_name(create_model("efficientnet-b0", 10), TrainConfig(optimizer=optimizer, weight_decay=0.03))
    of_norm = {value for name, value in decay.items() if ".bn." in name}
    of_others = {value for name, value in decay.items() if ".bn." not in name}
    assert len(decay) == 213  # of EfficientNet-B0: 49 BatchNorms, 81 weights, 33 biases, each once
    assert (of_norm, of_others) == ({0.0}, {0.03})


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_batch_norm_decays_if_asked_for(tiny_network, optimizer):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.03, bn_weight_decay=True)
    assert set(decay_by_name(tiny_network(), config).values()) == {0.03}


def two_steps(model, config, gradients):
    """The convolution's weight after two steps with the same gradient for each of its entries."""
    optimizer = build_optimizer(model, config)
    weight = model[0].weight
    with torch.no_grad():
        weight.fill_(1.0)
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return weight.flatten()[0].item()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_step(tiny_network, nesterov):
    config = TrainConfig(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    weight, velocity = 1.0, None
    for gradient in (0.5, -0.2):
        full = gradient + 0.01 * weight
        velocity = full if velocity is None else 0.9 * velocity + full
        weight -= 0.1 * (full + 0.9 * velocity if nesterov else velocity)
    assert two_steps(tiny_network(), config, (0.5, -0.2)) == pytest.approx(weight, rel=1e-6)


def test_rmsprop_step(tiny_network):
    config = TrainConfig(
        optimizer="rmsprop", lr=0.1, momentum=0.8, weight_decay=0.0, rmsprop_alpha=0.7, rmsprop_eps=1e-2
    )
    weight, square, buffer = 1.0, 0.0, 0.0
    for gradient in (0.5, -0.2):
        square = 0.7 * square + 0.3 * gradient**2
        buffer = 0.8 * buffer + gradient / (square**0.5 + 1e-2)
        weight -= 0.1 * buffer
    assert two_steps(tiny_network(), config, (0.5, -0.2)) == pytest.approx(weight, rel=1e-6)


def test_frozen_parameters_are_left_out(tiny_network):
    model = tiny_network()
    model[0].weight.requires_grad_(False)
    held = [id(p) for group in build_optimizer(model, TrainConfig()).param_groups for p in group["params"]]
    assert id(model[0].weight) not in held
    assert len(held) == 4


@pytest.mark.parametrize("recorded", REFERENCE["optimizers"])
def test_five_steps_of_recorded_optimizers(recorded):
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(3)).double()
    conv, norm = model[0].weight, model[1].weight
    with torch.no_grad():
        conv.copy_(torch.tensor(REFERENCE["start"]["conv"], dtype=torch.float64).reshape(conv.shape))
        norm.copy_(torch.tensor(REFERENCE["start"]["bn"], dtype=torch.float64))
    optimizer = build_optimizer(model, TrainConfig(**recorded["config"]))
    for of_conv, of_norm in REFERENCE["gradients"]:
        conv.grad = torch.tensor(of_conv, dtype=torch.float64).reshape(conv.shape)
        norm.grad = torch.tensor(of_norm, dtype=torch.float64)
        optimizer.step()
    assert conv.flatten().tolist() == pytest.approx(recorded["conv"], rel=1e-12)
    assert norm.tolist() == pytest.approx(recorded["bn"], rel=1e-12)

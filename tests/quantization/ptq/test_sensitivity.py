"""What a layer costs when it alone is quantized, against a run of the whole network."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.quantization.ptq.sensitivity import sensitivity
from effnet_quant.quantization.ptq.step import StepContext
from effnet_quant.quantization.quantizer import TensorQuantizer


class Small(nn.Module):
    """A stem, a residual block with a gate, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(self.depthwise(x))
        y = y * torch.sigmoid(self.expand(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.classifier((x + self.project(y)).mean((2, 3)))


LAYERS = ["stem.0", "depthwise", "squeeze", "expand", "project.0", "classifier"]


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 10, 10, generator=generator) for size in (20, 20, 7)]


@pytest.fixture
def network(batches):
    torch.manual_seed(0)
    return calibrate(quantize(Small().eval(), "w4a8"), batches)


def alone(network, layer):
    """A copy in which only this layer's own quantizers are on."""
    twin = copy.deepcopy(network)
    # the output quantizers that placement gave this network, by the layer before them
    outputs = {"stem.0": "stem.0_output", "expand": "expand_output", "project.0": "project.0_output"}
    kept = {f"{layer}._input_quantizer", f"{layer}._weight_quantizer", outputs.get(layer)}
    for name, module in twin.named_modules():
        if isinstance(module, TensorQuantizer) and module.role != "gate":
            module.enabled = name in kept
    return twin


@torch.no_grad()
def logits(network, batches):
    return torch.cat([network(batch) for batch in batches]).double().numpy()


def test_the_table_is_that_of_whole_networks(network, batches):
    places = [name for name, module in network.named_modules() if isinstance(module, TensorQuantizer)]
    assert {name for name in places if name.endswith("_output")} == {
        "stem.0_output", "expand_output", "project.0_output"
    }  # fmt: skip
    targets = [torch.arange(len(batch)) % 5 for batch in batches]
    table = sensitivity(network, batches, targets)
    truth = logits(alone(network, "none"), batches)
    labels = torch.cat(targets).numpy()
    right = 100 * np.mean(truth.argmax(1) == labels)
    assert [row.layer for row in table.rows] == LAYERS
    assert table.float_score == pytest.approx(right)
    for row in table.rows:
        found = logits(alone(network, row.layer), batches)
        assert row.sqnr == pytest.approx(10 * np.log10(np.sum(truth**2) / np.sum((found - truth) ** 2)), abs=0.05)
        assert row.agreement == pytest.approx(100 * np.mean(found.argmax(1) == truth.argmax(1)))
        assert row.loss == pytest.approx(right - 100 * np.mean(found.argmax(1) == labels), abs=1e-9)
    assert {row.operation for row in table.rows} == {"stem", "depthwise", "conv", "linear"}


def test_the_table_costs_less_than_two_evaluations_a_layer(network, batches):
    calls = []
    for layer in LAYERS:
        network.get_submodule(layer).register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
    seen = []
    table = sensitivity(network, batches, context=StepContext(progress=lambda *step: seen.append(step)))
    evaluation = len(LAYERS) * sum(map(len, batches))  # examples that pass a layer in one evaluation
    assert sum(calls) < 2 * len(LAYERS) * evaluation
    assert table.evaluations / len(LAYERS) < 1
    assert seen[-1] == ("sensitivity", len(LAYERS), len(LAYERS))


def test_the_network_is_left_as_it_was(network, batches):
    before, state = logits(network, batches), copy.deepcopy(network.state_dict())
    sensitivity(network, batches)
    assert np.array_equal(logits(network, batches), before)
    after = network.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_table_as_text_and_json(network, batches):
    table = sensitivity(network, batches)
    lines = str(table).splitlines()
    worst = min(table.rows, key=lambda row: row.sqnr)
    assert lines[1].split()[0] == worst.layer
    assert "same class" in lines[-1]
    assert "evaluations of the network a layer" in lines[-1]
    stored = json.loads(json.dumps(table.to_json()))
    assert [row["layer"] for row in stored["rows"]] == LAYERS
    assert stored["float_score"] is None


def test_what_the_spec_leaves_in_float_has_no_row(batches):
    torch.manual_seed(0)
    model = quantize(Small().eval(), {"overrides": {"classifier": "float", "stem": "float"}})
    assert [row.layer for row in sensitivity(calibrate(model, batches), batches).rows] == LAYERS[1:-1]


def test_mistakes_are_said_in_a_sentence(network, batches):
    with pytest.raises(UserError, match="has no ranges; calibrate the model first"):
        sensitivity(quantize(Small().eval()), batches)
    with pytest.raises(UserError, match="2 targets for 47 examples"):
        sensitivity(network, batches, [torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(UserError, match="batch 0 of the calibration images has NaN"):
        sensitivity(network, [torch.full((2, 3, 10, 10), torch.nan)])
    with pytest.raises(UserError, match="leaves every layer in float"):
        sensitivity(quantize(Small().eval(), {"overrides": dict.fromkeys(LAYERS, "float")}), batches)

"""The bits of each layer, by a target and by budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.quantization.ptq.assignment_search import Budget
from effnet_quant.quantization.ptq.layer_costs import layer_costs
from effnet_quant.quantization.ptq.mixed_precision import CANDIDATES, mixed_precision
from effnet_quant.quantization.spec import FLOAT, resolve_spec


class Plain(nn.Module):
    """Four layers and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.classifier((x + self.pointwise(torch.relu(self.depthwise(x)))).mean((2, 3)))


WEIGHTS = {"stem": 3 * 8 * 9, "depthwise": 8 * 9, "pointwise": 64, "classifier": 80}
MULTIPLY_ADDS = {name: count * (1 if name == "classifier" else 64) for name, count in WEIGHTS.items()}
BITS = {"w4a8": (4, 8), "w8a8": (8, 8), "w8a16": (8, 16), FLOAT: (32, 32)}


def weight_bytes(assignment):
    return sum(WEIGHTS[layer] * BITS[name][0] / 8 for layer, name in assignment.items())


def bit_operations(assignment):
    return sum(MULTIPLY_ADDS[layer] * BITS[name][0] * BITS[name][1] for layer, name in assignment.items())


IMAGES = torch.randn(4, 50, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def network():
    """Its predictions hang on little: every class is as likely as the others."""
    torch.manual_seed(0)
    model = Plain().eval()
    model.classifier.bias -= model(IMAGES.flatten(0, 1)).mean(0)
    return model


@pytest.fixture
def batches():
    return list(IMAGES)


@torch.no_grad()
def agreement(spec, batches):
    """Of a network built from the spec by itself, and its SQNR."""
    truth = torch.cat([network()(batch) for batch in batches]).double().numpy()
    model = network() if spec is None else calibrate(quantize(network(), spec), batches)
    found = torch.cat([model(batch) for batch in batches]).double().numpy()
    noise = 10 * np.log10(np.sum(truth**2) / np.sum((found - truth) ** 2))
    return 100 * np.mean(found.argmax(1) == truth.argmax(1)), noise


def test_costs_of_layers(batches):
    found = layer_costs(quantize(network()), batches[0])
    assert {name: cost.weights for name, cost in found.items()} == WEIGHTS
    assert {name: cost.multiply_adds for name, cost in found.items()} == MULTIPLY_ADDS


@pytest.mark.parametrize("cost", ["weight-bytes", "bit-operations"])
def test_a_budget_is_kept_and_used(batches, cost):
    count = weight_bytes if cost == "weight-bytes" else bit_operations
    limit = 0.7 * count(dict.fromkeys(WEIGHTS, "w8a8"))
    chosen = mixed_precision(network(), batches, budget=Budget(cost, 0.7, share=True))
    assert list(chosen.assignment) == list(WEIGHTS)
    assert count(chosen.assignment) <= limit
    assert chosen.costs[cost]["chosen"] == pytest.approx(count(chosen.assignment))
    assert chosen.found.cost == pytest.approx(count(chosen.assignment))
    # there is no room to lift a layer from 4 to 8 bits
    for layer, name in chosen.assignment.items():
        if name == "w4a8":
            assert count({**chosen.assignment, layer: "w8a8"}) > limit
    # the spec alone gives the network that was measured
    agreed, sqnr = agreement(chosen.spec, batches)
    assert chosen.found.loss == pytest.approx(100 - agreed)
    assert chosen.found.sqnr == pytest.approx(sqnr, abs=0.05)
    assert chosen.found.sqnr > agreement("w4a8", batches)[1]
    if cost == "weight-bytes":
        assert "w8a16" not in chosen.assignment.values()  # the same bytes as w8a8


def test_a_target_is_met_with_no_layer_to_spare(batches):
    drop = 20.0
    chosen = mixed_precision(network(), batches, target_drop=drop, candidates=("w4a8", "w8a8"))
    assert chosen.reached
    assert 100 - agreement(chosen.spec, batches)[0] <= drop
    assert 100 - agreement("w4a8", batches)[0] > drop  # else there was nothing to do
    for layer, name in chosen.assignment.items():
        if name == "w8a8":
            lower = [(other, own) for other, own in {**chosen.assignment, layer: "w4a8"}.items() if own != "w8a8"]
            assert 100 - agreement(resolve_spec("w8a8").with_overrides(lower), batches)[0] > drop


def test_the_loss_is_the_tasks_where_targets_are_known(batches):
    with torch.no_grad():
        labels = [network()(batch).argmax(1) for batch in batches]
    labels = [torch.where(torch.arange(len(own)) % 2 == 0, own, (own + 1) % 10) for own in labels]  # half are right
    chosen = mixed_precision(network(), batches, labels, budget=Budget("weight-bytes", 1.0, share=True))
    model = calibrate(quantize(network(), chosen.spec), batches)
    with torch.no_grad():
        right = torch.cat([model(batch).argmax(1) for batch in batches]) == torch.cat(labels)
    assert chosen.found.loss == pytest.approx(50 - 100 * right.double().mean().item())
    assert chosen.measure == "top-1, %"


def test_an_unreachable_target_gives_the_best_that_was_measured(batches):
    chosen = mixed_precision(network(), batches, target_drop=0.0, candidates=("w4a8",))
    assert not chosen.reached
    assert chosen.assignment == dict.fromkeys(WEIGHTS, "w4a8")
    assert chosen.found.loss > 0


def test_a_budget_of_latency_is_measured(batches):
    asked = []

    def latency(spec):
        asked.append(spec)
        return 1.0 + sum(own is None for _, own in spec.overrides)  # a float layer costs a millisecond

    chosen = mixed_precision(network(), batches, budget=Budget("latency", 2.0), latency=latency)
    assert list(chosen.assignment.values()).count(FLOAT) == 1
    assert len(asked) <= 5
    with pytest.raises(UserError, match="the cheapest network costs 1"):
        mixed_precision(network(), batches, budget=Budget("latency", 0.5), latency=latency)


def test_a_network_that_was_changed_before_is_taken_as_it_is(batches):
    model = quantize(network())
    with torch.no_grad():
        model.pointwise.weight[0] *= 100
    chosen = mixed_precision(model, batches, budget=Budget("weight-bytes", 0.6, share=True))
    plain = mixed_precision(network(), batches, budget=Budget("weight-bytes", 0.6, share=True))
    assert chosen.sqnr["pointwise"]["w4a8"] != plain.sqnr["pointwise"]["w4a8"]
    assert set(plain.sqnr["pointwise"]) == set(CANDIDATES)
    assert "pointwise" in str(chosen)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("weight-bytes=52.5%", Budget("weight-bytes", 0.525, True)), ("latency=3.2", Budget("latency", 3.2))],
)
def test_budgets_in_words(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize("text", ["latency", "latency=fast", "energy=3", "latency=-1", "latency=nan", ""])
def test_budgets_that_mean_nothing(text):
    with pytest.raises(UserError):
        Budget.parse(text)


def test_mistakes_are_said_in_a_sentence(batches):
    with pytest.raises(UserError, match="one of the two"):
        mixed_precision(network(), batches)
    with pytest.raises(UserError, match="there is no quantization preset 'w5a5'"):
        mixed_precision(network(), batches, target_drop=1, candidates=("w5a5",))
    with pytest.raises(UserError, match="can't be met"):
        mixed_precision(network(), batches, budget=Budget("weight-bytes", 0.1, share=True))

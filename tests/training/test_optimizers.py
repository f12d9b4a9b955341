"""Which parameters decay, and steps against the update rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effnet_quant import UserError, calibrate, create_model, quantize
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.optimizers import build_optimizer, load_optimizer_state

RECORDED = Path(__file__).parents[1] / "reference"
REFERENCE = json.loads((RECORDED / "training.json").read_text())


def decay_by_name(model, config):
    of_parameter = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups
        for parameter in group["params"]
    }
    return {name: of_parameter[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_batch_norm_does_not_decay(optimizer):
    decay = decay_by_name(create_model("efficientnet-b0", 10), TrainConfig(optimizer=optimizer, weight_decay=0.03))
    of_norm = {value for name, value in decay.items() if ".bn." in name}
    of_others = {value for name, value in decay.items() if ".bn." not in name}
    assert len(decay) == 213  # of EfficientNet-B0: 49 BatchNorms, 81 weights, 33 biases, each once
    assert (of_norm, of_others) == ({0.0}, {0.03})


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_batch_norm_decays_if_asked_for(tiny_network, optimizer):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.03, bn_weight_decay=True)
    assert set(decay_by_name(tiny_network(), config).values()) == {0.03}


@pytest.mark.parametrize(
    ("optimizer", "bn_weight_decay", "groups"),
    [("sgd", False, 2), ("sgd", True, 1), ("rmsprop", False, 2), ("rmsprop", True, 2)],
)
def test_parameters_come_in_the_groups_and_the_order_of_nvidias_scripts(optimizer, bn_weight_decay, groups):
    """On which the meaning of the optimizer's state in their checkpoints depends: they go by 'bn' in the name."""
    recorded = json.loads((RECORDED / "efficientnet.json").read_text())["efficientnet-b0"]["state_dict"]
    names = [name for name in recorded if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    norm = [name for name in names if "bn" in name]
    expected = [names] if groups == 1 else [norm, [name for name in names if name not in norm]]
    model = create_model("efficientnet-b0")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    built = build_optimizer(model, TrainConfig(optimizer=optimizer, bn_weight_decay=bn_weight_decay))
    assert [[name_of[id(p)] for p in group["params"]] for group in built.param_groups] == expected


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


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_many_parameters_are_updated_at_a_time(tiny_network, optimizer):
    (kinds,) = {(group["fused"], group["foreach"]) for group in build(tiny_network(), optimizer).param_groups}
    assert kinds == {"sgd": (True, None), "rmsprop": (None, True), "adamw": (True, None)}[optimizer]


def build(model, optimizer):
    built = build_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.1))
    for group in built.param_groups:
        group.setdefault("fused", None)
    return built


def test_ranges_that_are_switched_on_later_get_their_first_gradient_later():
    torch.manual_seed(0)
    model = create_model("cifar-resnet20")
    quantize(model, "w8a8-lsq")
    calibrate(model, [torch.randn(2, 3, 32, 32)], method="max")
    ranges = [parameter for name, parameter in model.named_parameters() if name.endswith("_amax")]
    optimizer = build_optimizer(model, TrainConfig())
    assert len(optimizer.param_groups[2]["params"]) == len(ranges) > 2
    before = [parameter.item() if parameter.numel() == 1 else None for parameter in ranges]
    for switched_on in (1, len(ranges)):
        for parameter in ranges[:switched_on]:
            parameter.grad = torch.full_like(parameter, 0.25)
        optimizer.step()
    scalars = [index for index, value in enumerate(before) if value is not None and index > 0]
    assert scalars
    for index in scalars:
        assert ranges[index].item() == pytest.approx(before[index] - 0.1 * 0.25, rel=1e-5)


def test_a_state_of_another_memory_layout_gives_the_same_step(tiny_network):
    """NVIDIA's checkpoints of NCHW runs are resumed with --memory-format nhwc; a fused kernel would mix the entries up."""
    weights = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = tiny_network().to(memory_format=memory_format)
        optimizer = build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.0))
        state = optimizer.state_dict()
        of_conv = next(
            i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]) if p is model[0].weight
        )
        momentum = torch.arange(216.0).reshape(8, 3, 3, 3)
        state["state"] = {of_conv: {"momentum_buffer": momentum.clone()}}
        for group in state["param_groups"]:
            del group["fused"]  # as older versions of torch write it
        load_optimizer_state(optimizer, torch.amp.GradScaler("cpu", enabled=False), {"optimizer": state}, "nvidia")
        assert optimizer.param_groups[0]["fused"]
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        optimizer.step()
        torch.testing.assert_close(before - model[0].weight, 0.1 * 0.9 * momentum)
        weights[memory_format] = model[0].weight.detach()
    assert torch.equal(*weights.values())


HOSTILE_BUFFERS = {
    "another shape": lambda buffer: buffer.flatten()[:1],
    "a single number": lambda buffer: buffer.sum(),
    "sparse": lambda buffer: buffer.to_sparse(),
    "NaN": lambda buffer: buffer * torch.nan,
    "text": lambda buffer: "x",
    "a list": lambda buffer: [1],
}


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
@pytest.mark.parametrize("kind", HOSTILE_BUFFERS)
def test_a_state_of_another_kind_is_refused(tiny_network, optimizer, kind):
    model = tiny_network()
    own = build_optimizer(model, TrainConfig(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own.step()
    state = own.state_dict()
    state["state"][1]["momentum_buffer"] = HOSTILE_BUFFERS[kind](state["state"][1]["momentum_buffer"])
    fresh = build_optimizer(model, TrainConfig(optimizer=optimizer))
    with pytest.raises(UserError, match=r"the optimizer state in c\.pth\.tar does not fit: momentum_buffer"):
        load_optimizer_state(fresh, torch.amp.GradScaler("cpu", enabled=False), {"optimizer": state}, "c.pth.tar")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", "x"), ("lr", float("nan")), ("momentum", "x"), ("weight_decay", [1]), ("nesterov", "yes"), ("maximize", 3)],
)
def test_a_setting_of_another_kind_is_refused(tiny_network, name, value):
    own = build_optimizer(tiny_network(), TrainConfig())
    state = own.state_dict()
    state["param_groups"][0][name] = value
    with pytest.raises(UserError, match=f"does not fit: {name} is"):
        load_optimizer_state(own, torch.amp.GradScaler("cpu", enabled=False), {"optimizer": state}, "c.pth.tar")


def test_adamw_step(tiny_network):
    config = TrainConfig(optimizer="adamw", lr=0.1, momentum=0.8, weight_decay=0.03)
    weight, mean, square = 1.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -0.2), 1):
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weight -= 0.1 * 0.03 * weight
        weight -= 0.1 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
    assert two_steps(tiny_network(), config, (0.5, -0.2)) == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda group, state: group.update(betas=[0.9, 0.999]), "betas is"),
        (lambda group, state: group.update(betas=(0.9, 1.0)), "betas is"),
        (lambda group, state: state.pop("exp_avg_sq"), "it has no exp_avg_sq of a parameter"),
        (lambda group, state: state.update(exp_avg=state["exp_avg"][:1]), "exp_avg of shape"),
    ],
)
def test_a_state_that_adamw_cannot_use_is_refused(tiny_network, change, says):
    model = tiny_network()
    own = build_optimizer(model, TrainConfig(optimizer="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own.step()
    state = own.state_dict()
    change(state["param_groups"][0], state["state"][1])
    fresh = build_optimizer(model, TrainConfig(optimizer="adamw"))
    with pytest.raises(UserError, match=says):
        load_optimizer_state(fresh, torch.amp.GradScaler("cpu", enabled=False), {"optimizer": state}, "c.pth.tar")


def rates(model, config):
    """The share of the learning rate of each parameter, and the names in the order of the groups."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    return {name_of[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "layers", "examples"),
    [
        # stem, 16 blocks, head convolution, classifier
        (
            "efficientnet-b0",
            19,
            {"stem.bn.weight": 0, "layers.0.block0.depsep.conv.weight": 1, "classifier.fc.bias": 18},
        ),
        # conv1 with bn1, 8 blocks, fc
        ("torchvision:resnet18", 10, {"bn1.bias": 0, "layer2.0.downsample.0.weight": 3, "fc.weight": 9}),
        # the embedding, 12 blocks, the head; as timm counts
        (
            "timm:vit_tiny_patch16_224",
            14,
            {"cls_token": 0, "blocks.11.norm1.bias": 12, "norm.bias": 12, "head.bias": 13},
        ),
    ],
)
def test_each_layer_learns_slower_than_the_next(name, layers, examples):
    found = rates(create_model(name), TrainConfig(optimizer="adamw", layer_decay=0.5))
    assert len(set(found.values())) == layers
    assert {key: found[key] for key in examples} == {key: 0.5 ** (layers - 1 - at) for key, at in examples.items()}


def test_learned_ranges_make_no_layer():
    model = create_model("torchvision:resnet18", 10)
    plain = rates(model, TrainConfig(layer_decay=0.5))
    quantize(model, "w8a8-lsq")
    found = rates(model, TrainConfig(layer_decay=0.5))
    assert {name: found[name] for name in plain} == plain
    assert len(found) > len(plain)

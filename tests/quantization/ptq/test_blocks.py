"""Blocks: run one after the other, they are the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from effnet_quant import UserError, calibrate, create_model, quantize
from effnet_quant.quantization.ptq.activations import ActivationStore, Cut, last_uses
from effnet_quant.quantization.ptq.adaptive_rounding import AdaptiveRounding
from effnet_quant.quantization.ptq.bias_correction import BiasCorrection
from effnet_quant.quantization.ptq.blocks import cut_blocks
from effnet_quant.quantization.ptq.range_refinement import RangeRefinement
from effnet_quant.quantization.ptq.reconstruction import Reconstruction

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def quantized(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    return calibrate(model if "quant" in name else quantize(model), [IMAGES], method="max")


@torch.no_grad()
def run(blocks, images):
    values = {blocks[0].inputs[0]: images}
    for block in blocks:
        values.update(zip(block.outputs, block.module(*(values[name] for name in block.inputs)), strict=True))
    return values[blocks[-1].outputs[0]]


@pytest.mark.parametrize(
    ("name", "blocks", "layers"),
    [
        ("efficientnet-quant-b0", 19, 82),  # stem, 16 blocks, head, classifier
        ("timm:tf_efficientnet_lite0", 19, 50),
        ("timm:resnet18", 10, 21),
        ("torchvision:shufflenet_v2_x0_5", 19, 57),
    ],
)
def test_blocks_are_residual_blocks_and_give_the_networks_own_bits(name, blocks, layers):
    model = quantized(name)
    cut = cut_blocks(model, IMAGES)
    assert len(cut) == blocks
    assert sum(len(block.layers) for block in cut) == layers
    assert torch.equal(run(cut, IMAGES), model(IMAGES))


def test_single_layers_are_blocks_of_one_layer_with_its_activation():
    model = quantized("timm:resnet18")
    cut = cut_blocks(model, IMAGES, single_layers=True)
    assert [len(block.layers) for block in cut] == [1] * 21
    assert torch.equal(run(cut, IMAGES), model(IMAGES))
    conv1 = run(cut[:1], IMAGES)
    assert conv1.min() == 0  # the ReLU and the pooling belong to the convolution before them
    assert conv1.shape == (2, 64, 16, 16)


def test_an_average_belongs_to_the_layer_after_it():
    model = quantized("timm:resnet18")
    cut = cut_blocks(model, IMAGES)
    assert run(cut[:-1], IMAGES).shape == (2, 512, 2, 2)


def test_a_stretch_of_many_layers_is_cut_between_them():
    model = quantized("timm:densenet121")
    cut = cut_blocks(model, IMAGES)
    assert max(len(block.layers) for block in cut) <= 8
    assert torch.equal(run(cut, IMAGES), model(IMAGES))


def test_a_network_without_layers_that_can_be_traced_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match="can't be traced"):
        model = quantize(Branches())
    with pytest.raises(UserError, match=r"Branches can't be traced.* use the recipe 'minmax'"):
        cut_blocks(model, IMAGES)


class WithUnusedArgument(nn.Module):
    """The first block that follows a cut begins with an in-place operation; ``mask`` is never used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, mask, x):
        y = self.pool(self.norm(self.first(x)).sub_(0.1))
        return self.second(y.relu_())


def test_a_model_may_leave_an_argument_unused():
    torch.manual_seed(0)
    model = quantize(WithUnusedArgument().eval())
    batches = [(torch.ones(4, 1), torch.randn(4, 3, 16, 16)), (torch.ones(4, 1), torch.randn(4, 3, 16, 16))]
    calibrate(model, batches, method="max")
    for step in (RangeRefinement(), BiasCorrection(), AdaptiveRounding(2), Reconstruction(2)):
        step(model, batches)
    assert model(*batches[0]).isfinite().all()


def test_a_block_that_works_in_place_leaves_its_inputs_alone():
    torch.manual_seed(0)
    model = calibrate(quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))), [IMAGES], method="max")
    (first, *_) = cut_blocks(model, IMAGES, single_layers=True)
    graph = fx.Graph()
    (name,) = first.inputs
    graph.output((graph.call_method("mul_", (graph.placeholder(name), 2.0)),))
    doubles = replace(first, module=fx.GraphModule(nn.Module(), graph))
    cut = Cut(ActivationStore(2**20, None), 2, last_uses([doubles]))
    cut.values = {name: IMAGES.clone()}
    for _ in range(2):
        (twice,) = cut.run(doubles, torch.device("cpu")).values()
        assert torch.equal(twice, 2 * IMAGES)


@pytest.mark.parametrize("step", [RangeRefinement(), Reconstruction(20)], ids=["refinement", "reconstruction"])
def test_readers_of_one_value_keep_one_range(step):
    """Else an engine rounds the value twice, and its runtime fuses less."""
    torch.manual_seed(0)
    blocks = [TwoReaders(8), TwoReaders(8)]
    model = calibrate(quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks)), [IMAGES[..., :16, :16]])
    before = model[2].first._input_quantizer.range
    step(model, [IMAGES[..., :16, :16]])
    for block in (model[2], model[3]):
        assert block.first._input_quantizer.range == block.second._input_quantizer.range
    assert model[2].first._input_quantizer.range != before


class TwoReaders(nn.Module):
    """Two convolutions of one value, in blocks of their own where every layer has one."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return (self.first(x).relu() + self.second(x)).relu()

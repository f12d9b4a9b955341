"""Claim: a few epochs of quantization-aware training bring a 4-bit ResNet-20 within 2 points of its float accuracy.

Weights and activations have 4 bits and learned ranges (LSQ); the first convolution and the classifier have 8 bits. The float
network is the teacher. It starts from published weights, trains on CIFAR-10's training images with flips and shifts, and is
measured on all 10,000 test images.

    python benchmarks/cifar_qat.py ../shared/data --epochs 3
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from cifar_calibration import ARCHIVE, MODEL, WEIGHTS, logits_of, read_images
from torch import Tensor
from torch.nn import functional as F

from effnet_quant import calibrate, create_model, quantize
from effnet_quant.data.transforms import normalize
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.qat import Distillation, float_teacher, reestimate_batch_norm
from effnet_quant.quantization.spec import resolve_spec
from effnet_quant.training.optimizers import learned_ranges


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image or not, at random, and shift the whole batch by up to 4 pixels."""
    flips = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    x, y = torch.randint(0, 9, (2,), generator=generator).tolist()
    return F.pad(images, (4, 4, 4, 4))[:, :, y : y + 32, x : x + 32]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description="QAT of a ResNet-20 on CIFAR-10 in 4 bits.")
    parser.add_argument("data", type=Path, help=f"folder with {ARCHIVE} and {WEIGHTS}")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="training images an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    preprocessing = get_entry(MODEL).input
    train, train_labels = read_images(arguments.data / ARCHIVE, "train")
    test, labels = read_images(arguments.data / ARCHIVE, "test")
    train, test = normalize(train, preprocessing), normalize(test, preprocessing)

    spec = resolve_spec("w4a4-lsq").with_overrides({"conv1": "w8a8-lsq", "linear": "w8a8-lsq"})
    model = create_model(MODEL, weights=arguments.data / WEIGHTS)

    def top1() -> float:
        return float(100 * (logits_of(model, test).argmax(1) == labels).double().mean())

    print(f"float: top-1 {top1():.2f} %", flush=True)
    quantize(model, spec, target="tensorrt")
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:512]
    calibrate(model, train[chosen].split(64), "mse")
    print(f"calibrated: top-1 {top1():.2f} %", flush=True)
    distillation = Distillation(float_teacher(model), temperature=2.0, weight=0.5)
    ranges = learned_ranges(model)
    others = [parameter for parameter in model.parameters() if not any(parameter is entry for entry in ranges)]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": ranges, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=arguments.lr, momentum=0.9, nesterov=True)
    steps = arguments.images // arguments.batch_size
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        order = torch.randperm(len(train), generator=generator)
        for step in range(steps):
            progress = (epoch * steps + step) / (arguments.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * (1 + math.cos(math.pi * progress)) / 2
            batch = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
            images = augmented(train[batch], generator)
            logits = model(images)
            loss = distillation.loss(F.cross_entropy(logits, train_labels[batch]), logits, images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        minutes = (time.perf_counter() - start) / 60
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top-1 {top1():.2f} %, {minutes:.1f} min", flush=True)
    reestimate_batch_norm(model, train[chosen].split(64))
    print(f"BatchNorm re-estimated: top-1 {top1():.2f} %", flush=True)


if __name__ == "__main__":
    main()

"""Claim: with integers alone, a network keeps its accuracy, and its answers are the same bits everywhere.

Prints the rows of the MRT zoo for our networks, as markdown: top-1 of the float network, of the quantized simulation, of
ONNX Runtime's INT8 engine (QDQ) and of the integer engine. Then the agreement of the integer engine with the simulation for
ONNX Runtime (QDQ), and with the float network. On the first 64 images ONNX Runtime runs the integer file too, and must give
the same bits.

    python benchmarks/integer.py ../shared/data                                      the CIFAR-10 ResNet-20, LeNet on digits
    python benchmarks/integer.py ../shared/data --networks timm:tf_efficientnet_lite0 --lite0 FOLDER
    python benchmarks/integer.py ../shared/data --networks cifar-resnet56 --weights cifar-resnet56.safetensors
    python benchmarks/integer.py ../shared/data --milliseconds                       on a quiet machine

``--milliseconds`` adds the median time of a batch of one: of the FP32 network in eager PyTorch and of the integer engine,
timed in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from calibration_default import LITE0, Experiment, digits, experiment
from cifar_calibration import ARCHIVE, MODEL, WEIGHTS, logits_of
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import ModelCard, calibrate, create_model, export_integer, export_onnx, load_engine, quantize
from effnet_quant.card import InputSpec
from effnet_quant.checks.latency import median_seconds
from effnet_quant.data.transforms import normalize
from effnet_quant.engines.engine import Engine

LENET = "lenet"
DIGITS = InputSpec(8, 8, mean=(0.3,) * 3, std=(0.35,) * 3)
BATCH, CHECKED, RUNS = 50, 64, 20


def lenet() -> nn.Sequential:
    """LeNet for 8x8 images, with ReLU and average pooling."""
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    last = [nn.Flatten(), nn.Linear(256, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*first, *last)


def lenet_on_digits() -> Experiment:
    """LeNet, trained for some seconds on scikit-learn's digits (seed 0)."""
    torch.manual_seed(0)
    (pixels, labels), (images, answers) = digits("train"), digits("val")
    x, model = normalize(pixels, DIGITS), lenet().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    state = model.state_dict()

    def build() -> nn.Module:
        twin = lenet()
        twin.load_state_dict(state)
        return twin

    return Experiment("ReLU", build, x[:512], normalize(images, DIGITS), answers)


def images_of(name: str, arguments: argparse.Namespace) -> tuple[Experiment, InputSpec]:
    """A network with its images, and how they are normalised."""
    if name == LENET:
        return lenet_on_digits(), DIGITS
    if name == LITE0:
        return experiment(name, arguments), InputSpec(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
    of, spec = experiment(MODEL, arguments), InputSpec(32, 32)
    if name != MODEL:
        of = Experiment(
            "ReLU", lambda: create_model(name, weights=arguments.weights), of.calibration, of.images, of.labels
        )
    return of, spec


def pixels_of(images: Tensor, spec: InputSpec) -> Tensor:
    """The uint8 pixels of normalised images."""
    mean, std = (torch.tensor(numbers).reshape(-1, 1, 1) for numbers in (spec.mean, spec.std))
    return torch.round((images * std + mean) * 255).to(torch.uint8)


def run(engine: Engine, inputs: Tensor) -> Tensor:
    """The engine's outputs for all inputs."""
    return torch.from_numpy(np.concatenate([engine(part.numpy()) for part in inputs.split(BATCH)]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Accuracy of integer-only inference.")
    parser.add_argument("data", type=Path, help=f"folder with {ARCHIVE}, {WEIGHTS} and ImageNet's samples")
    parser.add_argument("--networks", nargs="+", default=[MODEL, LENET])
    parser.add_argument("--images", type=int, default=10_000, help="test images of CIFAR-10")
    parser.add_argument(
        "--lite0", type=Path, metavar="FOLDER", help="where the package with Lite0's weights is installed"
    )
    parser.add_argument("--weights", type=Path, help="of another CIFAR ResNet")
    parser.add_argument("--milliseconds", action="store_true", help="time the engines too")
    arguments = parser.parse_args()
    titles = "images | float % | simulation % | ONNX Runtime INT8 % | integer % | with QDQ simulation % | with float %"
    titles += " | float ms | integer ms" if arguments.milliseconds else ""
    print(f"| network | {titles} |\n| --- |{' --- |' * (titles.count('|') + 1)}", flush=True)
    for name in arguments.networks:
        print(f"| {name} | {' | '.join(row(name, arguments))} |", flush=True)


def row(name: str, arguments: argparse.Namespace) -> list[str]:
    """One network's figures."""
    of, spec = images_of(name, arguments)
    size, labels = of.images.shape[-1], of.labels
    truth = logits_of(of.build(), of.images)
    model = calibrate(quantize(of.build().eval(), target="onnxruntime"), of.calibration.split(BATCH))
    simulation = logits_of(model, of.images)
    with tempfile.TemporaryDirectory() as folder:
        qdq, path = Path(folder, "qdq.onnx"), Path(folder, "integer.onnx")
        export_onnx(model, qdq, size)
        export_integer(model, path, size, card=ModelCard(input=spec))
        int8 = run(load_engine(qdq), of.images)
        pixels, engine = pixels_of(of.images, spec), load_engine(path, "integer")
        integer = run(engine, pixels)
        again = load_engine(path, "onnxruntime")(pixels[:CHECKED].numpy())
        if not np.array_equal(integer[:CHECKED].numpy(), again):
            raise SystemExit(f"{name}: ONNX Runtime computes other integers than the fast executor")
        figures = [f"{100 * float((logits.argmax(1) == labels).double().mean()):.2f}" for logits in (truth, simulation)]
        figures += [f"{100 * float((logits.argmax(1) == labels).double().mean()):.2f}" for logits in (int8, integer)]
        figures += [
            f"{100 * float((integer.argmax(1) == logits.argmax(1)).double().mean()):.2f}"
            for logits in (simulation, truth)
        ]
        if arguments.milliseconds:
            float_model, one, first = of.build().eval(), of.images[:1], pixels[:1].numpy()

            def in_float() -> Tensor:
                with torch.inference_mode():
                    return float_model(one)

            seconds = median_seconds([in_float, lambda: engine(first)], RUNS)
            figures += [f"{1000 * each:.2f}" for each in seconds]
    return [f"{len(labels)}", *figures]


if __name__ == "__main__":
    main()

"""Claim: mixed precision within 105 % of w4's weight bytes saves EfficientNet-Lite0 before any rounding is learned.

Chooses 4 or 8 bits for the weights of each layer by ``mixed_precision``, from calibration images alone, and measures the
simulation for ONNX Runtime on the test images. Beside it stand all layers in w4a8, and w4a8 with 8 bits in the depthwise
layers and the stem, which hold few weights. The tables of docs/quantization.md come from it.

    python benchmarks/mixed_precision.py ../shared/data
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from calibration_default import LITE0, NETWORKS, experiment
from cifar_calibration import MODEL, decibels, logits_of

from effnet_quant import calibrate, quantize
from effnet_quant.quantization.ptq.assignment_search import Budget
from effnet_quant.quantization.ptq.mixed_precision import mixed_precision
from effnet_quant.quantization.spec import resolve_spec


def main() -> None:
    """Search, measure and print."""
    parser = argparse.ArgumentParser(description="Mixed precision within 105 % of w4's bytes.")
    parser.add_argument("data", type=Path, help="folder with the data of benchmarks/calibration_default.py")
    parser.add_argument("--network", default=LITE0, choices=[name for name in NETWORKS if name in (LITE0, MODEL)])
    parser.add_argument("--search-images", type=int, default=32, help="calibration images of the search")
    parser.add_argument("--images", type=int, default=2000, help="test images of CIFAR-10")
    parser.add_argument(
        "--lite0", type=Path, metavar="FOLDER", help="where the package with Lite0's weights is installed"
    )
    arguments = parser.parse_args()
    of = experiment(arguments.network, arguments)
    truth = logits_of(of.build(), of.images)
    start = time.monotonic()
    batches = list(of.calibration[: arguments.search_images].split(8))
    budget = Budget("weight-bytes", 0.525, share=True)
    found = mixed_precision(of.build().eval(), batches, budget=budget, candidates=("w4a8", "w8a8"))
    seconds = time.monotonic() - start
    print(found)
    print(f"searched {seconds:.0f} s with {arguments.search_images} images\n")
    small = [layer for layer in found.assignment if "conv_dw" in layer or layer == next(iter(found.assignment))]
    others = [(layer, "w4a8") for layer in found.assignment if layer not in small]
    rows = {
        "w4a8": resolve_spec("w4a8"),
        "w4a8, depthwise and stem w8a8": resolve_spec("w8a8").with_overrides(others),
        "mixed precision, 105 % of w4's bytes": found.spec,
        "w8a8": resolve_spec("w8a8"),
    }
    print("| bits | top-1 % | agreement % | dB |\n| --- | --- | --- | --- |")
    for name, spec in rows.items():
        model = calibrate(quantize(of.build().eval(), spec), of.calibration.split(20))
        logits = torch.cat([logits_of(model, images) for images in of.images.split(50)])
        top1 = 100 * (logits.argmax(1) == of.labels).double().mean().item()
        agreement = 100 * (logits.argmax(1) == truth.argmax(1)).double().mean().item()
        print(f"| {name} | {top1:.2f} | {agreement:.2f} | {decibels(truth, logits):.1f} |", flush=True)


if __name__ == "__main__":
    main()

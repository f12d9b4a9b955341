"""Claim: INT4 halves the file of a w4a8 network and costs no time; 16-bit activations run as simulated, slower than float.

A network with random weights (seed 0) is calibrated on noise and exported for ONNX Runtime and OpenVINO: in float, w8a8,
w4a8 with weights as INT4 and as int8, and w8a16. The table has the size of each file, the time of one batch over that of
w8a8 (medians in turns in one run, one thread), and the distance of the logits from the simulation's.

    python benchmarks/storage.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from random_weights import wake, with_statistics

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize, simulate_target
from effnet_quant.checks.latency import median_seconds
from effnet_quant.export.options import ExportOptions

FORMS = {
    "w8a8": ("w8a8", ExportOptions()),
    "w4a8, INT4": ("w4a8", ExportOptions()),
    "w4a8, int8": ("w4a8", ExportOptions(int4_weights=False)),
    "w8a16": ("w8a16", ExportOptions()),
    "float": (None, ExportOptions()),
}
RUNTIMES = ("onnxruntime", "openvino")


@torch.no_grad()
def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parsed = parser.parse_args()
    torch.manual_seed(0)
    network = wake(with_statistics(create_model(parsed.network))).eval()
    images = torch.randn(parsed.batch_size, 3, parsed.image_size, parsed.image_size)
    models = {None: network}
    for spec in ("w8a8", "w4a8", "w8a16"):
        models[spec] = calibrate(quantize(copy.deepcopy(network), spec), [images], method="max")
    for runtime in RUNTIMES:
        sizes, engines, errors = {}, {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for name, (spec, options) in FORMS.items():
                path = Path(folder, "model.onnx")
                export_onnx(models[spec], path, parsed.image_size, target=runtime, options=options)
                sizes[name] = path.stat().st_size
                engines[name] = load_engine(path, runtime, threads=1)
                expected = simulate_target(models[spec], runtime)(images) if spec else network(images)
                got = torch.from_numpy(engines[name](images.numpy()))
                errors[name] = ((got - expected).norm() / expected.norm()).item()
        runs = [partial(engine, images.numpy()) for engine in engines.values()]
        seconds = dict(zip(engines, median_seconds(runs, parsed.rounds), strict=True))
        print(f"| {runtime} | bytes | time / w8a8 | distance from the simulation |")
        print("| --- | --- | --- | --- |")
        for name in FORMS:
            print(f"| {name} | {sizes[name]:,} | {seconds[name] / seconds['w8a8']:.2f} | {errors[name]:.1e} |")
        print(flush=True)


if __name__ == "__main__":
    main()

"""Claim: quantization-aware training costs little more than float training.

Times a training step (forward, loss, backward, SGD) and an inference step of efficientnet-b0, float against fake-quantized,
eager and compiled, all in one interleaved run, and prints medians and ratios. Where nvidia-modelopt is installed, it
quantizes the same network for comparison.

    python benchmarks/qat_overhead.py --batch-size 32 --image-size 128
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from steps import Step, inference_step, random_batch, training_step
from torch import nn

from effnet_quant import calibrate, create_model
from effnet_quant.checks.latency import median_seconds
from effnet_quant.memory import keep_freed_memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="QAT against float: seconds a step, eager and compiled.")
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of five steps each")
    parser.add_argument("--eager-only", action="store_true", help="skip compilation, which takes minutes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    keep_freed_memory()  # as the trainer does
    images, labels = random_batch(arguments.batch_size, arguments.image_size, device)

    models = {"float": create_model("efficientnet-b0"), "quantized": create_model("efficientnet-quant-b0")}
    calibrate(models["quantized"], [images.cpu()], method="max")
    peer = _modelopt(images.cpu())
    if peer is not None:
        models["modelopt"] = peer
    models = {name: model.to(device, memory_format=torch.channels_last) for name, model in models.items()}
    steps: dict[tuple[str, str, str], Step] = {}
    for name, model in models.items():
        for mode in ("eager",) if arguments.eager_only else ("eager", "compiled"):
            trained, evaluated = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
            if mode == "compiled":
                fullgraph = name != "modelopt"  # its data-dependent branches break the graph
                trained = torch.compile(trained, fullgraph=fullgraph)
                evaluated = torch.compile(evaluated, fullgraph=fullgraph)
            steps[name, mode, "training"] = training_step(trained, images, labels)
            steps[name, mode, "inference"] = inference_step(evaluated, images)
    for key, step in steps.items():
        start = time.perf_counter()
        for _ in range(3):  # compilation, and the choice of convolution algorithms
            step()
        print(f"warm-up {' '.join(key)}: {time.perf_counter() - start:.1f} s", flush=True)
    seconds = dict(zip(steps, median_seconds(list(steps.values()), arguments.rounds), strict=True))

    print(
        f"efficientnet-b0, batch {arguments.batch_size}, {arguments.image_size} px, {device}, torch {torch.__version__}"
    )
    print(f"{'':10}  {'':9}  {'float s':>8}  " + "  ".join(f"{name:>16}" for name in models if name != "float"))
    for mode in ("eager",) if arguments.eager_only else ("eager", "compiled"):
        for phase in ("training", "inference"):
            base = seconds["float", mode, phase]
            cells = [
                f"{seconds[name, mode, phase]:8.4f} ({seconds[name, mode, phase] / base:4.2f}x)"
                for name in models
                if name != "float"
            ]
            print(f"{mode:10}  {phase:9}  {base:8.4f}  " + "  ".join(f"{cell:>16}" for cell in cells))


def _modelopt(images: torch.Tensor) -> nn.Module | None:
    """The same float network quantized by nvidia-modelopt (INT8, max calibration), or None if it is not installed."""
    try:
        import modelopt.torch.quantization as mtq
    except ImportError:
        print("nvidia-modelopt is not installed, so it is left out: pip install nvidia-modelopt requests", flush=True)
        return None
    return mtq.quantize(create_model("efficientnet-b0"), mtq.INT8_DEFAULT_CFG, lambda model: model(images))


if __name__ == "__main__":
    main()

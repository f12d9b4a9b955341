"""Claim: efficientnet-b0 in float32 is no slower than timm's efficientnet_b0.

Times an inference step and a training step (forward, loss, backward, SGD) of both networks, in channels_last, eager and
with --compile, in turns in one run, and prints medians and ratios (ours / timm's; below 1 is faster).

    python benchmarks/model_step.py --batch-size 32 --image-size 128 --compile
"""

from __future__ import annotations

import argparse
import copy

import torch
from steps import inference_step, random_batch, training_step

from effnet_quant import create_model
from effnet_quant.checks.latency import median_seconds

NAMES = ("efficientnet-b0", "timm:efficientnet_b0")
ROUNDS = 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="efficientnet-b0 against timm's: seconds a step.")
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="measure the compiled networks too; takes minutes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images, labels = random_batch(arguments.batch_size, arguments.image_size, device)
    print(
        f"batch {arguments.batch_size}, {arguments.image_size} px, {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'mode':8}  {'step':9}  {NAMES[0] + ' s':>18}  {NAMES[1] + ' s':>22}  {'ratio':>6}", flush=True)
    for mode in ("eager", "compiled") if arguments.compile else ("eager",):
        models = [create_model(name).to(device, memory_format=torch.channels_last) for name in NAMES]
        evaluated = [copy.deepcopy(model).eval() for model in models]
        if mode == "compiled":
            models = [torch.compile(model, fullgraph=True) for model in models]
            evaluated = [torch.compile(model, fullgraph=True) for model in evaluated]
        steps = {
            "inference": [inference_step(model, images) for model in evaluated],
            "training": [training_step(model, images, labels) for model in models],
        }
        for name, pair in steps.items():
            for step in pair * 3:  # compilation, and the choice of convolution algorithms
                step()
            ours, timms = median_seconds(pair, ROUNDS)
            print(f"{mode:8}  {name:9}  {ours:18.4f}  {timms:22.4f}  {ours / timms:6.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Claim: calibration costs little more than inference, in time and in memory.

Calibrates efficientnet-b0 with one calibrator of each kind and runs the float network on the same batches, eager, in turns.
Prints images a second, the ratio to inference, and the peak of memory beyond the model and the images.

    python benchmarks/calibration.py --batch-size 32 --image-size 224
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from effnet_quant import create_model
from effnet_quant.quantization.calibration import collect, set_ranges

METHODS = ("max", "moving-average", "percentile")  # one of each kind: all histogram methods collect the same
CHOOSING = ("percentile", "entropy", "mse")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Calibration against float inference: images a second, peak memory.")
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", type=int, default=4, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--memory-of", choices=("inference", *METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    batches = [images] * arguments.batches
    model = create_model("efficientnet-quant-b0").to(device, memory_format=torch.channels_last).eval()

    def inference() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def calibration(method: str) -> Callable[[], object]:
        return lambda: collect(model, batches, method)

    runs: dict[str, Callable[[], object]] = {"inference": inference, **{name: calibration(name) for name in METHODS}}
    if arguments.memory_of:
        print(_peak_bytes(runs[arguments.memory_of], device))
        return
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    memory = {name: _in_own_process(name, arguments) for name in runs}

    count = arguments.batch_size * arguments.batches
    size = f"batch {arguments.batch_size}, {arguments.image_size} px"
    print(f"efficientnet-b0, {size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':16}{'images/s':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    for name in runs:
        speed = count / statistics.median(seconds[name])
        ratio = statistics.median(seconds["inference"]) / statistics.median(seconds[name])
        share = memory[name] / memory["inference"]
        print(f"{name:16}{speed:9.1f}{ratio:8.2f}{memory[name] / 2**20:10.0f}{share:8.2f}")
    observers = collect(model, batches, "percentile")
    for method in CHOOSING:
        start = time.perf_counter()
        set_ranges(model, observers, method)
        print(f"choosing all ranges by {method}: {time.perf_counter() - start:.2f} s")


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Memory that a run needs beyond the model and the images."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    """Bytes of resident memory, now or at its peak, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def _in_own_process(name: str, arguments: argparse.Namespace) -> int:
    options = ["-b", arguments.batch_size, "--image-size", arguments.image_size, "--batches", arguments.batches]
    command = [sys.executable, __file__, "--memory-of", name, *map(str, options)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    main()

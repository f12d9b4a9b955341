"""Claim: the trainer costs at most 2 % over a bare loop.

Trains efficientnet-b0 on images in memory in two ways, in turns: by Trainer.fit (normalisation, accumulation, meters, signal
and divergence checks, progress) and by the smallest loop there is (forward, cross entropy, backward, SGD). Prints the median
of the rounds and of their ratios.

    python benchmarks/trainer_overhead.py --batch-size 32 --image-size 128
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_quant import create_model
from effnet_quant.data.transforms import Preprocessing, normalize
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.machine import describe_machine
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.trainer import Trainer


class Memory:
    """A loader of batches that are there already."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from ``first_batch`` on."""
        return iter(self._batches[first_batch:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The trainer against a bare loop.")
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4, help="batches a round and side")
    parser.add_argument("--rounds", type=int, default=11, help="rounds, taken in turns")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size = arguments.image_size
    batches = [
        (
            torch.randint(0, 256, (arguments.batch_size, 3, size, size), dtype=torch.uint8),
            torch.randint(0, 1000, (arguments.batch_size,)),
        )
        for _ in range(arguments.batches)
    ]
    model = create_model("efficientnet-b0")
    sides = {
        "bare loop": _bare_loop(copy.deepcopy(model), batches, device, compiled=arguments.compile),
        "trainer": _trainer(copy.deepcopy(model), batches, device, compiled=arguments.compile),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(arguments.rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / arguments.batches)
    ratios = [ours / bare for ours, bare in zip(seconds["trainer"], seconds["bare loop"], strict=True)]
    print(describe_machine())
    print(f"efficientnet-b0, batch {arguments.batch_size}, {size} px, compiled: {arguments.compile}")
    for name, values in seconds.items():
        print(f"{name:10} {statistics.median(values):.4f} s a step")
    print(f"trainer / bare loop: {statistics.median(ratios):.3f} (median of {arguments.rounds} rounds)")


def _bare_loop(
    model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], device: torch.device, *, compiled: bool
) -> Callable[[], object]:
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if compiled:
        model.compile()
    preprocessing = Preprocessing(0, 0)
    inputs = [
        (
            normalize(images.to(device), preprocessing).contiguous(memory_format=torch.channels_last),
            labels.to(device),
        )
        for images, labels in batches
    ]

    def run() -> None:
        for images, labels in inputs:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _trainer(
    model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], device: torch.device, *, compiled: bool
) -> Callable[[], object]:
    config = TrainConfig(
        epochs=10**6, run_epochs=1, lr=1e-3, lr_schedule="linear", batch_size=len(batches[0][1]), channels_last=True,
        training_only=True, save_checkpoints=False, compile=compiled,
    )  # fmt: skip
    metadata = {"arch": "efficientnet-b0", "num_classes": 1000}
    workspace = Path(tempfile.gettempdir())
    trainer = Trainer(model, config, Preprocessing(0, 0), device, workspace, Recorder(None), metadata)
    loader = Memory(batches)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(loader, loader)  # type: ignore[arg-type]

    return run


if __name__ == "__main__":
    main()

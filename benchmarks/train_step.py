"""Claims: the trainer costs at most 2 % over a bare loop, and is no slower than timm's and torchvision's loops.

Trains efficientnet-b0 with SGD on images in memory, in turns, each side in a process of its own:

    trainer       Trainer.fit: normalisation, accumulation, meters, signal and divergence checks, progress
    bare loop     forward, cross entropy, backward, step of the trainer's optimizer, which is fused
    bare loop, memory kept
                  the same with the trainer's setting of the C library (effnet_quant/memory.py)
    timm          what timm's train.py does in a step: its optimizer, its scheduler's update, its meter of the loss
    torchvision   what torchvision's reference does: top-1 and top-5 of every batch, three numbers fetched

The trainer takes uint8 images and normalises them; the others get normalised images. All networks are in channels_last. With
--compile all of them run compiled too. Prints the median of each side and of its ratios to the trainer.

    python benchmarks/train_step.py --batch-size 32 --image-size 128 --compile
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from steps import wait
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import create_model
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.data.transforms import normalize
from effnet_quant.memory import keep_freed_memory
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.machine import describe_machine
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.optimizers import build_optimizer
from effnet_quant.training.trainer import Trainer

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4
Batches = list[tuple[Tensor, Tensor]]


class Memory:
    """A loader of batches that are in memory."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from ``first_batch`` on."""
        return iter(self._batches[first_batch:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The trainer against a bare loop, timm's and torchvision's.")
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4, help="batches a round and side")
    parser.add_argument("--rounds", type=int, default=12, help="rounds, taken in turns")
    parser.add_argument("--compile", action="store_true", help="the compiled networks too; takes minutes for each")
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for compiled in (False, True) if arguments.compile else (False,):
        for name in SIDES:
            here, there = processes.Pipe()
            processes.Process(target=_serve, args=(there, name, compiled, arguments), daemon=True).start()
            key = f"{name}, compiled" if compiled else name
            print(f"{key}: {here.recv()}", flush=True)  # the others wait while one compiles
            sides[key] = here
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        turn = number % len(sides)  # what ran before leaves its mark on the clock
        for name, side in [*sides.items()][turn:] + [*sides.items()][:turn]:
            side.send("go")
            seconds[name].append(side.recv() / arguments.batches)
    for side in sides.values():
        side.send("")
    print(describe_machine())
    print(
        f"efficientnet-b0, batch {arguments.batch_size}, {arguments.image_size} px, medians of {arguments.rounds} rounds"
    )
    trainers = [name for name in sides if name.startswith("trainer")]
    print(f"{'':32} {'s a step':>9}  " + "  ".join(f"{'/ ' + name:>19}" for name in trainers))
    for name, values in seconds.items():
        ratios = [
            statistics.median(own / ours for own, ours in zip(values, seconds[trainer], strict=True))
            for trainer in trainers
        ]
        print(f"{name:32} {statistics.median(values):9.4f}  " + "  ".join(f"{ratio:19.3f}" for ratio in ratios))


def _serve(main: Connection, name: str, compiled: bool, arguments: argparse.Namespace) -> None:
    """Run in a process of its own: on each message, run one side and answer with its seconds."""
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
    model = create_model("efficientnet-b0").to(device, memory_format=torch.channels_last).train()
    if compiled and name != "trainer":
        model.compile()
    if name == "trainer":
        run = _trainer(model, batches, device, compiled=compiled)
    else:
        batches = [
            (
                normalize(images.to(device), InputSpec(1, 1)).contiguous(memory_format=torch.channels_last),
                labels.to(device),
            )
            for images, labels in batches
        ]
        run = SIDES[name](model, batches)
    start = time.perf_counter()
    for _ in range(2):
        run()
    main.send(f"warmed up in {time.perf_counter() - start:.0f} s")
    while main.recv():
        start = time.perf_counter()
        run()
        wait(device)
        main.send(time.perf_counter() - start)


def _bare_loop(model: nn.Module, batches: Batches) -> Callable[[], object]:
    optimizer = build_optimizer(model, TrainConfig(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))

    def run() -> None:
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _bare_loop_memory_kept(model: nn.Module, batches: Batches) -> Callable[[], object]:
    keep_freed_memory()
    return _bare_loop(model, batches)


def _trainer(model: nn.Module, batches: Batches, device: torch.device, *, compiled: bool) -> Callable[[], object]:
    config = TrainConfig(
        epochs=10**6, run_epochs=1, lr=LR, lr_schedule="linear", batch_size=len(batches[0][1]), channels_last=True,
        training_only=True, save_checkpoints=False, compile=compiled,
    )  # fmt: skip
    card = ModelCard(arch="efficientnet-b0", num_classes=1000, input=InputSpec(1, 1))  # the batches have their size
    workspace = Path(tempfile.gettempdir())
    trainer = Trainer(model, config, card, device, workspace, Recorder(None))
    loader = Memory(batches)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(loader, loader)  # type: ignore[arg-type]

    return run


def _timm(model: nn.Module, batches: Batches) -> Callable[[], object]:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter

    optimizer = create_optimizer_v2(model, opt="momentum", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler = CosineLRScheduler(optimizer, t_initial=10**6)
    updates = 0

    def run() -> None:
        nonlocal updates
        model.train()
        losses, load_time, step_time = AverageMeter(), AverageMeter(), AverageMeter()
        optimizer.zero_grad()
        end = time.time()
        for images, labels in batches:
            load_time.update(time.time() - end)
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(images))
            optimizer.zero_grad()
            updates += 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)
            step_time.update(time.time() - end)
            end = time.time()

    return run


def _torchvision(model: nn.Module, batches: Batches) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def run() -> None:
        model.train()
        windows: dict[str, deque[float]] = {name: deque(maxlen=20) for name in ("loss", "top1", "top5", "images/s")}
        for images, labels in batches:
            start = time.time()
            logits = model(images)
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            with torch.inference_mode():
                hits = logits.topk(5, dim=1).indices.t() == labels[None]
                top1, top5 = (hits[:k].flatten().sum(dtype=torch.float32) * (100 / len(images)) for k in (1, 5))
            windows["loss"].append(loss.item())
            windows["top1"].append(top1.item())
            windows["top5"].append(top5.item())
            windows["images/s"].append(len(images) / (time.time() - start))

    return run


SIDES: dict[str, Callable[..., Callable[[], object]]] = {
    "trainer": _trainer,
    "bare loop": _bare_loop,
    "bare loop, memory kept": _bare_loop_memory_kept,
    "timm": _timm,
    "torchvision": _torchvision,
}

if __name__ == "__main__":
    main()

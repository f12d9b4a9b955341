"""Runs engines and a training for a long time, and shows whether memory or descriptors grow or an answer changes.

    python benchmarks/soak.py --minutes 60 [--only onnxruntime openvino torch training]

The time is shared equally. Each part runs in a process of its own. An engine answers batches of 1 to 7 images from four
threads, and every answer is compared with the first one to the same images, bit by bit. The training runs epochs over an
image folder, some of whose images are damaged, in two worker processes; its answer is the loss of epoch 1, trained again
from the same weights. Memory is the process's, in MiB, after the first fifth of the time and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ENGINES = ("onnxruntime", "openvino", "torch")
PARTS = (*ENGINES, "training")
THREADS = 4
IMAGE_SIZE = 32
_GROWTH_MIB = 32.0  # more than this after the first fifth is a leak


class Watch:
    """Memory and descriptors of this process and its children, and how many answers were right."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._early: tuple[float, int] | None = None
        self._late: tuple[float, int] | None = None
        self.answers = 0
        self.changed = 0

    def begin(self) -> None:
        """Start the time; what is set up before is not counted."""
        self._began = time.monotonic()

    def goes_on(self) -> bool:
        """Whether there is time left. Notes memory and descriptors when a fifth has passed."""
        passed = time.monotonic() - self._began
        if self._early is None and passed > self._seconds / 5:
            self._early = usage()
        return passed < self._seconds

    def finish(self) -> None:
        """Note memory and descriptors at the end, while everything is still in use."""
        self._late = usage()

    def result(self) -> dict[str, float]:
        """The figures of the whole time."""
        early, late = self._early or usage(), self._late or usage()
        return {
            "answers": self.answers,
            "changed": self.changed,
            "memory_early": early[0],
            "memory_late": late[0],
            "descriptors_early": early[1],
            "descriptors_late": late[1],
        }


def usage() -> tuple[float, int]:
    """Resident memory in MiB and open descriptors, of this process and its children."""
    memory, descriptors = 0.0, 0
    for process in [os.getpid(), *_children()]:
        try:
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{process}/fd"))
        except OSError:  # it has ended
            continue
        memory += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, descriptors


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def soak_engine(backend: str, folder: Path, watch: Watch) -> None:
    """Ask one engine from several threads until the time is over."""
    import torch

    from effnet_quant import ModelCard, calibrate, create_model, export_onnx, load_engine, quantize
    from effnet_quant.models.weights import write_weights

    torch.manual_seed(0)
    target = "openvino" if backend == "openvino" else "onnxruntime"
    model = quantize(create_model("cifar-resnet20").eval(), target=target)
    calibrate(model, [torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)])
    path = folder / ("model.safetensors" if backend == "torch" else "model.onnx")
    if backend == "torch":
        write_weights(path, model.state_dict(), ModelCard(arch="cifar-resnet20", num_classes=10))
    else:
        export_onnx(model, path, IMAGE_SIZE, target=target)
    engine = load_engine(path, backend)
    noise = np.random.default_rng(0)
    batches = [noise.standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32) for count in range(1, 8)]
    for _ in range(2):  # OpenVINO compiles a network for a size that comes again
        expected = [engine(batch) for batch in batches]
    lock = threading.Lock()

    def ask(seed: int) -> None:
        order = random.Random(seed)
        while watch.goes_on():
            number = order.randrange(len(batches))
            same = np.array_equal(engine(batches[number]), expected[number])
            with lock:
                watch.answers += 1
                watch.changed += not same

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(THREADS)]
    watch.begin()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.finish()


def soak_training(folder: Path, watch: Watch) -> None:
    """Train epochs over damaged and whole images, from the same weights again every third epoch, until the time is over."""
    import torch

    from effnet_quant import create_model
    from effnet_quant.card import InputSpec, ModelCard
    from effnet_quant.data.folders import FolderSource
    from effnet_quant.data.loaders import Loader
    from effnet_quant.data.transforms import evaluation_transform, training_transform
    from effnet_quant.training.config import TrainConfig
    from effnet_quant.training.metrics import Recorder
    from effnet_quant.training.trainer import Trainer

    _write_images(folder)
    spec = InputSpec(IMAGE_SIZE, IMAGE_SIZE)
    source = FolderSource(folder / "train")
    # the same loaders all the time, as a long training has them
    train = Loader(source, training_transform(spec), 16, shuffle=True, seed=1, workers=2, max_bad_images=100)
    val = Loader(source, evaluation_transform(spec), 16, workers=2, max_bad_images=100)
    config = TrainConfig(epochs=3, batch_size=16, lr=0.01, seed=1, use_ema=0.9, print_freq=10**9)
    card = ModelCard(arch="cifar-resnet20", num_classes=2, input=spec)
    expected = None
    watch.begin()
    while watch.goes_on():
        torch.manual_seed(0)
        raport = folder / "raport.json"
        raport.unlink(missing_ok=True)
        network = create_model("cifar-resnet20", 2)
        trainer = Trainer(network, config, card, torch.device("cpu"), folder, Recorder(raport))
        trainer.fit(train, val)
        losses = [
            (line["data"]["train.loss"], line["data"]["val.loss"], line["data"]["val_ema.loss"])
            for line in map(json.loads, raport.read_text().splitlines())
        ]
        expected = losses if expected is None else expected
        watch.answers += len(losses)
        watch.changed += sum(one != other for one, other in zip(losses, expected, strict=True))
    watch.finish()


def _write_images(folder: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "train" / label).mkdir(parents=True)
        for number in range(128):
            path = folder / "train" / label / f"{number:03d}.jpg"
            Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
            if number % 20 == 7:
                path.write_bytes(path.read_bytes()[:200])


def _soak(part: str, seconds: float) -> None:
    """Run one part in this process, and print its figures as JSON."""
    watch = Watch(seconds)
    parts: dict[str, Callable[[Path], None]] = {"training": lambda folder: soak_training(folder, watch)}
    with tempfile.TemporaryDirectory() as folder:
        if part in parts:
            parts[part](Path(folder))
        else:
            soak_engine(part, Path(folder), watch)
        print(json.dumps(watch.result()))


def main() -> None:
    """Print a line for each part; exit with status 1 if an answer changed, or memory or descriptors grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="time for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60 / len(arguments.only)
    if arguments.part:
        _soak(arguments.part, arguments.minutes * 60)
        return
    print(f"{'part':14}{'answers':>9}{'changed':>9}{'MiB early':>11}{'MiB late':>10}{'descriptors':>14}", flush=True)
    failed = False
    for part in arguments.only:
        command = [sys.executable, __file__, "--part", part, "--minutes", str(seconds / 60)]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        figures = json.loads(output.splitlines()[-1])
        grown = figures["memory_late"] - figures["memory_early"] > _GROWTH_MIB
        opened = figures["descriptors_late"] > figures["descriptors_early"]
        failed |= bool(figures["changed"]) or grown or opened or not figures["answers"]
        descriptors = f"{figures['descriptors_early']} to {figures['descriptors_late']}"
        print(
            f"{part:14}{figures['answers']:9}{figures['changed']:9}{figures['memory_early']:11.0f}"
            f"{figures['memory_late']:10.0f}{descriptors:>14}",
            flush=True,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Measures loaders on full-size JPEGs, ours against the usual ones, in images a second.

    python benchmarks/loader.py                      # ../shared/data/imagenet-samples.tar
    python benchmarks/loader.py --images FOLDER      # <class>/<image>.jpg

Each line is one loader with the training transform to 224 pixels. It has the median of images a second, and the median ratio
to ours within a round (below 1: slower than ours). Each round runs every loader once, so that other load on the machine
slows all alike. The CPU time of an image depends least on other load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets
from torchvision import transforms as pil_transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from effnet_quant.card import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from effnet_quant.data.backends import open_loader
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.loaders import Loader
from effnet_quant.data.sources import EncodedSource, NameTable
from effnet_quant.data.transforms import training_transform

SIZE = 224
AHEAD = 4  # batches that are not counted: some loaders prepare them while others run
SAMPLES = Path(__file__).resolve().parents[2] / "shared/data/imagenet-samples.tar"
Run = Callable[[], Iterable]


class _DecodedByTorchvision(torch.utils.data.Dataset):
    """decode_jpeg and v2 transforms on uint8, as a careful user would write them."""

    def __init__(self, source: FolderSource, indices: torch.Tensor) -> None:
        self._source, self._indices = source, indices
        self._transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = int(self._indices[position])
        data = torch.from_numpy(np.fromfile(self._source.name(index), dtype=np.uint8))
        return self._transform(decode_jpeg(data, mode=ImageReadMode.RGB)), self._source.labels[index]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of <class>/<image>.jpg instead of the samples")
    parser.add_argument("--repeat", type=int, default=10, help="how often an epoch holds each image")
    parser.add_argument("--rounds", type=int, default=5, help="how often every loader runs")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of each loader")
    parser.add_argument("--batch-size", type=int, default=50, help="images a batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = arguments.images
        if images is None:
            with tarfile.open(SAMPLES) as archive:
                archive.extractall(folder, filter="data")
            images = Path(folder) / "val"
        source = FolderSource(images)
        indices = torch.arange(len(source)).repeat(arguments.repeat)
        _compare("plain", source, indices, arguments, None)
        _compare("AutoAugment", source, indices, arguments, "autoaugment")
    _epoch_starts(source.classes, arguments.workers)


def _compare(
    title: str, source: FolderSource, indices: torch.Tensor, arguments: argparse.Namespace, augmentation: str | None
) -> None:
    runs = _runs(source, indices, arguments, augmentation)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    firsts: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(arguments.rounds + 1):  # the first one starts workers and fills caches
        for name, run in runs.items():
            begin = start = time.perf_counter()
            cpu = 0.0
            count = 0
            for number, (batch, *_) in enumerate(run(), 1):
                if number == 1:
                    first = time.perf_counter() - begin
                if number <= AHEAD:
                    start, cpu = time.perf_counter(), _cpu_seconds()
                else:
                    count += len(batch)
            if round_number:
                speeds[name].append(count / (time.perf_counter() - start))
                firsts[name].append(first)
                costs[name].append(1000 * (_cpu_seconds() - cpu) / count)
    print(f"\n{title}: {len(indices)} images an epoch, {arguments.workers} workers, batches of {arguments.batch_size}")
    print(f"{'loader':34s} {'img/s':>7s} {'to ours':>8s} {'CPU ms/img':>11s} {'first batch, s':>15s}")
    ours = speeds["ours, pytorch"]
    for name, values in speeds.items():
        ratio = statistics.median(value / own for value, own in zip(values, ours, strict=True))
        cost, first = statistics.median(costs[name]), statistics.median(firsts[name])
        print(f"{name:34s} {statistics.median(values):7.0f} {ratio:8.2f} {cost:11.2f} {first:15.3f}", flush=True)


def _runs(
    source: FolderSource, indices: torch.Tensor, arguments: argparse.Namespace, augmentation: str | None
) -> dict[str, Run]:
    transform = training_transform(InputSpec(SIZE, SIZE + 32), augmentation)
    batch_size, workers = arguments.batch_size, arguments.workers
    runs: dict[str, Run] = {}
    for name, backend in (("ours, pytorch", "pytorch"), ("ours, dali-cpu", "dali-cpu")):
        loader = open_loader(
            backend, source, transform, batch_size, torch.device("cpu"), shuffle=True, workers=workers, indices=indices
        )
        runs[name] = loader.epoch
    loading = {"batch_size": batch_size, "shuffle": True, "num_workers": workers, "persistent_workers": True}
    root = Path(source.name(0)).parents[1]
    to_float = [pil_transforms.ToTensor(), pil_transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if augmentation is None:
        steps = [pil_transforms.RandomResizedCrop(SIZE), pil_transforms.RandomHorizontalFlip(), *to_float]
        usual = datasets.ImageFolder(root, pil_transforms.Compose(steps))
        runs["torchvision ImageFolder, PIL"] = DataLoader(ConcatDataset([usual] * arguments.repeat), **loading).__iter__
        by_hand = _DecodedByTorchvision(source, indices)
        runs["decode_jpeg and v2 on uint8"] = DataLoader(by_hand, **loading).__iter__
        runs["DALI by its own reader"] = _dali_alone(source, indices, batch_size, workers)
    else:
        from timm.data import create_transform

        theirs = create_transform(SIZE, is_training=True, auto_augment="original", interpolation="bilinear")
        folder = datasets.ImageFolder(root, theirs)
        runs["timm's transform, same policy"] = DataLoader(
            ConcatDataset([folder] * arguments.repeat), **loading
        ).__iter__
    return runs


def _dali_alone(source: FolderSource, indices: torch.Tensor, batch_size: int, threads: int) -> Run:
    """DALI as its documentation has it: its file reader, its random crop, uint8 at the end."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    files = [source.name(int(index)) for index in indices]
    labels = source.labels[indices].tolist()

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
    def pipeline():
        encoded, label = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    batches = DALIGenericIterator(
        [pipeline()],
        ["images", "labels"],
        reader_name="reader",
        auto_reset=True,
        last_batch_policy=LastBatchPolicy.DROP,
    )
    return lambda: ((part["images"], part["labels"]) for parts in batches for part in parts)


class _Names(EncodedSource):
    """ImageNet's number of file names, all of which lead to one small image."""

    def __init__(self, count: int, data: np.ndarray) -> None:
        self.classes = ["one"]
        self.labels = torch.zeros(count, dtype=torch.int64)
        self._names = NameTable(f"train/n01440764/n01440764_{index}.JPEG" for index in range(count))
        self._data = data

    def name(self, index: int) -> str:
        return self._names[index]

    def load(self, index: int) -> np.ndarray:
        self.name(index)
        return self._data.copy()


def _epoch_starts(classes: list[str], workers: int, count: int = 1_300_000, epochs: int = 20) -> None:
    """How long an epoch of ImageNet's size takes to start, and whether its workers grow."""
    from torchvision.io import encode_jpeg

    small = encode_jpeg(torch.zeros(3, 32, 32, dtype=torch.uint8)).numpy()
    loader = Loader(_Names(count, small), training_transform(InputSpec(32, 32)), 32, shuffle=True, workers=workers)
    starts, sizes = [], []
    for epoch in range(epochs):
        start = time.perf_counter()
        batches = loader.epoch(epoch)
        next(batches)
        starts.append(time.perf_counter() - start)
        for _ in range(50):
            next(batches)
        sizes.append(_memory_of_children())
    print(f"\n{count} names, {workers} workers, {epochs} epochs left after 50 batches of 32")
    print(f"first batch after {starts[0]:.2f} s with workers to start, then {statistics.median(starts[1:]):.3f} s")
    print(f"private memory of the workers: {sizes[0]:.0f} MB in epoch 1, {sizes[-1]:.0f} MB in epoch {epochs}")
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def _cpu_seconds() -> float:
    """CPU time of this process and its workers: the cost of a loader, even on a shared machine."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _memory_of_children() -> float:
    total = 0
    for process in multiprocessing.active_children():
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1])
    return total / 1024


if __name__ == "__main__":
    main()

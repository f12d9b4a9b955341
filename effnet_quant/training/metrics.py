"""Measures losses and speeds, and writes metrics to the raport file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_quant.errors import UserError
from effnet_quant.files import possible_path
from effnet_quant.training.distributed import ALONE, World
from effnet_quant.training.sinks import Sink


class Recorder:
    """Appends metrics to the raport file, one JSON object per line.

    A line holds ``timestamp`` (seconds since 1970), ``step`` ([] for the run, [epoch] for an epoch), ``data`` (the metrics
    by name) and, if given, ``machine``. Numbers that are not finite are written as null.

    Args:
        path: the raport file; None to write nothing.
        machine: the machine that a benchmark runs on.
        sinks: further receivers of the metrics.

    Raises:
        UserError: the file can't be written.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any] | None = None, sinks: Sequence[Sink] = ()) -> None:
        self._path = path
        self._sinks = sinks
        self._machine = {} if machine is None else {"machine": machine}
        if path is not None:
            possible_path(path)
            if path.is_fifo():  # opening it would wait for a reader
                raise UserError(f"can't write the raport file {path}: it is a pipe; choose another with --raport-file.")
            try:
                path.open("a", encoding="utf-8").close()
            except OSError as error:
                raise UserError(
                    f"can't write the raport file {path}: {error.strerror}; choose another with --raport-file."
                ) from error

    def record(self, data: dict[str, Any], epoch: int | None = None) -> None:
        """Write one line."""
        if self._path is None:
            return
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in data.items()}
        for sink in self._sinks:
            sink.write({name: v for name, v in data.items() if isinstance(v, int | float)}, epoch or 0)
        line = {"timestamp": time.time(), "step": [] if epoch is None else [epoch], "data": finite, **self._machine}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"can't write the raport file {self._path}: {error.strerror}.") from error


class Stopwatch:
    """Splits the time of a loop into waiting for data and computing.

    - ``data_time``, ``compute_time``: average seconds per batch.
    - ``total_ips``, ``compute_ips``: images per second of all processes, with and without the wait for data.
    - ``compute_latency``: average compute time of the batches, in seconds.
    - ``compute_latency_at50``, ``_at95``, ``_at99``, ``_at100``: quantiles of the compute times.

    Args:
        processes: number of processes that compute at the same time.
        warmup: batches at the start that are not counted.
    """

    def __init__(self, processes: int = 1, warmup: int = 0) -> None:
        self._processes = processes
        self._warmup = warmup
        self._mark = time.perf_counter()
        self._waited = 0.0
        self._data: list[float] = []
        self._compute: list[float] = []
        self._images = 0

    def data_ready(self) -> None:
        """The next batch has arrived."""
        now = time.perf_counter()
        self._waited = now - self._mark
        self._mark = now

    def batch_done(self, images: int) -> None:
        """The batch has been computed."""
        now = time.perf_counter()
        if self._warmup > 0:
            self._warmup -= 1
        else:
            self._data.append(self._waited)
            self._compute.append(now - self._mark)
            self._images += images
        self._mark = now

    def device_done(self) -> None:
        """The device has finished its queue. The time since the last batch is added to that batch."""
        now = time.perf_counter()
        if self._compute:
            self._compute[-1] += now - self._mark
        self._mark = now

    def metrics(self, prefix: str) -> dict[str, float]:
        """Speeds and times under ``<prefix>.``; empty before the first counted batch."""
        if not self._compute:
            return {}
        data, compute = math.fsum(self._data), math.fsum(self._compute)
        images, batches = self._images * self._processes, len(self._compute)
        return {
            f"{prefix}.total_ips": images / (data + compute),
            f"{prefix}.compute_ips": images / compute,
            f"{prefix}.data_time": data / batches,
            f"{prefix}.compute_time": compute / batches,
        }

    def latencies(self, prefix: str) -> dict[str, float]:
        """Average and quantiles of the compute times. They are right only if the caller waited for every batch's end."""
        if not self._compute:
            return {}
        times = torch.tensor(self._compute, dtype=torch.float64)
        quantiles = {
            f"{prefix}.compute_latency_at{percent}": times.quantile(percent / 100, interpolation="nearest").item()
            for percent in (50, 95, 99, 100)
        }
        return {f"{prefix}.compute_latency": times.mean().item(), **quantiles}


class LossMeter:
    """The mean loss over an epoch, summed on the device, and the first batch whose loss was not finite.

    Args:
        device: the losses' device.
        sums: the property ``sums`` of an interrupted epoch, to continue from.
    """

    def __init__(self, device: torch.device, sums: Tensor | None = None) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums.to(device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, images: int, batch: int) -> None:
        """Add the mean loss of ``images`` images in batch number ``batch``. Non-finite losses are left out of the mean."""
        finite = torch.isfinite(loss)
        counted = torch.where(finite, loss.double(), 0.0)
        self._sums += torch.stack([counted * images, finite * float(images)])
        self._first_bad = torch.where((self._first_bad < 0) & ~finite, batch, self._first_bad)

    def first_bad_batch(self) -> int | None:
        """The first batch whose loss was not finite, or None. Waits for the device."""
        batch = int(self._first_bad)
        return None if batch < 0 else batch

    def mean(self, world: World = ALONE) -> float:
        """The mean loss per image over all processes; NaN before the first image."""
        total, images = world.sum(self._sums).tolist()
        return total / images if images else math.nan

    @property
    def sums(self) -> Tensor:
        """Sum of the losses and number of images, of shape (2,), for a checkpoint."""
        return self._sums


def describe(metrics: dict[str, float]) -> str:
    """The most important metrics on one line."""
    shown = {
        name: value
        for name, value in metrics.items()
        if not name.endswith(("data_time", "compute_time", "compute_ips")) and "compute_latency" not in name
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())

"""What a run measures and where it is written."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_quant.errors import UserError


class Recorder:
    """Appends metrics to the raport file, one JSON object a line.

    Each line holds ``timestamp`` (seconds since 1970), ``step`` ([] for the run, [epoch] for an epoch) and ``data`` (the
    metrics by name; a number that is not finite is written as null).

    Args:
        path: the raport file, None to write nothing.

    Raises:
        UserError: the file can't be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
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
        line = {"timestamp": time.time(), "step": [] if epoch is None else [epoch], "data": finite}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"can't write the raport file {self._path}: {error.strerror}.") from error


class Stopwatch:
    """Splits the time of a loop into waiting for data and computing.

    ``data_time`` and ``compute_time`` are seconds a batch on average; ``total_ips`` and ``compute_ips`` are images a
    second with and without the wait for data.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._data = 0.0
        self._compute = 0.0
        self._images = 0
        self._batches = 0

    def data_ready(self) -> None:
        """The next batch has arrived."""
        now = time.perf_counter()
        self._data += now - self._mark
        self._mark = now

    def batch_done(self, images: int) -> None:
        """The batch has been computed."""
        now = time.perf_counter()
        self._compute += now - self._mark
        self._mark = now
        self._images += images
        self._batches += 1

    def metrics(self, prefix: str) -> dict[str, float]:
        """The four figures under ``<prefix>.``; empty before the first batch."""
        if not self._batches:
            return {}
        return {
            f"{prefix}.total_ips": self._images / (self._data + self._compute),
            f"{prefix}.compute_ips": self._images / self._compute,
            f"{prefix}.data_time": self._data / self._batches,
            f"{prefix}.compute_time": self._compute / self._batches,
        }


class Accuracy:
    """Loss, top-1 and top-k of a classifier over an epoch, each image counted once, summed on the device."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._k = k
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, logits (N, classes) and labels (N,)."""
        top = logits.topk(min(self._k, logits.shape[1]), dim=1).indices == labels[:, None]
        batch = torch.stack([loss.double() * len(labels), top[:, 0].sum().double(), top.sum().double()])
        self._sums += batch
        self._images += len(labels)

    def metrics(self, prefix: str) -> dict[str, float]:
        """``<prefix>.loss`` and the accuracies ``<prefix>.top1``, ``<prefix>.top<k>`` in percent."""
        loss, top1, topk = (self._sums / max(1, self._images)).tolist()
        return {f"{prefix}.loss": loss, f"{prefix}.top1": 100 * top1, f"{prefix}.top{self._k}": 100 * topk}

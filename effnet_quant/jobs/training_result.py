"""What a training has reached: its best checkpoint on the validation images, class by class, in a file and a picture."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_quant.data.transforms import normalize
from effnet_quant.errors import UserError
from effnet_quant.files import replace_file
from effnet_quant.jobs.config import PlaceConfig
from effnet_quant.jobs.run import Run
from effnet_quant.models.weights import load_weights, read_weights
from effnet_quant.report.training_picture import check_pictures, draw_training
from effnet_quant.terminal import printable
from effnet_quant.training.checkpoint import BEST_FILENAME

RESULT, PICTURE = "result.json", "training.png"
_MOST_SHOWN = 20  # classes; of more, the worst are printed


@dataclass(frozen=True)
class TrainingResult:
    """What a training has reached. Its file lies in the run's folder, beside the checkpoints.

    Attributes:
        folder: the run's folder, with its checkpoints.
        data: the DATA argument, a folder with its whole path.
        arch: the network.
        image_size: in pixels.
        epochs: how many were trained.
        best_epoch: the one whose weights are in ``model_best.pth.tar``, counted from 1.
        top1: of these weights on the validation images, in percent, computed in float32 as an engine does it.
        images: number of validation images.
        classes: names of the classes.
        confusion: images of class ``row`` that were taken for class ``column``.
    """

    folder: str
    data: str
    arch: str
    image_size: int
    epochs: int
    best_epoch: int
    top1: float
    images: int
    classes: list[str]
    confusion: list[list[int]]

    def per_class(self) -> list[float | None]:
        """Top-1 of each class in percent; None for a class without validation images."""
        return [100 * row[index] / sum(row) if sum(row) else None for index, row in enumerate(self.confusion)]

    def __str__(self) -> str:
        lines = [
            f"best epoch: {self.best_epoch} of {self.epochs}, top-1 {self.top1:.2f} % of {self.images} validation images"
        ]
        ranked = sorted(
            zip(self.per_class(), map(printable, self.classes), strict=True),
            key=lambda pair: (pair[0] is None, pair[0]),
        )
        shown = ranked[:_MOST_SHOWN]
        width = max(len(name) for _, name in shown)
        lines += [f"  {name:<{width}}  " + ("no images" if top1 is None else f"{top1:5.1f} %") for top1, name in shown]
        if len(ranked) > len(shown):
            lines.append(f"  and {len(ranked) - len(shown)} better classes")
        return "\n".join(lines)


def write_result(run: Run, place: PlaceConfig) -> TrainingResult:
    """Evaluate the run's best checkpoint, class by class; write ``result.json`` and ``training.png`` to its folder.

    Without matplotlib there is no picture, and a note.

    Raises:
        UserError: the checkpoint can't be read, or a file can't be written.
    """
    workspace = Path(place.workspace)
    best = read_weights(workspace / BEST_FILENAME)
    load_weights(run.model, best)
    card, confusion = run.card, _confusion(run)
    assert card.arch is not None and card.classes is not None and card.input is not None
    losses, scores = _curves(workspace / place.raport_file, run.trainer.task.score.key)
    reached = [-1.0 if score is None else score for score in scores]
    path = Path(run.data.data)
    result = TrainingResult(
        folder=str(workspace),
        data=os.path.abspath(path) if path.exists() else run.data.data,
        arch=card.arch,
        image_size=card.input.image_size,
        epochs=len(scores),
        best_epoch=reached.index(max(reached)) + 1,
        top1=100 * int(confusion.diagonal().sum()) / max(int(confusion.sum()), 1),
        images=int(confusion.sum()),
        classes=list(card.classes),
        confusion=confusion.tolist(),
    )
    title = f"{printable(card.arch)} at {card.input.image_size} px: top-1 {result.top1:.2f} %"
    try:
        check_pictures()
    except UserError as error:
        print(f"note: there is no {PICTURE}: {error}", file=sys.stderr)
    else:
        numbers = confusion.numpy()
        draw_training(workspace / PICTURE, title, losses, scores, result.best_epoch, result.classes, numbers)
    # last, because quantization takes this file as the sign that the training has ended
    values = {name: value for name, value in asdict(result).items() if name != "folder"}  # the folder may be moved
    replace_file(workspace / RESULT, (json.dumps(values) + "\n").encode())
    return result


def read_result(folder: Path) -> TrainingResult:
    """Read the ``result.json`` of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / RESULT
    try:
        values = json.loads(path.read_bytes())
        result = TrainingResult(folder=str(folder), **values)
        if not isinstance(result.data, str):
            raise TypeError("data is no text")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {RESULT}, which effnet-quant train writes at its end; finish the training with --resume, or "
            "give DATA and --pretrained-from-file."
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} can't be used: {error}; train again.") from error
    return result


@torch.no_grad()
def _confusion(run: Run) -> Tensor:
    """Images by class and prediction, int64 (classes, classes), on the CPU. The network is that of the run."""
    assert run.card.input is not None and run.card.num_classes is not None
    count, model = run.card.num_classes, run.model.eval()
    confusion = torch.zeros(count, count, dtype=torch.int64)
    for images, labels in run.val.epoch():
        assert isinstance(labels, Tensor)
        inputs = normalize(images.to(run.device), run.card.input)
        predictions = model(inputs).argmax(1).cpu()
        confusion += torch.bincount(labels.cpu() * count + predictions, minlength=count * count).view(count, count)
    return confusion


def _curves(report: Path, key: str) -> tuple[list[float | None], list[float | None]]:
    """The training loss and the score of each epoch, from the raport file. A resumed epoch's last line counts."""
    by_epoch: dict[int, dict[str, Any]] = {}
    for line in report.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["step"]:
            by_epoch[entry["step"][0]] = entry["data"]
    epochs = [by_epoch.get(epoch, {}) for epoch in range(max(by_epoch, default=-1) + 1)]
    return [epoch.get("train.loss") for epoch in epochs], [epoch.get(f"val.{key}") for epoch in epochs]

"""Trains and evaluates float networks, as main.py does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import overload

from effnet_quant.card import ModelCard
from effnet_quant.errors import UserError
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.preset import choose_preset, chosen
from effnet_quant.jobs.run import Run, open_run
from effnet_quant.jobs.training_result import TrainingResult, write_result
from effnet_quant.models.registry import get_entry
from effnet_quant.terminal import printable
from effnet_quant.training.config import TrainConfig


@overload
def train(card: str) -> TrainingResult: ...


@overload
def train(
    card: ModelCard,
    data: DataConfig | str,
    config: TrainConfig,
    place: PlaceConfig | None = None,
    start: StartConfig | None = None,
) -> ModelCard: ...


def train(
    card: ModelCard | str,
    data: DataConfig | str | None = None,
    config: TrainConfig | None = None,
    place: PlaceConfig | None = None,
    start: StartConfig | None = None,
) -> ModelCard | TrainingResult:
    """Train a float network, as main.py does, and write checkpoints to the workspace.

    ``train("DATA")`` chooses all settings by the data and the machine, as ``effnet-quant train DATA`` does, and writes to a
    new folder in ``runs``.

    Args:
        card: names the arch. Open fields take their values from the data and the network's defaults. Or the name of a data
            set (docs/data.md), without other arguments.
        data: the images' settings, or the name of a data set.
        config: hyperparameters and run control.
        place: where the run writes; None for the working directory.
        start: weights or a checkpoint to start from; None for random weights.

    Returns:
        The card of the trained model, as in its checkpoints; of ``train("DATA")`` what it reached, and where.

    Raises:
        UserError: a setting or the data can't be used.
        Interrupted: a signal ended the run. The checkpoint has been written.
    """
    if isinstance(card, str):
        if (data, config, place, start) != (None, None, None, None):
            raise UserError(
                "train('DATA') chooses all settings; give a ModelCard, data and a TrainConfig to choose yours."
            )
        return _train_by_preset(card)
    if data is None or config is None:
        raise UserError("train needs the name of a data set alone, or a ModelCard, data and a TrainConfig.")
    data = DataConfig(data) if isinstance(data, str) else data
    with open_run(card, data, config, place, start) as run:
        fit(run)
        return run.card


def _train_by_preset(data: str) -> TrainingResult:
    preset = choose_preset(data)
    for sentence in (*preset.said, chosen(preset.values())):
        print(printable(sentence), flush=True)
    place = PlaceConfig(new_run_folder())
    card = ModelCard(arch=preset.arch, input=get_entry(preset.arch).input.resized(preset.image_size))
    start = StartConfig(pretrained=preset.pretrained, new_classifier=True)
    images = DataConfig(data, smallest_crop=preset.smallest_crop)
    with open_run(card, images, preset.config, place, start) as run:
        fit(run)
        return write_result(run, place)


def new_run_folder() -> str:
    """The name of a folder for a run that begins now, in ``runs``. It does not exist yet."""
    folder = name = Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))
    number = 1
    while folder.exists():
        number += 1
        folder = name.with_name(f"{name.name}-{number}")
    return str(folder)


def fit(run: Run) -> None:
    """Train an opened run to its end.

    Raises:
        Interrupted: a signal ended it. The checkpoint has been written.
    """
    assert run.train is not None
    run.trainer.fit(run.train, run.val)


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate a run on its validation images; returns the metrics and records them."""
    metrics = run.trainer.validate(run.val)
    run.recorder.record(metrics)
    return metrics

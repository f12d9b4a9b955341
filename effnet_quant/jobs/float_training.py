"""Trains and evaluates float networks, as main.py does."""

from __future__ import annotations

from effnet_quant.card import ModelCard
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.run import Run, open_run
from effnet_quant.training.config import TrainConfig


def train(
    card: ModelCard,
    data: DataConfig | str,
    config: TrainConfig,
    place: PlaceConfig | None = None,
    start: StartConfig | None = None,
) -> ModelCard:
    """Train a float network, as main.py does, and write checkpoints to the workspace.

    Args:
        card: names the arch. Open fields take their values from the data and the network's defaults.
        data: the images' settings, or the name of a data set (docs/data.md).
        config: hyperparameters and run control.
        place: where the run writes; None for the working directory.
        start: weights or a checkpoint to start from; None for random weights.

    Returns:
        The card of the trained model, as in its checkpoints.

    Raises:
        UserError: a setting or the data can't be used.
        Interrupted: a signal ended the run. The checkpoint has been written.
    """
    data = DataConfig(data) if isinstance(data, str) else data
    with open_run(card, data, config, place, start) as run:
        fit(run)
        return run.card


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

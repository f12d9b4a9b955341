"""Training and evaluating a float network: what main.py does."""

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
    """Train a float network to the end of its epochs, with checkpoints in the workspace; main.py from Python.

    Args:
        card: names the arch; what it leaves open follows from the data and the network's defaults.
        data: the images, or what names them.
        config: hyperparameters and run control.
        place: where the run writes; None for the working directory.
        start: weights or a checkpoint to start from; None for random weights.

    Returns:
        The card of the trained model, as its checkpoints have it.

    Raises:
        UserError: a setting or the data can't be used.
        Interrupted: a signal ended the run, with a checkpoint.
    """
    data = DataConfig(data) if isinstance(data, str) else data
    with open_run(card, data, config, place, start) as run:
        fit(run)
        return run.card


def fit(run: Run) -> None:
    """Train a run that is ready.

    Raises:
        Interrupted: a signal ended it, with a checkpoint.
    """
    assert run.train is not None
    run.trainer.fit(run.train, run.val)


def evaluate(run: Run) -> dict[str, float]:
    """The metrics of a run's validation images, which are recorded too."""
    metrics = run.trainer.validate(run.val)
    run.recorder.record(metrics)
    return metrics

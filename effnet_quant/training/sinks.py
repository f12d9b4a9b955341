"""Receivers of metrics beside the raport file: TensorBoard, Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from effnet_quant.errors import UserError


class Sink(Protocol):
    """A receiver of metrics."""

    def write(self, metrics: dict[str, float], epoch: int) -> None:
        """Write the metrics of an epoch, counted from 0. A run without epochs is epoch 0."""
        ...


class TensorBoard:
    """Writes event files for TensorBoard.

    Args:
        folder: the files' folder.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the package tensorboard; pip install 'effnet-quant[tensorboard]'."
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: dict[str, float], epoch: int) -> None:
        """Write each metric under its name. The part before the dot is its group."""
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, epoch)
        self._writer.flush()


class WandB:
    """Logs to a run of Weights & Biases; offline if WANDB_MODE is "offline".

    Args:
        project: name of the project.
        folder: folder of the run's local files.
        config: the run's settings, which W&B shows.

    Raises:
        UserError: wandb is not installed or the run can't be started.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs the package wandb; pip install 'effnet-quant[wandb]'.") from error
        try:
            self._run = wandb.init(project=project, dir=str(folder), config=config)
        except wandb.Error as error:
            raise UserError(
                f"--wandb {project}: {error}; log in with wandb login, or set WANDB_MODE=offline."
            ) from error
        self._run.define_metric("*", step_metric="epoch")

    def write(self, metrics: dict[str, float], epoch: int) -> None:
        """Log the metrics with their epoch as a metric of its own.

        W&B's own steps must rise. It would drop an epoch that comes twice, such as the first after a calibration.
        """
        self._run.log({**metrics, "epoch": epoch})

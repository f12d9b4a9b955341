"""Where metrics can be sent beside the raport file: TensorBoard, Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from effnet_quant.errors import UserError


class Sink(Protocol):
    """Takes metrics."""

    def write(self, metrics: dict[str, float], epoch: int) -> None:
        """Take the metrics of an epoch, counted from 0; a run without epochs is epoch 0."""
        ...


class TensorBoard:
    """Event files that TensorBoard shows.

    Args:
        folder: where to write them.

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
        """Add each metric under its name, with its part before the dot as the group."""
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, epoch)
        self._writer.flush()


class WandB:
    """A run of Weights & Biases, offline where WANDB_MODE says so.

    Args:
        project: its name there.
        folder: for the run's local files.
        config: what the run was asked for, shown beside it.

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
        """Log the metrics beside their epoch. W&B's own steps only go up: it would drop an epoch that comes again, as the
        first does after a calibration."""
        self._run.log({**metrics, "epoch": epoch})

"""The position of a training and its random states, as checkpoints hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from effnet_quant.errors import UserError
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import World

# flag -> setting that decides which images form a batch, or which batches form a step
_CUTTING = {"-b": "batch_size", "--optimizer-batch-size": "optimizer_batch_size", "--seed": "seed"}


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: the current or next epoch, counted from 0.
        batch: the next batch within the epoch; 0 between epochs.
        step: optimizer steps since training began.
        best_score: the best score so far, as ``Score.ranked`` gives it; -inf before the first validation.
        epochs_since_best: validations since the best one.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_score: float = -math.inf
    epochs_since_best: int = 0

    @staticmethod
    def of(checkpoint: dict[str, Any], source: str) -> Position:
        """Read the position from a checkpoint of ours or of NVIDIA's scripts; theirs are always between epochs.

        Raises:
            UserError: one of its entries is no number. The sentence names ``source``.
        """
        best = checkpoint.get("best_prec1")
        try:
            return Position(
                epoch=int(checkpoint["epoch"]),
                batch=int(checkpoint.get("batch", 0)),
                step=int(checkpoint.get("step", 0)),
                best_score=-math.inf if best is None else float(best),
                epochs_since_best=int(checkpoint.get("epochs_since_best", 0)),
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"{source} does not say where its training stood ({error}); get it again.") from error

    def entries(self) -> dict[str, Any]:
        """The checkpoint entries that ``of`` reads, under NVIDIA's names where they exist."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best_prec1": self.best_score,
            "epochs_since_best": self.epochs_since_best,
        }

    def note_score(self, score: float) -> bool:
        """Note a validation's score, where higher is better; returns whether it is the best so far."""
        is_best = score > self.best_score
        self.best_score = max(self.best_score, score)
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        return is_best

    def check_agreement(self, world: World) -> None:
        """Check that all processes have the same position. All of them call this.

        Raises:
            UserError: one has another. Each process reads its own checkpoint, and machines may hold different ones.
        """
        mine = torch.tensor([self.epoch, self.batch, self.step])
        if not all(torch.equal(mine, other) for other in world.gather(mine)):
            raise UserError(
                "the processes of this job stand at different places of the training, because some machines have another "
                "checkpoint than others, or none; give all the same file with --resume."
            )


def check_same_batches(checkpoint: dict[str, Any], source: str, config: TrainConfig, processes: int) -> None:
    """Check that a run divides an epoch into the same batches as the run that wrote the checkpoint within the epoch.

    Raises:
        UserError: it does not. The sentence names the flags that are needed.
    """
    was, were = checkpoint.get("config") or {}, checkpoint.get("processes", 1)
    needed = [
        f"{flag} {was[name]}" for flag, name in _CUTTING.items() if name in was and was[name] != getattr(config, name)
    ]
    if were != processes:
        needed.append(f"{were} processes")
    if needed:
        raise UserError(f"{source} stands in the middle of an epoch; resume it with {', '.join(needed)}.")


def random_states(world: World, device: torch.device) -> dict[str, Any]:
    """The random states of all processes, by rank, for a checkpoint. All processes call this."""
    on_gpu = device.type == "cuda"
    return {
        "rng": world.gather(torch.get_rng_state()),
        "cuda_rng": world.gather(torch.cuda.get_rng_state()) if on_gpu else None,
    }


def restore_random_state(checkpoint: dict[str, Any], source: str, world: World, device: torch.device) -> None:
    """Restore this process's random state, if the checkpoint has as many processes.

    Raises:
        UserError: it is none. The sentence names ``source``.
    """
    states, cuda_states = checkpoint.get("rng") or [], checkpoint.get("cuda_rng") or []
    if len(states) != world.size:
        return
    try:
        torch.set_rng_state(states[world.rank])
        if device.type == "cuda" and len(cuda_states) == world.size:
            torch.cuda.set_rng_state(cuda_states[world.rank])
    except RuntimeError as error:
        raise UserError(f"{source} can't be used: its random states are damaged ({error}); get it again.") from error

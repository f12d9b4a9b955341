"""Where a training stands: the part of a checkpoint that is neither weights nor optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from effnet_quant.errors import UserError
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import World

# what decides which images a batch of an epoch holds, and which batches make a step
_CUTTING = {"-b": "batch_size", "--optimizer-batch-size": "optimizer_batch_size", "--seed": "seed"}


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: that is under way or comes next, counted from 0.
        batch: of the epoch; not 0 only within it.
        step: of the optimizer, since the training began.
        best_score: the best of the task's scores, as ``Score.ranked`` gives it; -inf before the first validation.
        epochs_since_best: validations since then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_score: float = -math.inf
    epochs_since_best: int = 0

    @staticmethod
    def of(checkpoint: dict[str, Any], source: str) -> Position:
        """The position in a checkpoint of ours or of NVIDIA's scripts, which stand between epochs.

        Raises:
            UserError: one of its entries is no number; the sentence names ``source``.
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
        """What ``of`` reads, under NVIDIA's names where it has any."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best_prec1": self.best_score,
            "epochs_since_best": self.epochs_since_best,
        }

    def note_score(self, score: float) -> bool:
        """Take a validation into account, more being better; whether it is the best so far."""
        is_best = score > self.best_score
        self.best_score = max(self.best_score, score)
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        return is_best

    def check_agreement(self, world: World) -> None:
        """See whether all processes stand here; all of them call it.

        Raises:
            UserError: one stands elsewhere, because each reads a checkpoint of its own accord, and machines may have others.
        """
        mine = torch.tensor([self.epoch, self.batch, self.step])
        if not all(torch.equal(mine, other) for other in world.gather(mine)):
            raise UserError(
                "the processes of this job stand at different places of the training, because some machines have another "
                "checkpoint than others, or none; give all the same file with --resume."
            )


def check_same_batches(checkpoint: dict[str, Any], source: str, config: TrainConfig, processes: int) -> None:
    """See whether a run cuts an epoch into the same batches as the one that left a checkpoint in the middle of it.

    Raises:
        UserError: it does not; the sentence names the flags it takes.
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
    """The random states of every process, by rank, as a checkpoint holds them; all processes call it."""
    on_gpu = device.type == "cuda"
    return {
        "rng": world.gather(torch.get_rng_state()),
        "cuda_rng": world.gather(torch.cuda.get_rng_state()) if on_gpu else None,
    }


def restore_random_state(checkpoint: dict[str, Any], world: World, device: torch.device) -> None:
    """Go on with this process' random state, if the checkpoint is of as many processes."""
    states = checkpoint.get("rng")
    if isinstance(states, list) and len(states) == world.size:
        torch.set_rng_state(states[world.rank])
        if device.type == "cuda" and checkpoint.get("cuda_rng"):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"][world.rank])

"""Finds losses that are not finite, names their images, and stops training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from effnet_quant.data.loaders import Loader
from effnet_quant.errors import PeerLost, UserError
from effnet_quant.files import replace_file
from effnet_quant.training.distributed import World
from effnet_quant.training.metrics import LossMeter
from effnet_quant.training.optimizers import learned_ranges

FILENAME = "nonfinite_loss.txt"
_NAMES_SHOWN = 4
_NEVER = 2**62


def check_weights(model: nn.Module) -> None:
    """Check that all weights and BatchNorm's statistics are finite. Waits for the device.

    Raises:
        UserError: one is not. The sentence names the first.
    """
    ranges = {id(parameter) for parameter in learned_ranges(model)}  # NaN before calibration
    named: dict[str, Tensor] = {n: tensor for n, tensor in model.named_parameters() if id(tensor) not in ranges}
    named |= {name: tensor for name, tensor in model.named_buffers() if ".running_" in f".{name}"}
    finite = torch.stack(torch._foreach_norm([tensor.detach() for tensor in named.values()], float("inf"))).isfinite()
    if not bool(finite.all()):
        name = list(named)[int((~finite).nonzero()[0])]
        raise UserError(
            f"{name} is not finite after the last step: training has diverged; lower --lr, and resume from the last "
            "checkpoint, which stays as it is."
        )


class DivergenceWatch:
    """Watches the losses of one epoch.

    Args:
        meter: the meter of the losses.
        loader: names the images.
        epoch: counted from 0.
        workspace: where the names of all images of a batch are written.
        world: the processes that train together. All call ``check`` after the same batch.
        scaled: whether a loss scale skips steps that overflow. Such losses then do no harm.
        locate: from the number of a batch to the part of the network where its values become non-finite, if known.
    """

    def __init__(
        self,
        meter: LossMeter,
        loader: Loader,
        epoch: int,
        workspace: Path,
        world: World,
        *,
        scaled: bool,
        locate: Callable[[int], str | None],
    ) -> None:
        self._meter = meter
        self._loader = loader
        self._epoch = epoch
        self._workspace = workspace
        self._world = world
        self._scaled = scaled
        self._locate = locate

    def check(self) -> None:
        """Wait for the device, and check that every loss so far is finite.

        Raises:
            UserError: one is not, and no loss scale has skipped its step.
            PeerLost: another process found such a loss first and reports it.
        """
        if self._scaled:
            return
        batch = self._meter.first_bad_batch()
        # the gradients spread it to all processes; the process that met it first knows the images
        urgency = 0 if batch is None else _NEVER - (batch * self._world.size + self._world.rank)
        if self._world.any(urgency) > urgency:
            raise PeerLost(f"process {self._world.rank} ends: the loss of another process is not finite")
        if batch is not None:
            place = self._locate(batch)
            met = f" (NaN or infinity first met in {place})" if place else ""
            raise UserError(
                f"the loss is not finite in epoch {self._epoch + 1}, batch {batch + 1}{met}: training has diverged, or one "
                f"of these images is to blame: {self._images(batch)}; lower --lr, and resume from the last checkpoint."
            )

    def report_skipped(self, skipped: int, steps: int) -> None:
        """Print which images made the loss overflow first, at the end of an epoch with a loss scale.

        Raises:
            UserError: every step was skipped.
        """
        batch = self._meter.first_bad_batch()
        if batch is not None:
            print(f"the loss of batch {batch + 1} overflowed, of {self._images(batch)}", flush=True)
        if 0 < steps == skipped:
            raise UserError(
                f"every step of epoch {self._epoch + 1} overflowed in float16; lower --static-loss-scale or --lr, or "
                "compute in --amp-dtype bf16."
            )

    def _images(self, batch: int) -> str:
        names = self._loader.names(self._epoch, batch)
        path = self._workspace / FILENAME
        replace_file(path, "".join(f"{name}\n" for name in names).encode())
        more = f" … (all {len(names)} are in {path})" if len(names) > _NAMES_SHOWN else ""
        return ", ".join(names[:_NAMES_SHOWN]) + more

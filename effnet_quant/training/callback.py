"""Callbacks: hooks into training."""

from __future__ import annotations

from torch import Tensor


class Callback:
    """Called when training reaches certain points. The methods do nothing unless overridden.

    All processes of a job call them. A run that resumes within an epoch calls ``on_epoch_start`` again. Its effect must
    therefore depend on the epoch alone.
    """

    def on_epoch_start(self, epoch: int) -> None:
        """The model is in training mode, and the first batch comes next. ``epoch`` counts from 0."""

    def on_step_end(self, step: int) -> None:
        """The optimizer has made ``step`` steps since training began."""

    def on_epoch_end(self, epoch: int) -> None:
        """The epoch's last step is done. Validation and checkpoint come next."""

    def on_divergence(self, images: Tensor) -> str | None:
        """The loss of these network inputs (N, 3, H, W) is not finite, and training ends.

        Only the process that found the loss calls this.

        Returns:
            The part of the network where the values become non-finite, if the callback knows it.
        """
        return None

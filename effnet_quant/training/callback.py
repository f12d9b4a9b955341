"""What can be hooked into training."""

from __future__ import annotations

from torch import Tensor


class Callback:
    """Told when a training reaches a point; each method does nothing unless overridden.

    All processes of a job call it. A run that resumes within an epoch starts that epoch again, so what a callback does
    there must depend on nothing but the epoch.
    """

    def on_epoch_start(self, epoch: int) -> None:
        """The model is in training mode, and the first batch is next. ``epoch`` counts from 0, as everywhere."""

    def on_step_end(self, step: int) -> None:
        """The optimizer has made ``step`` steps since the training began."""

    def on_epoch_end(self, epoch: int) -> None:
        """The epoch's last step is made; its validation and its checkpoint come next."""

    def on_divergence(self, images: Tensor) -> str | None:
        """The loss of these images, as the network takes them (N, 3, H, W), is not finite, and training ends. The process
        that found it calls this alone.

        Returns:
            What part of the network is to blame, if the callback knows.
        """
        return None

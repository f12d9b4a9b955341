"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, targets, images) to the batch's mean loss, a scalar.

logits are float32 (N, classes); targets are labels, int64 (N,), or shares of the classes, float32 (N, classes), where images
were mixed; images are the network's input, normalised (N, 3, H, W), for losses that ask another network too.
Called within the network's autocast.
"""


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Cross entropy with label smoothing (Szegedy et al., arXiv:1512.00567, section 7)."""

    def loss(logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    return loss

"""Mixed precision: autocast's type and the scale of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effnet_quant.training.choices import AMP_DTYPES

_DYNAMIC_GROWTH_INTERVAL = 100  # steps without overflow before a dynamic scale doubles, as in NVIDIA's scripts
_NEVER = 10**9


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a run.

    Attributes:
        device: where to compute.
        dtype: autocast's type; None for plain float32.
        scaler: scales the loss if ``dtype`` is float16, the only type whose gradients underflow; otherwise does nothing. A
            step that overflows is skipped and halves the scale.
    """

    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    def autocast(self) -> torch.autocast:
        """The context for the network's forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def choose_precision(
    device: torch.device, *, amp: bool, amp_dtype: str | None, loss_scale: float, dynamic: bool
) -> Precision:
    """Choose a run's precision from its settings.

    Args:
        device: where to compute.
        amp: whether to use mixed precision.
        amp_dtype: "fp16" or "bf16"; None for float16 on a GPU and bfloat16 on the CPU, which has no fast float16.
        loss_scale: the initial loss scale of float16.
        dynamic: whether the scale doubles after 100 steps without overflow.
    """
    dtype = None
    if amp:
        dtype = getattr(torch, AMP_DTYPES[amp_dtype or ("fp16" if device.type == "cuda" else "bf16")])
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=loss_scale,
        growth_interval=_DYNAMIC_GROWTH_INTERVAL if dynamic else _NEVER,
        enabled=dtype == torch.float16,
    )
    return Precision(device, dtype, scaler)

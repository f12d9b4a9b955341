"""Steps that several benchmarks time: inference or training with one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[], object]


def random_batch(batch_size: int, image_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float images (N, 3, H, W) in channels_last, and labels of 1000 classes."""
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, cross entropy, backward and a step of SGD; waits for the device."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(images.device)

    return step


def inference_step(model: nn.Module, images: Tensor) -> Step:
    """Forward without gradients; waits for the device."""

    def step() -> None:
        with torch.no_grad():
            model(images)
        wait(images.device)

    return step


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()

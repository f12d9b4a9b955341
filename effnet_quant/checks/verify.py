"""Does the engine do what the simulation said? Both on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effnet_quant.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """An engine beside its simulation.

    Attributes:
        images: how many were compared.
        engine_top1, simulation_top1: accuracies in percent.
        agreement: share of the images, in percent, to which both give the same class.
        logit_error: ||engine - simulation|| / ||simulation|| over all logits.
        mean_error, worst_error: mean and largest absolute difference of a logit.
        worst_image: position of the image with the largest difference.
    """

    images: int
    engine_top1: float
    simulation_top1: float
    agreement: float
    logit_error: float
    mean_error: float
    worst_error: float
    worst_image: int


@torch.no_grad()
def compare(
    engine: Callable[[NDArray[Any]], NDArray[np.float32]],
    simulation: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Comparison:
    """Run both on batches of images (N, C, H, W), normalised or whatever else both take, and labels (N,).

    Both give logits (N, classes) on the CPU; a network is to be in eval mode and is left as it is.

    Raises:
        UserError: there are no images.
    """
    engine_logits, simulation_logits, all_labels = [], [], []
    for images, labels in batches:
        engine_logits.append(torch.from_numpy(engine(images.numpy())))
        simulation_logits.append(simulation(images))
        all_labels.append(labels)
    if not all_labels:
        raise UserError("there are no images to compare the engine and its simulation on.")
    got, expected, truth = torch.cat(engine_logits), torch.cat(simulation_logits), torch.cat(all_labels)

    if got.shape != expected.shape:
        raise UserError(
            f"the engine has {got.shape[1]} classes and the model {expected.shape[1]}; give the weights that the engine "
            "was exported from."
        )
    difference = (got - expected).abs()

    def percent(hits: Tensor) -> float:
        return 100 * hits.double().mean().item()

    return Comparison(
        images=len(truth),
        engine_top1=percent(got.argmax(1) == truth),
        simulation_top1=percent(expected.argmax(1) == truth),
        agreement=percent(got.argmax(1) == expected.argmax(1)),
        logit_error=((got - expected).norm() / expected.norm()).item(),
        mean_error=difference.mean().item(),
        worst_error=difference.max().item(),
        worst_image=int(difference.amax(1).argmax()),
    )

"""What every step takes: a quantized model, batches, and a StepContext."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import Batch, device_of, model_arguments
from effnet_quant.quantization.placement.insertion import quantizers

GIB = 2**30


def _silent(title: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class StepContext:
    """The surroundings of a step. The default suits a call from Python.

    Attributes:
        seed: of everything random; the same seed gives the same bits on the same machine and number of threads.
        folder: where finished blocks and large activations are kept. None keeps nothing, and large activations go to the
            folder for temporary files.
        memory: bytes of activations held in memory; more go to files.
        progress: called with a title and how many of all parts are done.
    """

    seed: int = 0
    folder: Path | None = None
    memory: int = 4 * GIB
    progress: Callable[[str, int, int], None] = _silent


DEFAULT_CONTEXT = StepContext()


class Step(Protocol):
    """One step of PTQ. It changes ``model`` in place."""

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        """Change the model.

        Args:
            model: a model that ``quantize`` has been through. Each step says whether it needs ranges.
            batches: calibration examples, as ``calibrate`` takes them; read several times.
            context: seed, folder, memory and progress.
        """


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list that can be read several times.

    Raises:
        UserError: there are none, the model has no quantizers, or a batch holds NaN, infinity or nothing.
    """
    if not any(True for _ in quantizers(model)):
        raise UserError("the model has no quantizers; call quantize(model) first.")
    kept = list(batches)
    if not kept:
        raise UserError("there are no images to calibrate with.")
    for number, batch in enumerate(kept):
        arguments, examples = model_arguments(batch, torch.device("cpu"))
        floats = [value for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]
        if examples == 0 or not all(bool(torch.isfinite(value).all()) for value in floats):
            what = "no examples" if examples == 0 else "NaN or infinite values"
            raise UserError(f"batch {number} of the calibration images has {what}; check the images.")
    return kept


def batches_on(model: nn.Module, batches: Sequence[Batch]) -> Iterable[tuple[tuple, int]]:
    """The arguments and the number of examples of each batch, on the model's device."""
    device = device_of(model)
    return (model_arguments(batch, device) for batch in batches)

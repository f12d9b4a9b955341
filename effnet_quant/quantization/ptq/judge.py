"""Judges a step by the network's outputs for calibration images, and undoes a step that makes them worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effnet_quant.quantization.eager_evaluation import Batch, eager_pass
from effnet_quant.quantization.ptq.block_walk import relative_error
from effnet_quant.quantization.ptq.step import batches_on
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.structure import leaves

State = tuple[dict[str, Tensor], dict[TensorQuantizer, bool]]


class Judge:
    """Compares a model's outputs with those of the float network.

    Args:
        model: quantized, but without ranges yet: it computes what the float network does.
        batches: calibration examples.
        most_examples: examples to use; the first ones.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], most_examples: int) -> None:
        self._model = model
        self._batches: list[Batch] = []
        total = 0
        for batch, (_, examples) in zip(batches, batches_on(model, batches), strict=True):
            if total < most_examples:
                self._batches.append(batch)
            total += examples
        self._wanted = self._outputs()

    def error(self) -> float:
        """The mean of ``relative_error`` over the batches and outputs. It is 0 for the float network."""
        errors = [
            relative_error(given, wanted)
            for outputs, known in zip(self._outputs(), self._wanted, strict=True)
            for given, wanted in zip(outputs, known, strict=True)
        ]
        return sum(errors) / max(1, len(errors))

    def keeps(self, step: Callable[[], None], error: float) -> float:
        """Run ``step`` and undo it if the error is larger than ``error`` then.

        Returns:
            The error of the model as it is now, ``error`` if the step was undone.
        """
        before = saved(self._model)
        step()
        after = self.error()
        if after <= error:
            return after
        restore(self._model, before)
        return error

    def _outputs(self) -> list[list[Tensor]]:
        found = []
        with eager_pass(self._model):
            for arguments, _ in batches_on(self._model, self._batches):
                values = leaves(self._model(*arguments)).values()
                found.append([value.detach() for value in values if value.is_floating_point() and value.dim()])
        return found


def saved(model: nn.Module) -> State:
    """Copies of all that a step may change."""
    values = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    return values, {module: module.enabled for module in model.modules() if isinstance(module, TensorQuantizer)}


@torch.no_grad()
def restore(model: nn.Module, state: State) -> None:
    """Bring back what ``saved`` copied."""
    values, enabled = state
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        value.copy_(values[name])
    for quantizer, was_enabled in enabled.items():
        quantizer.enabled = was_enabled

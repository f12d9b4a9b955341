"""Runs a model eagerly in eval mode, for calibration and inspection, and turns batches into its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError

Batch = Tensor | tuple[Any, ...]  # the model's only argument, or a tuple of all its arguments


@contextmanager
def eager_pass(model: nn.Module) -> Iterator[None]:
    """Within the block the model runs in eval mode, eagerly and without gradients. Then every module has its old mode.

    Eagerly, because a pass sets and removes observers, and each change would compile a compiled model again.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def model_arguments(batch: Batch, device: torch.device) -> tuple[tuple[Any, ...], int]:
    """The model's arguments in a batch, and the number of examples.

    Args:
        batch: a tensor of shape (N, …), or a tuple of all the model's arguments. Tensors may stand in lists, tuples and
            dicts; the first one has shape (N, …).
        device: the device that the tensors are moved to.

    Returns:
        The arguments, for ``model(*arguments)``, and N.

    Raises:
        UserError: the batch has another form.
    """
    arguments = batch if isinstance(batch, tuple) else (batch,)
    first = next(_tensors(arguments), None)
    if not isinstance(batch, (Tensor, tuple)) or first is None or first.dim() == 0:
        raise UserError(
            f"a batch must be a tensor (N, …) or a tuple of the model's arguments, not {_described(batch)}; of a loader's "
            "[images, labels] pass the images alone."
        )
    return tuple(_moved(argument, device) for argument in arguments), len(first)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a named tuple
    return value


def _described(batch: object) -> str:
    if isinstance(batch, tuple):
        return "a tuple without such a tensor"
    return "a single number" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"

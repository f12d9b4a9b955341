"""From what a PyTorch user has (a DataLoader, arrays, dicts, a function) to runs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from effnet_quant.errors import UserError
from effnet_quant.quantization.eager_evaluation import device_of, model_arguments

Data = Iterable[Any] | Callable[[nn.Module], object]
"""Batches, such as a DataLoader, or a function that takes the model and runs it on its own data."""

Key = str | Sequence[str] | None
"""The entries of dict batches that hold the model's arguments; None: the entries named like the arguments of forward."""


def run_on(model: nn.Module, data: Data, *, key: Key = None, progress: Callable[[int], None] | None = None) -> int:
    """Run ``model`` once on all of ``data``; mode and gradients are the caller's (``eager_pass``).

    Args:
        model: any model.
        data: batches as ``argument_batches`` takes them, or a function that calls ``model`` on batches of its own.
        key: see ``Key``.
        progress: called with the number of examples after each batch.

    Returns:
        The number of examples.

    Raises:
        UserError: as ``argument_batches``, the function takes no model, or the model can't run a batch.
    """
    if callable(data) and not isinstance(data, Iterable):
        return _run_function(model, data, progress)
    total = 0
    for number, (arguments, examples) in enumerate(argument_batches(model, data, key), 1):
        try:
            model(*arguments)
        except UserError:
            raise
        except Exception as error:  # whatever the model's own code raises
            if "DataLoader worker" in str(error):  # a worker's death, which torch raises wherever the main thread is
                raise
            raise UserError(f"the model can't run batch {number}: {_explained(arguments, error)}.") from error
        total += examples
        if progress is not None:
            progress(examples)
    return total


def argument_batches(model: nn.Module, data: Iterable[Any], key: Key = None) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield the model's arguments, on the model's device, and the number of examples of each batch.

    A batch may be:

    - a tensor or a NumPy array (N, …), the model's only argument; float64 arrays become float32;
    - a tuple of all the model's arguments;
    - a list or tuple that begins with the model's arguments, as a DataLoader's ``[images, labels]``; the rest is left out;
    - a dict with entries named by ``key``, or named like the arguments of forward.

    Raises:
        UserError: ``data`` or a batch has another form, or a batch holds NaN.
    """
    _check_data(data)
    device, taken = device_of(model), _Parameters(model)
    for number, batch in enumerate(data, 1):
        chosen = taken.from_mapping(batch, key) if isinstance(batch, Mapping) else batch
        if key is not None and chosen is batch:
            raise UserError(
                f"key={key!r} chooses among the entries of a dict, and batch {number} is none; leave it out."
            )
        if isinstance(chosen, (list, tuple)):
            chosen = taken.from_sequence(chosen)
        arguments, examples = model_arguments(_as_tensors(chosen), device)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.is_floating_point() and bool(argument.isnan().any()):
                raise UserError(f"batch {number} holds NaN; check the images and how they are normalised.")
        yield arguments, examples


def _check_data(data: Any) -> None:
    """Raises UserError if ``data`` is no iterable of batches."""
    if isinstance(data, (Tensor, np.ndarray)):
        raise UserError(
            "the data is one tensor, not batches; give a list of batches, e.g. images.split(32) or [images]."
        )
    if isinstance(data, Mapping):
        raise UserError("the data is one dict, not batches; give a list of such dicts, or a DataLoader.")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise UserError("the data is a Dataset, whose items are no batches; give DataLoader(dataset, batch_size=32).")
    if callable(data) and not isinstance(data, Iterable):
        raise UserError("the data is a function; give the batches that it makes, e.g. its result.")
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise UserError(
            f"the data is a {type(data).__name__}; give batches, such as a DataLoader or a list of tensors."
        )


class _Parameters:
    """The arguments that a model's forward takes by position."""

    def __init__(self, model: nn.Module) -> None:
        while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
            model = inner  # of torch.compile, or of DistributedDataParallel
        own = inspect.signature(model.forward).parameters.values()
        self._open = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own)
        self._own = [one for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        self._needed = sum(parameter.default is parameter.empty for parameter in self._own)

    def from_sequence(self, batch: Sequence[Any]) -> tuple[Any, ...]:
        """The model's arguments at the start of ``batch``. A tuple that the model can take as a whole is taken so."""
        if len(batch) < self._needed:
            names = ", ".join(parameter.name for parameter in self._own[: self._needed])
            raise UserError(f"the model takes {names}, but a batch has {len(batch)} entries; give one for each.")
        if isinstance(batch, tuple) and (self._open or len(batch) <= len(self._own)):
            return batch
        return tuple(batch[: max(self._needed, 1)])

    def from_mapping(self, batch: Mapping[str, Any], key: Key) -> tuple[Any, ...]:
        """The model's arguments in a dict."""
        held = ", ".join(map(str, batch))
        if key is not None:
            keys = (key,) if isinstance(key, str) else tuple(key)
            if missing := [name for name in keys if name not in batch]:
                raise UserError(f"a batch has no entry '{missing[0]}'; it has {held}.")
            return tuple(batch[name] for name in keys)
        missing = [parameter.name for parameter in self._own[: self._needed] if parameter.name not in batch]
        named = [parameter.name in batch for parameter in self._own]
        if missing or not any(named):
            wanted = f"the model's argument {missing[0]}" if missing else "the model's arguments"
            raise UserError(f"a batch is a dict with {held}; name the entry for {wanted} with key=, e.g. key='image'.")
        last = len(named) - named[::-1].index(True)
        return tuple(batch.get(parameter.name, parameter.default) for parameter in self._own[:last])


def _as_tensors(value: Any) -> Any:
    """``value`` with tensors in place of its arrays, one level deep."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float64 else value)
    return tuple(map(_as_tensors, value)) if isinstance(value, tuple) else value


def _run_function(model: nn.Module, function: Callable[..., object], progress: Callable[[int], None] | None) -> int:
    if inspect.isgeneratorfunction(function):
        raise UserError(f"{function.__name__} makes batches when it is called; give {function.__name__}().")
    try:
        inspect.signature(function).bind(model)
    except TypeError as error:
        raise UserError("a function must take the model and run it on data, as in: def loop(model): …") from error
    except ValueError:  # of a built-in function nothing is known
        pass
    total = 0

    def count(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal total
        tensors = (value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim)
        examples = len(next(tensors, torch.zeros(1)))
        total += examples
        if progress is not None:
            progress(examples)

    handle = model.register_forward_hook(count, with_kwargs=True)
    try:
        function(model)
    finally:
        handle.remove()
    return total


def _explained(arguments: tuple[Any, ...], error: Exception) -> str:
    """What the model got, why it failed, and what may help."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    given = next((argument for argument in arguments if isinstance(argument, Tensor)), None)
    if given is None:
        return f"{reason}; give what its forward takes"
    what = f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
    if given.dtype is torch.uint8:
        return f"it is {what}; give normalised float32 images, e.g. (images.float() / 255 - mean) / std"
    if given.dtype is torch.float64:
        return f"it is {what}; give float32, e.g. images.float()"
    return f"it is {what}, and {reason}; give what the model's forward takes"

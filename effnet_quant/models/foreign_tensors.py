"""Checks the tensors of a file of unknown origin, before anything computes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_quant.errors import UserError

RANGE_SUFFIXES = ("_quantizer._amax", "_quantizer._amin")  # NaN in a network that is not calibrated


def _is_plain(name: str, tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"


def _is_stored(name: str, tensor: Tensor) -> bool:
    # a tensor expanded from one number takes no room in a file, and any amount of memory later
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_finite(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    values = _computable(tensor)
    broken = torch.isinf(values) if name.endswith(RANGE_SUFFIXES) else ~torch.isfinite(values)
    return not bool(broken.any())


def _computable(tensor: Tensor) -> Tensor:
    """The values in a type that has all operations; float8 lacks most."""
    return tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()


def _is_possible(name: str, tensor: Tensor) -> bool:
    return not name.endswith("running_var") or not bool((_computable(tensor) < 0).any())


# what every tensor of a file must be, in the order of the checks: the rule, and what is wrong otherwise
_RULES: tuple[tuple[Callable[[str, Tensor], bool], str], ...] = (
    (_is_plain, "is sparse, quantized or without values"),
    (lambda name, tensor: not tensor.is_complex(), "holds complex numbers"),
    (lambda name, tensor: tensor.numel() > 0, "holds no numbers"),
    (_is_stored, "repeats a few numbers to fill a large shape"),
    (_is_finite, "holds NaN or infinity"),
    (_is_possible, "holds a negative variance"),
)


def check_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict ``content``, if it is one.

    Raises:
        UserError: it is no mapping from names to tensors, or a tensor is nothing that a network computes with. The
            sentence names ``source``.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{source} holds no weights: expected a state_dict of tensors or a checkpoint with one.")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise UserError(f"{source} holds no weights: the name of a tensor is {name!r:.40}, which is no text.")
        for holds, wrong in _RULES:
            if not holds(name, tensor):
                raise UserError(f"{source} can't be used: {name} {wrong}; get it again, or save it as plain numbers.")
    return dict(content)

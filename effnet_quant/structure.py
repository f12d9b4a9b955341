"""What networks take and give: a tensor, or tuples, lists and dicts of tensors, nested as they like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves(structure: Any) -> dict[str, Any]:
    """The tensors of a structure by their path: "" for a tensor alone, "boxes", "0" or "boxes.0" within others."""
    if isinstance(structure, dict):
        parts = {str(key): value for key, value in structure.items()}
    elif isinstance(structure, tuple | list):
        parts = {str(position): value for position, value in enumerate(structure)}
    else:
        return {"": structure}
    return {
        f"{name}.{path}" if path else name: leaf for name, part in parts.items() for path, leaf in leaves(part).items()
    }


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """The same structure with ``function`` of every tensor in the tensor's place; a named tuple becomes a plain one."""
    if isinstance(structure, dict):
        return {key: map_leaves(function, value) for key, value in structure.items()}
    if isinstance(structure, tuple):
        return tuple(map_leaves(function, value) for value in structure)
    if isinstance(structure, list):
        return [map_leaves(function, value) for value in structure]
    return function(structure)


def in_float32(structure: Any) -> Any:
    """The same structure with what is in half precision, or double, in float32; integers stay."""
    return map_leaves(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, structure)

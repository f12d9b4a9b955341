"""Structures of tensors, a network's inputs and outputs: a tensor, or nested tuples, lists and dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves(structure: Any) -> dict[str, Any]:
    """The tensors of a structure by path: "" for a single tensor, else keys and indices, e.g. "boxes", "0" or "boxes.0"."""
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
    """The same structure with ``function(tensor)`` in the place of every tensor. A named tuple becomes a plain tuple."""
    if isinstance(structure, dict):
        return {key: map_leaves(function, value) for key, value in structure.items()}
    if isinstance(structure, tuple):
        return tuple(map_leaves(function, value) for value in structure)
    if isinstance(structure, list):
        return [map_leaves(function, value) for value in structure]
    return function(structure)


def in_float32(structure: Any) -> Any:
    """The same structure with all floating-point tensors in float32; other tensors stay."""
    return map_leaves(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, structure)

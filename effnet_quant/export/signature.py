"""The signature of a file: names, types and shapes of inputs and outputs, and the structure of the return value."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from effnet_quant.errors import UserError
from effnet_quant.export.traced_graph import TracedGraph, shape_of


def input_names(model: nn.Module, count: int) -> list[str]:
    """The names of a model's first ``count`` arguments.

    Raises:
        UserError: its forward takes fewer, or has arguments beyond them that need a value.
    """
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if len(names) < count:
                names.append(name)
            elif parameter.default is parameter.empty:
                raise UserError(f"the model needs a value for {name}; give an example of each argument in inputs.")
    if len(names) < count:
        raise UserError(
            f"the model takes {len(names)} inputs, not {count}; give an example of each argument in inputs."
        )
    return names


def output_names(traced: TracedGraph, known: tuple[str, ...]) -> list[str]:
    """The names of the outputs.

    A single 2-D result has the one ``known`` name, if there is one. Entries of a dict have their keys as names. All
    others are "output_0", "output_1" and so on.

    Raises:
        UserError: the model returns something else than tensors, tuples, lists and dicts with strings as keys.
    """
    first = traced.outputs[0].meta["val"] if traced.outputs else None
    single = traced.structure == 0 and first is not None and first.ndim == 2 and first.is_floating_point()
    if single and len(known) == 1:
        return list(known)
    names: dict[int, str] = {}
    for position, path in _leaves(traced.structure, ()):
        keys = [str(step) for step in path]
        names[position] = "_".join(keys if path and isinstance(path[0], str) else ["output", *(keys or ["0"])])
    if len(set(names.values())) < len(names):
        return [f"output_{position}" for position in range(len(names))]
    return [names[position] for position in range(len(names))]


def _leaves(structure: Any, path: tuple[int | str, ...]) -> Iterator[tuple[int, tuple[int | str, ...]]]:
    """Each output's position, with the keys and indices that lead to it."""
    if isinstance(structure, int):
        yield structure, path
    elif isinstance(structure, dict) and all(isinstance(key, str) for key in structure):
        for key, value in structure.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(structure, (tuple, list)):
        for index, value in enumerate(structure):
            yield from _leaves(value, (*path, index))
    else:
        raise UserError(
            f"the model returns a {type(structure).__name__}; return tensors, or tuples, lists or dicts of them with "
            "strings as keys."
        )


def structure_to_json(structure: Any) -> Any:
    """Plain values for a structure of outputs' positions, as engines/signature.py reads them."""
    if isinstance(structure, int):
        return structure
    if isinstance(structure, dict):
        return {"dict": {key: structure_to_json(value) for key, value in structure.items()}}
    return {"tuple" if isinstance(structure, tuple) else "list": [structure_to_json(value) for value in structure]}


def value_infos(nodes: list[fx.Node], names: list[str], symbols: dict[Any, str]) -> list[onnx.ValueInfoProto]:
    """Descriptions of inputs or outputs; dimensions that may vary have names, which ``symbols`` holds by what they are."""
    infos = []
    for node, name in zip(nodes, names, strict=True):
        shape: list[int | str | None] = []
        for axis, size in enumerate(shape_of(node)):
            if isinstance(size, torch.SymInt):
                default = "batch" if axis == 0 and "batch" not in symbols.values() else f"{name}_{axis}"
                shape.append(symbols.setdefault(size.node.expr, default))
            else:
                shape.append(int(size))
        infos.append(helper.make_tensor_value_info(name, _element_type(node.meta["val"], name), shape))
    return infos


def dimension_names(nodes: list[fx.Node], inputs: list[onnx.ValueInfoProto]) -> dict[Any, str]:
    """The names of the inputs' open dimensions, by what torch.export calls them."""
    return {
        size.node.expr: dimension.dim_param
        for node, value in zip(nodes, inputs, strict=True)
        for size, dimension in zip(shape_of(node), value.type.tensor_type.shape.dim, strict=True)
        if isinstance(size, torch.SymInt)
    }


def _element_type(value: Tensor, name: str) -> int:
    kind = "FLOAT" if value.is_floating_point() else str(value.dtype).removeprefix("torch.").upper()
    if kind not in dict(TensorProto.DataType.items()):
        raise UserError(f"{name} is of type {value.dtype}, which ONNX does not have; use another type.")
    return int(TensorProto.DataType.Value(kind))


def signature(model: onnx.ModelProto, structure: Any) -> dict[str, Any]:
    """The JSON value of the metadata entry ``SIGNATURE_KEY``."""
    return {
        "inputs": [
            {"name": value.name, "dtype": _dtype(value), "shape": [size.dim_value or None for size in _shape(value)]}
            for value in model.graph.input
        ],
        "outputs": [{"name": value.name, "dtype": _dtype(value)} for value in model.graph.output],
        "structure": structure_to_json(structure),
    }


def _shape(value: onnx.ValueInfoProto) -> list[Any]:
    return list(value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))

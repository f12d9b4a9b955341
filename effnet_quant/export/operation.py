"""Operation: a traced operation with what is needed to write it as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from effnet_quant.errors import UserError
from effnet_quant.export.graph_writer import GraphWriter
from effnet_quant.export.traced_graph import argument, shape_of


@dataclass
class Operation:
    """A traced operation with what is needed to write it as ONNX.

    Attributes:
        writer: the graph under construction.
        node: the traced node.
        tensor: returns the ONNX name of a traced value. A Python number becomes a constant of the type of ``like``.
        path: dotted name of the module it belongs to.
    """

    writer: GraphWriter
    node: fx.Node
    tensor: Callable[..., str]
    path: str

    def __getitem__(self, name: str) -> Any:
        """The argument of that name in the operation's schema, or its default."""
        return argument(self.node, name)

    @property
    def x(self) -> str:
        """The ONNX name of the first argument."""
        return self.tensor(self.node.args[0])

    def integers(self, name: str, values: list[int]) -> str:
        """A constant of int64 numbers (axes, sizes)."""
        return self.writer.constant(f"{self.path}.{name}", np.array(values, np.int64))

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Write a node and return its output's name."""
        return self.writer.node(op_type, list(inputs), self.path, **attributes)

    def sizes(self, value: Any, *axes: int) -> list[int]:
        """Sizes of a traced value along ``axes`` (default: all), which must be fixed numbers.

        Raises:
            UserError: one of them varies with the images.
        """
        shape = shape_of(value)
        chosen = [shape[axis] for axis in axes] if axes else shape
        if not all(isinstance(size, int) for size in chosen):
            raise self.refuse("needs sizes that are known when the file is written; export it without a dynamic size")
        return [int(size) for size in chosen]

    def refuse(self, why: str) -> UserError:
        """The error for an operation that can't be written; ``why`` completes the sentence after its name."""
        return UserError(f"{self.path or 'the model'}: {self.node.target} {why}.")


Emit = Callable[[Operation], "str | list[str]"]


def pair(value: Any) -> list[int]:
    """Height and width, from one number or two."""
    values = [value] if isinstance(value, int) else list(value)
    return (values * 2)[:2]


def rank(value: Any) -> int:
    """Number of dimensions of a traced value."""
    return len(shape_of(value))

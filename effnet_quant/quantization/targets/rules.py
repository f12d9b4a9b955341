"""The vocabulary in which a runtime's wishes are written down."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

from effnet_quant.errors import UserError

# stem: the convolution that takes the image; linear: the classifier, and squeeze-and-excitation's layers where they are
# linear; silu: the gates of SiLU and hard-swish, in x * gate(x); the others as they are called
OPERATIONS = ("stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat", "silu")


@dataclass(frozen=True)
class Target:
    """What a runtime wants of the graph it is given.

    Attributes:
        name: as on the command line.
        activation_dtype: "int8" (zero point 0) or "uint8" (zero point 128): two encodings of the same symmetric grid.
        unsigned: whether activations that are never negative, behind a ReLU, take the grid 0 … 255 (uint8 with zero point 0)
            over the same range.
        quantized: the OPERATIONS that compute with integers: their inputs carry QDQ, and the weights of convolutions and
            linear layers are int8. For "silu", the gate carries QDQ where its input does. The others stay in float.
        quantized_outputs: whether a quantized convolution needs QDQ on its output too, to run as an integer kernel.
        quantized_bias: whether biases are written as int32 with scale s_input * s_weight, or stay float.
        pools_integers: whether QDQ behind max pooling goes in front of it, which changes no value. (A runtime that wants
            ``quantized_outputs`` does so anyway, as behind ReLU.)
    """

    name: str
    activation_dtype: str
    unsigned: bool
    quantized: frozenset[str]
    quantized_outputs: bool
    quantized_bias: bool
    pools_integers: bool

    def leaving_in_float(self, operations: Iterable[str]) -> Target:
        """The same target with these operations in float.

        Raises:
            UserError: there is no such operation.
        """
        left = frozenset(operations)
        if unknown := left - set(OPERATIONS):
            raise UserError(f"there is no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}.")
        return replace(self, quantized=self.quantized - left)


class FollowsTarget:
    """What a module is if its computation depends on the engine that it simulates."""

    @abstractmethod
    def follow(self, target: Target) -> None:
        """Compute as the engine of ``target`` does from now on."""

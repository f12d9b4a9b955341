"""Target: the fields that describe what a runtime wants of a quantized graph."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

from effnet_quant.errors import UserError

# stem: the convolution that takes the image.
# linear: the classifier, and the layers of squeeze-and-excitation where they are linear.
# silu: the gates of SiLU and hard-swish, in x * gate(x).
OPERATIONS = ("stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat", "silu")


@dataclass(frozen=True)
class Target:
    """What a runtime wants of a quantized graph.

    Attributes:
        name: as on the command line.
        activation_dtype: "int8" (zero point 0) or "uint8" (zero point 128): two encodings of the same symmetric grid.
        wide_activation_dtype: the same for grids of more than 8 bits, "int16" or "uint16". None if it takes none.
        clips_wide: whether the export clips floats in front of such grids, because the runtime may leave out the rounding.
        int4_weights: whether files store weights of 4 bits and fewer as INT4, with a Cast to int8 behind them.
        unsigned: whether activations that are never negative (as after a ReLU) take the grid 0 … 255 over the same range:
            uint8 with zero point 0.
        quantized: the OPERATIONS that compute with integers; the others stay in float. Inputs of these operations carry
            QDQ, and the weights of convolutions and linear layers are int8. For "silu", the gate carries QDQ if its input
            does.
        quantized_outputs: whether a convolution needs QDQ on its output too, to run as an integer kernel.
        quantized_bias: whether biases are written as int32 with scale s_input * s_weight; else they stay float.
        pools_integers: whether max pooling runs on integers. The export then moves QDQ from after the pooling to before
            it; the values are the same. With ``quantized_outputs`` the export does so in any case.
        suffix: of the files that the runtime reads: ".onnx" (``export_onnx``) or ".pte" (``export_executorch``).
        half_floats: whether a quantized network computes in float16 what is not integer, unless told otherwise.
        halves_up: whether activations halfway between two integers are rounded up; else to the even one.
    """

    name: str
    activation_dtype: str
    wide_activation_dtype: str | None
    clips_wide: bool
    int4_weights: bool
    unsigned: bool
    quantized: frozenset[str]
    quantized_outputs: bool
    quantized_bias: bool
    pools_integers: bool
    suffix: str = ".onnx"
    half_floats: bool = False
    halves_up: bool = False

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
    """Base class of modules whose computation depends on the simulated engine."""

    @abstractmethod
    def follow(self, target: Target) -> None:
        """From now on compute as the engine of ``target`` does."""

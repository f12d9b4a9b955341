"""The vocabulary in which a runtime's wishes are written down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a runtime wants of the graph it is given.

    Attributes:
        name: as on the command line.
        activation_dtype: "int8" (zero point 0) or "uint8" (zero point 128): two encodings of the same symmetric grid.
        quantized_inputs: operations whose inputs carry QDQ where the model has quantizers there, out of "conv", "linear",
            "pool", "mul", "add" and "concat"; others stay in float.
        quantized_outputs: whether a convolution needs QDQ on its output too, to run as an integer kernel.
        quantized_bias: whether biases are written as int32 with scale s_input * s_weight, or stay float.
    """

    name: str
    activation_dtype: str
    quantized_inputs: frozenset[str]
    quantized_outputs: bool
    quantized_bias: bool

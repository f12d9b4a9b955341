"""Integer-only inference, for any machine. docs/integer.md has the rules.

Every operation computes on integers, so everything is quantized, outputs of convolutions too. Activations are uint8. An
activation such as SiLU is one table from 256 integers to 256 integers, so its gate is not rounded by itself ("silu" is left
out). Halves round up. Biases are int32.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="integer",
    activation_dtype="uint8",
    wide_activation_dtype=None,
    clips_wide=False,
    int4_weights=False,
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=True,
    quantized_bias=True,
    pools_integers=True,
    halves_up=True,
)

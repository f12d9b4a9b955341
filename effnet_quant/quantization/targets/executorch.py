"""ExecuTorch with XNNPACK, on CPUs of phones, Arm boards and x86.

XNNPACK's quantized convolution takes int8 inputs, int8 weights with a scale per channel and an int32 bias, and writes int8.
So every convolution gets QDQ on its output too. Additions, products, concatenations and means run on int8 as well.
XnnpackPartitioner of ExecuTorch 1.5 takes no sigmoid and no hard-swish on integers, so gates stay in float.

The grids are those of uint8, written 128 lower: zero point 0 for symmetric ones, -128 where no value is negative. A layer
whose result is wanted in float, as a classifier's, computes in float with its rounded weights, because the partitioner takes
integers on both sides only.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="executorch",
    activation_dtype="uint8",
    wide_activation_dtype=None,
    clips_wide=False,
    int4_weights=False,
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=True,
    quantized_bias=True,
    pools_integers=True,
    suffix=".pte",
)

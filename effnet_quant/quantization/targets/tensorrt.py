"""TensorRT: int8 with zero point 0 everywhere, float biases.

It fuses the activation, the residual addition and the next quantizer into the convolution. This is NVIDIA's placement, with
which the quantized models are built.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="tensorrt",
    activation_dtype="int8",
    unsigned=False,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=False,
    quantized_bias=False,
    pools_integers=False,
)

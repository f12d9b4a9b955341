"""TensorRT: int8 with zero point 0 everywhere, float biases.

It fuses the activation, the residual addition and the next quantizer into the convolution. This is NVIDIA's placement, with
which the quantized models are built.

NVIDIA's documentation ("Working with Quantized Types") lists INT4 for the weights of matrix products between floats only,
and no 16-bit integers. So weights are stored as int8, and 16-bit activations are refused. No TensorRT was there to try.

A strongly typed network computes each layer in the file's type. Float operations are written in float16, because float32
ones can make an INT8 engine slower than a float16 engine (ultralytics issue 26167).
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="tensorrt",
    activation_dtype="int8",
    wide_activation_dtype=None,
    clips_wide=False,
    int4_weights=False,
    unsigned=False,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=False,
    quantized_bias=False,
    pools_integers=False,
    half_floats=True,
)

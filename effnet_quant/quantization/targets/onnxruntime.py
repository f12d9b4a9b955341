"""ONNX Runtime, CPU execution provider.

QLinearConv is the only integer convolution its optimizer makes: input, weights, int32 bias and output all quantized, so
every convolution gets QDQ on its output too. Its uint8-activation kernels are the fast ones; int8 activations measured
five times slower than FP32 (see docs/deployment.md). Everything else has an integer kernel too, and each value that goes
back to float costs two more passes, so all is quantized; the sigmoid of SiLU becomes a table (QLinearSigmoid), the gate of
hard-swish a sum (QLinearAdd).
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="onnxruntime",
    activation_dtype="uint8",
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat", "silu"}),
    quantized_outputs=True,
    quantized_bias=True,
    pools_integers=True,
)

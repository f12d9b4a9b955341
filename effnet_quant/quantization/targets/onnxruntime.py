"""ONNX Runtime, CPU execution provider.

QLinearConv is the only integer convolution its optimizer makes: input, weights, int32 bias and output all quantized, so
every convolution gets QDQ on its output too. Its uint8-activation kernels are the fast ones; int8 activations measured
five times slower than FP32 (see docs/deployment.md).
"""

from effnet_quant.quantization.targets.rules import Target

ONNXRUNTIME = Target(
    name="onnxruntime",
    activation_dtype="uint8",
    quantized_inputs=frozenset({"conv", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=True,
    quantized_bias=True,
)

"""ONNX Runtime, CPU execution provider.

The only integer convolution that its optimizer makes is QLinearConv, with quantized input, weights, bias (int32) and output.
So every convolution gets QDQ on its output too. Kernels with uint8 activations are the fast ones: int8 activations measured
five times slower than FP32 (see docs/deployment.md). All other operations have integer kernels too. A value that goes back
to float costs two more passes, so every operation is quantized. The sigmoid of SiLU becomes a table (QLinearSigmoid), the
gate of hard-swish a sum (QLinearAdd).
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

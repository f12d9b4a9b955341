"""ONNX Runtime, CPU execution provider.

The only integer convolution that its optimizer makes is QLinearConv, with quantized input, weights, bias (int32) and output.
So every convolution gets QDQ on its output too. Kernels with uint8 activations are the fast ones: int8 activations measured
five times slower than FP32 (see docs/deployment.md). All other operations have integer kernels too. A value that goes back
to float costs two more passes, so every operation is quantized. The sigmoid of SiLU becomes a table (QLinearSigmoid), the
gate of hard-swish a sum (QLinearAdd).

Its integer kernels take no INT4 weights: behind a DequantizeLinear of INT4 a convolution or linear layer runs in float, four
to five times slower (ONNX Runtime 1.20 to 1.32). A Cast from INT4 to int8 is computed once, when the session starts. The
layer behind it is QLinearConv, QGemm or QLinearMatMul, as fast as from int8. The Cast needs ONNX Runtime 1.23.

16-bit activations have QuantizeLinear and DequantizeLinear, but no integer kernels. A layer between them computes in float.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="onnxruntime",
    activation_dtype="uint8",
    wide_activation_dtype="uint16",
    clips_wide=False,
    int4_weights=True,
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "pool", "mul", "add", "concat", "silu"}),
    quantized_outputs=True,
    quantized_bias=True,
    pools_integers=True,
)

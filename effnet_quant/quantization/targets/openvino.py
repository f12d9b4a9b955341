"""OpenVINO, CPU plugin (oneDNN).

Its integer convolution takes quantized inputs and weights and fuses a float bias, the activation and the next quantizer
behind it (Swish and the residual addition too), so outputs need no ranges of their own. Squeeze-and-excitation's means and
products stay in float: integers there cost a reorder each and save nothing.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="openvino",
    activation_dtype="uint8",
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "add", "concat"}),
    quantized_outputs=False,
    quantized_bias=False,
    pools_integers=True,
)

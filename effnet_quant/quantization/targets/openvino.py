"""OpenVINO, CPU plugin (oneDNN).

Its integer convolution takes quantized inputs and weights. It fuses a float bias, the activation (Swish too), the residual
addition and the next quantizer, so outputs need no ranges of their own. The means and products of squeeze-and-excitation
stay in float: integers there cost a reorder each and save nothing.
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

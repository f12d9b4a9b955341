"""OpenVINO, CPU plugin (oneDNN).

Its integer convolution takes quantized inputs and weights and fuses a float bias, the activation and the next quantizer
behind it, so outputs need no ranges of their own.
"""

from effnet_quant.quantization.targets.rules import Target

OPENVINO = Target(
    name="openvino",
    activation_dtype="uint8",
    quantized_inputs=frozenset({"conv", "linear", "pool", "mul", "add", "concat"}),
    quantized_outputs=False,
    quantized_bias=False,
)

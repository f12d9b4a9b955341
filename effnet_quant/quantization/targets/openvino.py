"""OpenVINO, CPU plugin (oneDNN).

Its integer convolution takes quantized inputs and weights. It fuses a float bias, the activation (Swish too), the residual
addition and the next quantizer, so outputs need no ranges of their own. The means and products of squeeze-and-excitation
stay in float: integers there cost a reorder each and save nothing.

Behind a DequantizeLinear of INT4 weights convolutions and linear layers run in float. Behind a Cast from INT4 to int8, which
is computed once, they run on integers (OpenVINO 2025.0 and 2026.4).

OpenVINO 2026.4 leaves out pairs of QuantizeLinear and DequantizeLinear of 16 bits, saturation included; 2025.0 doesn't.
So the export writes the saturation as a Clip in front (passes/float_clipping.py). Layers between them compute in float.
"""

from effnet_quant.quantization.targets.rules import Target

TARGET = Target(
    name="openvino",
    activation_dtype="uint8",
    wide_activation_dtype="uint16",
    clips_wide=True,
    int4_weights=True,
    unsigned=True,
    quantized=frozenset({"stem", "conv", "depthwise", "linear", "add", "concat"}),
    quantized_outputs=False,
    quantized_bias=False,
    pools_integers=True,
)

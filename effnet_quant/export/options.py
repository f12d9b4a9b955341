"""ExportOptions: in which form a model is written."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError

# 17 brought LayerNormalization; up to 21 every form that the exporter writes has been run.
OPSETS = range(17, 22)
# from here on QuantizeLinear and DequantizeLinear take and give float16
HALF_QDQ_OPSET = 19


@dataclass(frozen=True)
class ExportOptions:
    """The form of an ONNX file; what the network computes is the model's affair and the target's.

    Attributes:
        opset: version of ONNX's operators, 17 to 21; None for the lowest that the other choices need.
        dynamic_size: height and width of the images stay open, as the batch does.
        fp16: what is not integer is computed in float16; input and logits stay float32, with Casts behind and before them.
        normalisation: the graph takes the pixels, uint8 (N, C, H, W), and normalises them itself (in float32) with these
            mean and std; None for normalised float32 images.
        float_weights: weights are stored as float32 with a QuantizeLinear behind them, instead of as int8.

    Raises:
        UserError: an opset that is not supported.
    """

    opset: int | None = None
    dynamic_size: bool = False
    fp16: bool = False
    normalisation: InputSpec | None = None
    float_weights: bool = False

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in OPSETS:
            raise UserError(f"opset {self.opset} can't be written; choose one from {OPSETS[0]} to {OPSETS[-1]}.")

    def opset_for(self, quantized: bool) -> int:
        """The opset to write.

        Raises:
            UserError: the chosen one has no words for a quantized network in float16.
        """
        lowest = HALF_QDQ_OPSET if self.fp16 and quantized else OPSETS[0]
        if self.opset is not None and self.opset < lowest:
            raise UserError(
                f"opset {self.opset} has no float16 around quantized values; choose {lowest} or higher, or leave fp16 out."
            )
        return self.opset or lowest

"""ExportOptions: the form of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError

# LayerNormalization needs 17. Every form that the exporter writes has been run up to 21.
OPSETS = range(17, 22)
# the first opset whose QuantizeLinear and DequantizeLinear support float16
HALF_QDQ_OPSET = 19


@dataclass(frozen=True)
class ExportOptions:
    """The form of an ONNX file.

    Attributes:
        opset: version of ONNX's operators, 17 to 21; None for the lowest that the other choices need.
        dynamic_size: height and width of the images stay open, as the batch does.
        fp16: everything that is not integer is computed in float16. Inputs and outputs stay float32 and are cast.
        normalisation: the graph takes uint8 pixels (N, C, H, W) and normalises them in float32 with this mean and std. None
            for normalised float32 images.
        float_weights: quantized weights are stored as float32 with a QuantizeLinear behind them, instead of as int8.

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
            UserError: the chosen opset does not support quantized networks in float16.
        """
        lowest = HALF_QDQ_OPSET if self.fp16 and quantized else OPSETS[0]
        if self.opset is not None and self.opset < lowest:
            raise UserError(
                f"opset {self.opset} has no float16 around quantized values; choose {lowest} or higher, or leave fp16 out."
            )
        return self.opset or lowest

"""ExportOptions: the form of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError

# LayerNormalization needs 17. Every form that the exporter writes has been run up to 21.
OPSETS = range(17, 22)
# the first opset whose QuantizeLinear and DequantizeLinear support float16
HALF_QDQ_OPSET = 19
# the first with INT4, and whose QuantizeLinear and DequantizeLinear support 16 bits
NARROW_AND_WIDE_OPSET = 21


@dataclass(frozen=True)
class ExportOptions:
    """The form of an ONNX file.

    Attributes:
        opset: version of ONNX's operators, 17 to 21; None for the lowest that the other choices need.
        dynamic_size: height and width of the images stay open, as the batch does.
        fp16: everything that is not integer is computed in float16. Inputs and outputs stay float32 and are cast. None does
            so for quantized networks if the target wants it (``Target.half_floats``) and float16 holds all constants.
        normalisation: the graph takes uint8 pixels (N, C, H, W) and normalises them in float32 with this mean and std. None
            for normalised float32 images.
        float_weights: quantized weights are stored as float32 with a QuantizeLinear behind them, instead of as integers.
        int4_weights: weights of 4 bits and fewer are stored as INT4 if the target takes them, instead of as int8. An
            ``opset`` below 21 has no INT4.

    Raises:
        UserError: an opset that is not supported.
    """

    opset: int | None = None
    dynamic_size: bool = False
    fp16: bool | None = None
    normalisation: InputSpec | None = None
    float_weights: bool = False
    int4_weights: bool = True

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in OPSETS:
            raise UserError(f"opset {self.opset} can't be written; choose one from {OPSETS[0]} to {OPSETS[-1]}.")

    @property
    def packs(self) -> bool:
        """Whether weights of 4 bits and fewer may be stored as INT4."""
        return self.int4_weights and not self.float_weights and (self.opset or OPSETS[-1]) >= NARROW_AND_WIDE_OPSET

    def opset_for(self, quantized: bool, *, packed: bool = False, wide: bool = False) -> int:
        """The opset to write.

        Args:
            quantized: whether the network is quantized.
            packed: whether weights are stored as INT4.
            wide: whether activations have 16 bits.

        Raises:
            UserError: the chosen opset does not support quantized networks in float16, or 16-bit activations; or 16-bit
                activations between float16 values.
        """
        lowest = HALF_QDQ_OPSET if self.fp16 and quantized else OPSETS[0]
        if self.opset is not None and self.opset < lowest:
            raise UserError(
                f"opset {self.opset} has no float16 around quantized values; choose {lowest} or higher, or float32 (--fp32)."
            )
        if wide and self.fp16:
            raise UserError("float16 has fewer digits than 16-bit activations; export them without fp16.")
        if packed or wide:
            lowest = NARROW_AND_WIDE_OPSET
        if self.opset is not None and self.opset < lowest:
            raise UserError(f"opset {self.opset} has no 16-bit activations; choose {lowest}, or activations of 8 bits.")
        return self.opset or lowest

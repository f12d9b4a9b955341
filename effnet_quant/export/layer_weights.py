"""LayerWeights: weights and bias of one layer on their way into a graph, BatchNorm folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet_quant.export.graph_writer import GraphWriter

# 2**30: an int32 bias beyond this could overflow the accumulator it is added to.
LARGEST_BIAS = float(2**30)
# Below this a float16 has fewer than its 11 bits.
SMALLEST_NORMAL_HALF = 2.0**-14


@dataclass
class LayerWeights:
    """Weights of a convolution or linear layer.

    Attributes:
        weight: (out, in, …) float weights; of a quantized layer in units of ``scale``, clipped to the grid and, unless they
            are stored as float, rounded.
        bias: (out,), or None.
        scale: (out,), the step of each output channel's grid; None for a layer in float.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    scale: NDArray[np.float32] | None

    def fold(self, factor: NDArray[np.float64], offset: NDArray[np.float64]) -> None:
        """Follow the layer by factor * y + offset per channel: weights and scales take the same factor.

        Integers keep their magnitude (-128, which only saturation reaches, becomes 127 where the factor is negative).
        """
        factors = self._per_channel(factor)
        if self.scale is None:
            self.weight = (self.weight * factors).astype(np.float32)
        else:
            scale = (self.scale * np.abs(factor)).astype(np.float32)
            gone = scale == 0  # a channel of zeros; runtimes refuse a step of 0
            weight = np.clip(self.weight * np.sign(factors), -128, 127)
            self.weight = np.where(self._per_channel(gone), 0, weight).astype(np.float32)
            self.scale = np.where(gone, self.scale, scale)
        bias = 0.0 if self.bias is None else self.bias
        self.bias = (bias * factor + offset).astype(np.float32)

    def write(self, writer: GraphWriter, path: str, input_scale: float | None) -> list[str]:
        """Write both, and return the names that the layer's node takes.

        Args:
            writer: the graph.
            path: the layer's name.
            input_scale: step of the layer's quantized input, None if the input is float.
        """
        scales = self.scale is not None and input_scale is not None
        integer_bias = writer.quantized_bias_wanted and self.bias is not None and scales
        if self.scale is None:
            names = [writer.constant(f"{path}.weight", self.weight)]
        else:
            if integer_bias:
                self._widen_for_bias(input_scale)
            if writer.half:
                self._widen_for_half()
            if writer.float_weights:
                weight = (self.weight * self._per_channel(self.scale)).astype(np.float32)
                names = [writer.rounded_weight(weight, self.scale, path)]
            else:
                names = [writer.quantized_weight(np.rint(self.weight).astype(np.int8), self.scale, path)]
        if self.bias is None:
            return names
        if integer_bias:
            bias_scale = (self.scale * np.float32(input_scale)).astype(np.float32)
            return [*names, writer.quantized_bias(self.bias, bias_scale, path)]
        return [*names, writer.constant(f"{path}.bias", self.bias)]

    def _widen_for_bias(self, input_scale: float | None) -> None:
        """Raise the scale of channels whose bias would overflow int32 in units of the accumulator.

        Such a channel has weights so small beside its bias that a coarser grid changes its output by less than one part in
        a million.
        """
        assert self.scale is not None and self.bias is not None and input_scale is not None
        smallest = (np.abs(self.bias).astype(np.float64) / (LARGEST_BIAS * input_scale)).astype(np.float32)
        self._change_scale(np.maximum(self.scale, smallest))

    def _widen_for_half(self) -> None:
        """Round the scales that float16 holds with fewer bits up, so that no weight leaves the grid."""
        assert self.scale is not None
        steps = np.maximum(np.ceil(self.scale.astype(np.float64) * 2.0**24), 1) * 2.0**-24
        self._change_scale(np.where(self.scale < SMALLEST_NORMAL_HALF, steps, self.scale).astype(np.float32))

    def _change_scale(self, wider: NDArray[np.float32]) -> None:
        """Put the channels whose scale changes on the new grid."""
        assert self.scale is not None
        changed = self._per_channel(wider) > self._per_channel(self.scale)
        self.weight = np.where(changed, np.rint(self.weight * self._per_channel(self.scale / wider)), self.weight)
        self.scale = wider

    def _per_channel(self, values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape((-1,) + (1,) * (self.weight.ndim - 1))

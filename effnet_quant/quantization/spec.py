"""What a quantized number looks like: bits and granularity, for weights and for activations."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_quant.errors import UserError


@dataclass(frozen=True)
class TensorSpec:
    """Symmetric signed integers of ``bits`` bits: scale = amax / (2**(bits - 1) - 1), zero point 0.

    Attributes:
        bits: width of the integer; 8 gives the grid -128 … 127.
        axis: None for one range per tensor (amax of shape ()), or the dimension that has a range per index (amax of the
            tensor's rank, all other dimensions 1).
    """

    bits: int = 8
    axis: int | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def amax_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the range of a tensor of the given shape: (C, 1, 1, 1) for a convolution's weights, () otherwise."""
        if self.axis is None:
            return ()
        return tuple(size if dim == self.axis else 1 for dim, size in enumerate(shape))


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized: weights per output channel, activations per tensor."""

    weight: TensorSpec = TensorSpec(bits=8, axis=0)
    activation: TensorSpec = TensorSpec(bits=8)


PRESETS = {"w8a8": QuantSpec()}


def resolve_spec(spec: str | QuantSpec) -> QuantSpec:
    """The QuantSpec of a preset's name, or the given one.

    Raises:
        UserError: there is no preset of that name.
    """
    if isinstance(spec, QuantSpec):
        return spec
    if spec not in PRESETS:
        raise UserError(f"there is no quantization preset '{spec}'; choose one of: {', '.join(PRESETS)}.")
    return PRESETS[spec]

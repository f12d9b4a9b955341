"""What a layer costs at a number of bits: bytes of its weights, and bit operations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from effnet_quant.quantization.eager_evaluation import Batch, device_of, eager_pass, model_arguments
from effnet_quant.quantization.spec import QuantSpec

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """The size of a layer.

    Attributes:
        weights: how many it has, without biases.
        multiply_adds: for one example.
    """

    weights: int
    multiply_adds: int

    def weight_bytes(self, spec: QuantSpec | None) -> float:
        """Bytes of the weights; None is float32. Scales and biases are not counted."""
        return self.weights * (FLOAT_BITS if spec is None else spec.weight.bits) / 8

    def bit_operations(self, spec: QuantSpec | None) -> float:
        """Multiply-adds x bits of a weight x bits of an activation, for one example (van Baalen et al. 2020)."""
        bits = FLOAT_BITS**2 if spec is None else spec.weight.bits * spec.activation.bits
        return float(self.multiply_adds * bits)


def layer_costs(model: nn.Module, batch: Batch) -> dict[str, LayerCost]:
    """The cost of each convolution and linear layer with quantizers, by name, from one pass over ``batch``."""
    arguments, examples = model_arguments(batch, device_of(model))
    found: dict[str, LayerCost] = {}
    handles = []
    for name, module in model.named_modules():
        if not hasattr(module, "_weight_quantizer"):
            continue

        def note(layer: nn.Module, _: object, output: Tensor, name: str = name) -> None:
            assert isinstance(layer.weight, Tensor)
            weights = layer.weight.numel()
            # each weight multiplies once for every position of an output channel
            positions = output.numel() // examples // layer.weight.shape[0]
            before = found[name].multiply_adds if name in found else 0
            found[name] = LayerCost(weights, before + weights * positions)

        handles.append(module.register_forward_hook(note))
    try:
        with eager_pass(model):
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found

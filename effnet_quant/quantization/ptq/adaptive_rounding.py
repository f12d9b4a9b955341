"""AdaRound: learns for each weight whether to round up or down (Nagel et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.learned_rounding import Learning, learn_rounding
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext


@dataclass(frozen=True)
class AdaptiveRounding:
    """Learns the rounding of one layer after the other. The model needs ranges.

    Each layer takes what the quantized layers before it give, and learns to give what the float network gives there, after
    its activation where the graph can be cut. The learned weights lie on their grid.

    Attributes:
        iterations: steps of Adam for each layer.
    """

    iterations: int = 1000

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        """Change the weights of ``model`` in place; see ``Step``.

        Raises:
            UserError: the model can't be cut into blocks or has no ranges, or a batch is no good.
        """
        learn_rounding(model, batches, context, Learning(self.iterations), single_layers=True)

"""Block reconstruction: BRECQ's blocks (Li et al. 2021) with QDrop's dropping (Wei et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from effnet_quant.quantization.eager_evaluation import Batch
from effnet_quant.quantization.ptq.learned_rounding import Learning, learn_rounding
from effnet_quant.quantization.ptq.step import DEFAULT_CONTEXT, StepContext


@dataclass(frozen=True)
class Reconstruction:
    """Learns the rounding of one block after the other. The model needs ranges.

    In the first phase a block learns the rounding of its weights and its biases, while a random half of the activations
    stays in float. In the second phase the weights are decided, and the block learns its activation ranges and biases.

    Attributes:
        iterations: steps of Adam for each block, in both phases together.
    """

    iterations: int = 1000

    def __call__(self, model: nn.Module, batches: Sequence[Batch], context: StepContext = DEFAULT_CONTEXT) -> None:
        """Change weights, biases and activation ranges of ``model`` in place; see ``Step``.

        Raises:
            UserError: the model can't be cut into blocks or has no ranges, or a batch is no good.
        """
        learning = Learning(self.iterations, range_rate=1e-2, bias_rate=2e-2, drop=0.5, settle=0.4)
        learn_rounding(model, batches, context, learning, single_layers=False)

"""checkpoint2model.py: extract the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run
from effnet_quant.terminal import printable


def job(arguments: Sequence[str]) -> int:
    """Extract the weights as the command line says; returns the exit status."""
    parser = Parser("Extract the weights from a checkpoint.")
    parser.add_argument(
        "--checkpoint-path", required=True, metavar="FILE", help="checkpoint.pth.tar or model_best.pth.tar"
    )
    parser.add_argument(
        "--weight-path", required=True, metavar="FILE", help="where to write the weights: .safetensors or .pth"
    )
    parser.add_argument("--ema", action="store_true", help="write the moving average of the weights instead")
    parsed = parser.parse(arguments)
    from effnet_quant.models.weights import read_weights, write_weights

    weights = read_weights(parsed.checkpoint_path, ema=parsed.ema)
    write_weights(parsed.weight_path, weights.tensors, weights.card)
    print(f"{printable(parsed.weight_path)}: {len(weights.tensors)} tensors")
    return 0


def main() -> None:
    """Entry point of the script."""
    run(job)

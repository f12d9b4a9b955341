"""effnet-quant demo (make demo): run all scripts on handwritten digits, then print a table."""

from __future__ import annotations

from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Train, calibrate, fine-tune, export and run EfficientNet-B0 on handwritten digits.")
    parser.add_argument("--workspace", default="runs/demo", help="folder for everything the demo writes")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=2, help="epochs of quantization-aware training")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Run the demo as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    from effnet_quant.jobs.demo import run_demo

    run_demo(parsed.workspace, parsed.epochs, parsed.qat_epochs)
    return 0


def main() -> None:
    """Entry point: ``effnet-quant demo``."""
    run(job)


if __name__ == "__main__":
    main()

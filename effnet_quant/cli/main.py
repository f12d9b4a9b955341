"""main.py: train or evaluate a float network."""

from __future__ import annotations

from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run
from effnet_quant.cli.training import prepared, train_or_evaluate
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry


def build_parser() -> Parser:
    """The script's flags."""
    parser = Parser("Train or evaluate an image classifier.")
    add_training_arguments(parser)
    return parser


def job(arguments: Sequence[str]) -> int:
    """Train or evaluate as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    if get_entry(parsed.arch).quantized:
        raise UserError(f"{parsed.arch} is a quantized model; use quant_main.py for it.")
    with prepared(parsed, quantized=False) as run_of_this_process:
        return train_or_evaluate(run_of_this_process, parsed)


def main() -> None:
    """Entry point of the script."""
    run(job)

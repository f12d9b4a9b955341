"""main.py: train or evaluate a float network."""

from __future__ import annotations

from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError


def build_parser() -> Parser:
    """The script's flags."""
    parser = Parser("Train or evaluate an image classifier.")
    add_training_arguments(parser)
    return parser


def job(arguments: Sequence[str]) -> int:
    """Train or evaluate as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.run_file import write_run_file
    from effnet_quant.cli.training import say_what_is_used, settings, train_or_evaluate
    from effnet_quant.jobs.run import open_run
    from effnet_quant.models.registry import get_entry

    said = card_to_start_from(parsed)
    if get_entry(parsed.arch).quantized:
        raise UserError(f"{parsed.arch} is a quantized model; use quant_main.py for it.")
    asked = settings(parsed, said)
    with open_run(asked.card, asked.data, asked.config, asked.place, asked.start, evaluate=parsed.evaluate) as ready:
        say_what_is_used(ready, parsed)
        write_run_file(ready, parsed, "train")
        return train_or_evaluate(ready, parsed)


def main() -> None:
    """Entry point of the script."""
    run(job)

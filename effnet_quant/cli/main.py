"""main.py: train or evaluate a float network."""

from __future__ import annotations

import argparse
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
    return train(build_parser().parse(arguments))


def train(parsed: argparse.Namespace) -> int:
    """Train or evaluate with the settings of parsed flags; returns the exit status."""
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.run_file import write_run_file
    from effnet_quant.cli.training import say_what_is_used, settings, train_or_evaluate
    from effnet_quant.jobs.run import open_run

    said = card_to_start_from(parsed)
    refuse_quantized(parsed.arch)
    asked = settings(parsed, said)
    with open_run(asked.card, asked.data, asked.config, asked.place, asked.start, evaluate=parsed.evaluate) as ready:
        say_what_is_used(ready, parsed)
        write_run_file(ready, parsed, "train")
        return train_or_evaluate(ready, parsed)


def refuse_quantized(arch: str) -> None:
    """Raises UserError if a network has quantizers."""
    from effnet_quant.models.registry import get_entry

    if get_entry(arch).quantized:
        raise UserError(f"{arch} is a quantized model; use quant_main.py for it.")


def main() -> None:
    """Entry point of the script."""
    run(job)

"""effnet-quant completion: a script with which a shell completes verbs, flags, their values and files."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from effnet_quant.cli.app import VERBS
from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError

_SHELLS = ("bash", "zsh")


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Print a script with which a shell completes effnet-quant's verbs, flags and files.")
    parser.add_argument("shell", choices=_SHELLS, help="the shell that is to read the script")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Print the script for a shell; returns the exit status."""
    parsed = build_parser().parse(arguments)
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs the package shtab; pip install 'effnet-quant[completion]'.") from error
    command = argparse.ArgumentParser(prog="effnet-quant")
    command.add_argument("--version", action="store_true", help="show the version")
    verbs = command.add_subparsers()
    for name, verb in VERBS.items():
        own = importlib.import_module(f"effnet_quant.cli.{verb.module}").build_parser()
        for action in own._actions:
            if action.nargs != 0 and action.choices is None and action.type is not int and action.type is not float:
                action.complete = shtab.FILE
        verbs.add_parser(name, help=verb.summary, parents=[own], add_help=False)
    print(shtab.complete(command, parsed.shell))
    return 0


def main() -> None:
    """Entry point of ``effnet-quant completion``."""
    run(job)

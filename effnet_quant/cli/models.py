"""effnet-quant models: list the networks in a table."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from effnet_quant.cli.arguments import Parser
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError
from effnet_quant.models.kept_table import kept_table

HEADER = ("model", "parameters", "GMACs", "image size", "weights")


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("List the models with their parameters, multiply-accumulates, image size and published weights.")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="of names, e.g. 'efficientnet-*b4', 'timm:resnet*', 'torchvision:*'"
    )
    return parser


def job(arguments: Sequence[str]) -> int:
    """Print the table, a row at a time; returns the exit status."""
    pattern = build_parser().parse(arguments).pattern
    with kept_table() as table:
        names = table.names.get(pattern) or _names(pattern)
        table.names[pattern] = names
        widths = (max(len(HEADER[0]), *map(len, names)), 13, 7, 10)
        _print(HEADER, widths)
        for name in names:
            table.rows[name] = table.rows.get(name) or _row(name)
            _print(table.rows[name], widths)
    return 0


def _names(pattern: str) -> list[str]:
    from effnet_quant.models.registry import list_models

    names = list_models(pattern)
    if not names:
        raise UserError(f"no model is called '{pattern}'; patterns take * and ?, as in 'timm:resnet*'.")
    return names


def _row(name: str) -> list[str]:
    """A model's row of the table; "-" for values that can't be found without running the model."""
    from effnet_quant.models.complexity import measure_complexity
    from effnet_quant.models.registry import get_entry

    entry = get_entry(name)
    parameters, macs = measure_complexity(entry)
    giga = "-" if macs is None else f"{macs / 1e9:.3g}"
    return [name, f"{parameters:,}", giga, str(entry.input.image_size), entry.weights_at or "-"]


def _print(cells: Sequence[str], widths: tuple[int, ...]) -> None:
    name, *numbers, weights = cells
    right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
    print("  ".join([name.ljust(widths[0]), *right, weights]), flush=True)


def main() -> None:
    """Entry point of ``effnet-quant models``."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without an error
    run(job)

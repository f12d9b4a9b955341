"""``python -m effnet_quant.models [pattern]``: the registry as a table."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effnet_quant.errors import UserError
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.registry import get_entry, list_models

HEADER = ("model", "parameters", "GMACs", "image size", "weights")


def measure(entry: ModelEntry) -> tuple[int, float]:
    """Parameters of a model, and multiply-accumulates of one image at its default size.

    Convolutions, linear layers and matrix products count, elementwise operations and pooling do not, as is usual.
    """
    model = entry.shapes().eval()
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, entry.input.image_size, entry.input.image_size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return _count(model), counter.get_total_flops() / 2


def table_row(name: str) -> tuple[str, ...]:
    """What the table says of a model; "-" for what can't be found without values."""
    entry = get_entry(name)
    size = str(entry.input.image_size)
    try:
        parameters, macs = measure(entry)
    except Exception:  # a network's own code may need values in its forward pass, which shapes alone don't give
        return name, f"{_count(entry.shapes()):,}", "-", size, entry.weights_at or "-"
    return name, f"{parameters:,}", f"{macs / 1e9:.3g}", size, entry.weights_at or "-"


def main(arguments: Sequence[str]) -> int:
    """Print the table, a row at a time; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m effnet_quant.models", description="List the models.")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="of names, e.g. 'efficientnet-*b4', 'timm:resnet*', 'torchvision:*'"
    )
    pattern = parser.parse_args(arguments).pattern
    try:
        names = list_models(pattern)
        if not names:
            raise UserError(f"no model is called '{pattern}'; patterns take * and ?, as in 'timm:resnet*'.")
        widths = (max(len(HEADER[0]), *map(len, names)), 13, 7, 10)
        _print(HEADER, widths)
        for name in names:
            _print(table_row(name), widths)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _print(cells: tuple[str, ...], widths: tuple[int, ...]) -> None:
    name, *numbers, weights = cells
    right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
    print("  ".join([name.ljust(widths[0]), *right, weights]), flush=True)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the table, as it does for any other program
    sys.exit(main(sys.argv[1:]))

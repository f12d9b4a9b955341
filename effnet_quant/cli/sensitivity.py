"""effnet-quant sensitivity: what each layer of a quantized network costs when it alone is quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli.arguments import Parser, add_model_arguments
from effnet_quant.cli.process import run
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, replace_file

IMAGES = 256
BATCH = 32


def build_parser() -> Parser:
    """The verb's flags."""
    parser = Parser("Quantize one layer at a time, and print what the network loses by each.")
    add_model_arguments(parser, None)
    parser.add_argument("data", metavar="DATA", help="a folder with train/ and val/, or another name from docs/data.md")
    parser.add_argument("--model", metavar="FILE", dest="pretrained_from_file", help="same as --pretrained-from-file")
    parser.add_argument("--image-size", type=int, help="image size in pixels (default: the model's)")
    parser.add_argument("--images", type=int, default=IMAGES, help="training images to measure on")
    parser.add_argument("-b", "--batch-size", type=int, default=BATCH, help="images per batch")
    parser.add_argument("-j", "--workers", type=int, default=0, help="data loading processes")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--plot", metavar="FILE", help="also draw the figures, in an .svg file")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Print the table that the command line asks for; returns the exit status."""
    parsed = build_parser().parse(arguments)
    if parsed.plot and Path(parsed.plot).suffix != ".svg":
        raise UserError(f"--plot {parsed.plot}: expected a file named .svg.")
    for path in (parsed.json, parsed.plot):
        if path:
            check_writable(Path(path))
    if min(parsed.images, parsed.batch_size) < 1:
        raise UserError("--images and --batch-size must be at least 1.")
    from effnet_quant.cli.model_flags import load_model
    from effnet_quant.jobs.inference import training_batches
    from effnet_quant.quantization.ptq.sensitivity import sensitivity
    from effnet_quant.quantization.ptq.step import StepContext
    from effnet_quant.report.charts import bar_chart
    from effnet_quant.tasks import get_task
    from effnet_quant.training.progress import ProgressLines

    if not parsed.arch and parsed.pretrained_from_file:
        from effnet_quant.models.weights import read_weights

        parsed.arch = read_weights(parsed.pretrained_from_file).card.arch
    model, card = load_model(parsed)
    assert card.input is not None
    batches, targets = training_batches(parsed.data, card, card.input, parsed.images, parsed.batch_size, parsed.workers)
    table = sensitivity(model, batches, targets, get_task(card.task), StepContext(progress=ProgressLines()))
    print(table)
    if parsed.json:
        replace_file(Path(parsed.json), (json.dumps(table.to_json(), indent=2) + "\n").encode())
    if parsed.plot:
        bars = [
            (
                row.layer,
                math.inf if row.sqnr is None else max(row.sqnr, 0.0),
                f"{row.sqnr:.1f}" if row.sqnr else "no noise",
            )
            for row in table.worst_first()
        ]
        title = f"{card.arch}: each layer quantized alone"
        picture = bar_chart(bars, title, "SQNR of the outputs, dB: short bars are sensitive layers")
        replace_file(Path(parsed.plot), picture.encode())
    return 0


def main() -> None:
    """Entry point of ``effnet-quant sensitivity``."""
    run(job)

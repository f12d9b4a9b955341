"""quant_main.py: calibrate a network and fine-tune it with fake quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import (
    add_qat_arguments,
    add_spec_arguments,
    asked_overrides,
    asked_spec,
    check_ptq,
    qat_config,
)
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable
from effnet_quant.quantization.choices import CALIBRATION_METHODS, DEFAULT_METHOD, DEFAULT_PERCENTILE, PTQ_RECIPES
from effnet_quant.quantization.targets import TARGETS


def build_parser() -> Parser:
    """The script's flags."""
    parser = Parser(
        "Quantize an image classifier: calibrate float weights (--epochs 0 stops there), then fine-tune with fake "
        "quantization."
    )
    add_training_arguments(parser)
    add_spec_arguments(parser)
    add_qat_arguments(parser)
    parser.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="the runtime to simulate (default: the weights' target, else tensorrt for efficientnet-quant-* and "
        "onnxruntime for all others)",
    )
    methods = tuple(CALIBRATION_METHODS)
    parser.add_argument("--calibration-method", choices=methods, default=DEFAULT_METHOD, help="how to choose ranges")
    parser.add_argument(
        "--percentile", type=float, default=DEFAULT_PERCENTILE, help="percent of magnitudes inside the range"
    )
    parser.add_argument("--calibration-images", type=int, default=512, help="training images to calibrate with")
    parser.add_argument(
        "--ptq",
        metavar="RECIPE",
        help=f"{', '.join(PTQ_RECIPES)}: quantize without training by this recipe; needs --epochs 0",
    )
    parser.add_argument("--report", metavar="FILE", help="file for a page of plots of all ranges (.png, .pdf or .svg)")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Calibrate and train, or evaluate, as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    check_ptq(parsed)
    from effnet_quant.api import has_ranges
    from effnet_quant.cli.training import say_what_is_used, settings, train_or_evaluate
    from effnet_quant.jobs.quantized_training import check_start, prepare_quantized
    from effnet_quant.jobs.run import open_run
    from effnet_quant.models.registry import get_entry
    from effnet_quant.report.calibration_page import FORMATS

    if get_entry(parsed.arch).quantized is False:
        quantized = parsed.arch.replace("efficientnet-", "efficientnet-quant-", 1)
        raise UserError(f"{parsed.arch} is a float model; quant_main.py wants its quantized twin, --arch {quantized}.")
    asked = settings(parsed, asked_spec(parsed), parsed.target)
    check_start(asked.start)
    qat = qat_config(parsed)
    if parsed.report and Path(parsed.report).suffix not in FORMATS:
        raise UserError(f"--report {parsed.report}: expected a file named {', '.join(FORMATS)}.")
    if parsed.report:
        check_writable(Path(parsed.report))
    with open_run(
        asked.card,
        asked.data,
        asked.config,
        asked.place,
        asked.start,
        quantized=True,
        overrides=asked_overrides(parsed),
        evaluate=parsed.evaluate,
    ) as ready:
        say_what_is_used(ready, parsed)
        if not parsed.evaluate:
            prepare_quantized(ready, qat, parsed.report)
        elif not has_ranges(ready.model):
            source = parsed.resume or parsed.pretrained_from_file or "--pretrained"
            raise UserError(
                f"{source} holds float weights without ranges; calibrate them first, with --epochs 0 instead of --evaluate."
            )
        return train_or_evaluate(ready, parsed)


def main() -> None:
    """Entry point of the script."""
    run(job)

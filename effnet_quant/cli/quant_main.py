"""quant_main.py: calibrate a network and fine-tune it with fake quantization."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import (
    add_qat_arguments,
    add_search_arguments,
    add_spec_arguments,
    asked_overrides,
    asked_spec,
    check_ptq,
    check_search,
    qat_config,
    seconds_of,
)
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, create_folder
from effnet_quant.quantization.choices import CALIBRATION_METHODS, DEFAULT_METHOD, DEFAULT_PERCENTILE, PTQ_RECIPES
from effnet_quant.quantization.targets import TARGETS

if TYPE_CHECKING:
    from effnet_quant.cli.training import Settings
    from effnet_quant.jobs.run import Run
    from effnet_quant.quantization.qat import QatConfig


def build_parser() -> Parser:
    """The script's flags."""
    parser = Parser(
        "Quantize an image classifier: calibrate float weights (--epochs 0 stops there), then fine-tune with fake "
        "quantization."
    )
    add_training_arguments(parser)
    add_spec_arguments(parser)
    add_qat_arguments(parser)
    add_search_arguments(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--target",
        choices=tuple(TARGETS),
        help="the runtime to simulate (default: the weights' target, else tensorrt for efficientnet-quant-* and "
        "onnxruntime for all others)",
    )
    methods = tuple(CALIBRATION_METHODS)
    group.add_argument("--calibration-method", choices=methods, default=DEFAULT_METHOD, help="how to choose ranges")
    group.add_argument(
        "--percentile", type=float, default=DEFAULT_PERCENTILE, help="percent of magnitudes inside the range"
    )
    group.add_argument("--calibration-images", type=int, default=512, help="training images to calibrate with")
    group.add_argument(
        "--ptq",
        metavar="RECIPE",
        help=f"{', '.join(PTQ_RECIPES)}: quantize without training by this recipe; needs --epochs 0",
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        help="file for a page of plots of all ranges (.png, .pdf or .svg), or a folder for the "
        "quantization report, a page for a browser; a bare name is in the workspace",
    )
    return parser


def job(arguments: Sequence[str]) -> int:
    """Calibrate and train, or evaluate, as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    check_search(parsed)
    check_ptq(parsed)
    time_budget = None if parsed.time_budget is None else seconds_of(parsed.time_budget)
    if parsed.auto:
        _default_to_short_training(parsed)
    from effnet_quant.api import has_ranges
    from effnet_quant.cli.file_card import card_to_start_from
    from effnet_quant.cli.run_file import write_run_file
    from effnet_quant.cli.training import say_what_is_used, settings, train_or_evaluate
    from effnet_quant.jobs.quantization_report import float_network, write_quantization_report
    from effnet_quant.jobs.quantized_training import check_start, prepare_quantized
    from effnet_quant.models.registry import get_entry
    from effnet_quant.quantization.ptq.step import StepContext
    from effnet_quant.training.progress import ProgressLines

    said = card_to_start_from(parsed, quantized=True)
    if get_entry(parsed.arch).quantized is False:
        quantized = parsed.arch.replace("efficientnet-", "efficientnet-quant-", 1)
        raise UserError(f"{parsed.arch} is a float model; quant_main.py wants its quantized twin, --arch {quantized}.")
    asked = settings(parsed, said, asked_spec(parsed), parsed.target, quantized=True)
    check_start(asked.start)
    qat = qat_config(parsed)
    plots, folder = _places_of_report(parsed)
    if parsed.auto:
        return _auto(parsed, asked, qat, time_budget, folder)
    if parsed.target_drop is not None or parsed.budget is not None:
        asked = _with_chosen_bits(parsed, asked, qat)
    floats = None
    with _open(parsed, asked) as ready:
        say_what_is_used(ready, parsed)
        write_run_file(ready, parsed, "quantize")
        if not parsed.evaluate:
            floats = float_network(ready) if folder is not None else None
            prepare_quantized(ready, qat, plots)
        elif not has_ranges(ready.model):
            source = parsed.resume or parsed.pretrained_from_file or "--pretrained"
            raise UserError(
                f"{source} holds float weights without ranges; calibrate them first, with --epochs 0 instead of --evaluate."
            )
        status = train_or_evaluate(ready, parsed)
        if floats is not None and folder is not None and status == 0 and ready.world.is_main:
            page = write_quantization_report(
                folder, ready, ready.model, ready.card, floats, context=StepContext(progress=ProgressLines())
            )
            print(f"report: {page}", flush=True)
        return status


def _open(parsed: argparse.Namespace, asked: Settings) -> AbstractContextManager[Run]:
    from effnet_quant.jobs.run import open_run

    return open_run(
        asked.card,
        asked.data,
        asked.config,
        asked.place,
        asked.start,
        quantized=True,
        overrides=asked_overrides(parsed),
        evaluate=parsed.evaluate,
    )


def _places_of_report(parsed: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The file for plots of all ranges and the folder for the quantization report; at most one of them is asked for.

    Raises:
        UserError: the name is that of neither, it can't be written, or nothing is calibrated.
    """
    from effnet_quant.report.calibration_page import FORMATS

    if not parsed.report:
        return None, None
    report = Path(parsed.report)
    bare = report == Path(report.name)
    if bare:  # in the workspace, as --raport-file is
        report = Path(parsed.workspace) / report
    if report.suffix in FORMATS:
        if parsed.auto:
            raise UserError("--auto calibrates several times; give --report a folder, for the quantization report.")
        if bare:
            create_folder(report.parent, "--workspace")
        check_writable(report)
        return report, None
    if report.suffix and not report.is_dir():
        raise UserError(f"--report {report}: expected a file named {', '.join(FORMATS)}, or a folder.")
    if parsed.evaluate:
        raise UserError("--evaluate writes no report; leave out --report.")
    check_writable(create_folder(report, "--report") / "index.html")
    return None, report


def _default_to_short_training(parsed: argparse.Namespace) -> None:
    """QAT's settings where the user gave none: NVIDIA's defaults are those of a training from nothing."""
    for name, value in (("epochs", 3), ("lr", 0.002), ("lr_schedule", "cosine")):
        if name not in parsed.explicit:
            setattr(parsed, name, value)


def _auto(
    parsed: argparse.Namespace, asked: Settings, qat: QatConfig, time_budget: float | None, report: Path | None
) -> int:
    """Climb until the target is met; returns 1 if it is missed."""
    from effnet_quant.api import build
    from effnet_quant.cli.run_file import write_run_file
    from effnet_quant.jobs.autoquant import WEIGHTS, autoquant
    from effnet_quant.jobs.quantization_report import float_network, write_quantization_report
    from effnet_quant.models.weights import read_weights
    from effnet_quant.quantization.ptq.step import StepContext
    from effnet_quant.training.progress import ProgressLines
    from effnet_quant.training.signals import Interrupted

    workspace = Path(asked.place.workspace)
    weights = workspace / WEIGHTS
    with _open(parsed, asked) as ready:
        write_run_file(ready, parsed, "quantize")
        floats = float_network(ready) if report is not None else None
        try:
            climb = autoquant(
                ready,
                qat,
                workspace,
                target_drop=parsed.target_drop,
                time_budget=time_budget,
                held_back=parsed.hold_back,
                progress=ProgressLines(),
            )
        except Interrupted as interruption:
            kept = f"; the best so far is {weights}" if weights.is_file() else ", before anything was found"
            print(f"{interruption}{kept}", file=sys.stderr)
            return 128 + interruption.signal_number
        print(climb)
        print(f"{weights}: {climb.best}", flush=True)
        if floats is not None and report is not None and climb.card is not None:
            best = build(climb.card, read_weights(weights), **ready.options)
            page = write_quantization_report(
                report, ready, best, climb.card, floats, climb=climb, context=StepContext(progress=ProgressLines())
            )
            print(f"report: {page}", flush=True)
    return 0 if climb.reached else 1


def _with_chosen_bits(parsed: argparse.Namespace, asked: Settings, qat: QatConfig) -> Settings:
    """The settings with the spec that mixed precision finds."""
    from effnet_quant.jobs.bit_choice import choose_bits
    from effnet_quant.quantization.ptq.assignment_search import Budget
    from effnet_quant.training.progress import ProgressLines

    budget = None if parsed.budget is None else Budget.parse(parsed.budget)
    with _open(parsed, asked) as ready:
        chosen = choose_bits(ready, qat, target_drop=parsed.target_drop, budget=budget, progress=ProgressLines())
    print(chosen, flush=True)
    if not chosen.reached:
        print(
            f"note: no choice of bits loses {parsed.target_drop:g} points or less; this is the best that was measured. "
            "Train it, or allow more.",
            file=sys.stderr,
        )
    return replace(asked, card=replace(asked.card, quant_spec=chosen.spec.to_json()))


def main() -> None:
    """Entry point of the script."""
    run(job)

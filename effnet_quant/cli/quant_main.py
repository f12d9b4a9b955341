"""quant_main.py: calibrate a network and fine-tune it with fake quantization."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from effnet_quant.cli.arguments import Parser, add_training_arguments, model_options
from effnet_quant.cli.process import run
from effnet_quant.cli.quantization import (
    QatSchedule,
    add_qat_arguments,
    add_spec_arguments,
    check_qat_arguments,
    distilled,
)
from effnet_quant.cli.training import Job, prepared, train_or_evaluate
from effnet_quant.data.backends import open_loader
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.data.workers import explained_deaths
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.calibration import METHODS, collect, report_ranges, set_ranges, track_outputs
from effnet_quant.quantization.targets import TARGETS
from effnet_quant.report.calibration_page import FORMATS, write_calibration_page
from effnet_quant.training.callback import Callback
from effnet_quant.training.metrics import Stopwatch, describe
from effnet_quant.training.progress import progress


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
        help="the runtime to simulate (default: what the weights say, else tensorrt for efficientnet-quant-* and "
        "onnxruntime for all others)",
    )
    parser.add_argument("--calibration-method", choices=METHODS, default="percentile", help="how ranges are chosen")
    parser.add_argument("--percentile", type=float, default=99.99, help="share of magnitudes covered, in percent")
    parser.add_argument("--calibration-images", type=int, default=512, help="training images to calibrate with")
    parser.add_argument("--report", metavar="FILE", help="page of plots of all ranges to write (.png, .pdf or .svg)")
    return parser


def job(arguments: Sequence[str]) -> int:
    """Calibrate and train, or evaluate, as the command line says; returns the exit status."""
    parsed = build_parser().parse(arguments)
    if get_entry(parsed.arch).quantized is False:
        quantized = parsed.arch.replace("efficientnet-", "efficientnet-quant-", 1)
        raise UserError(f"{parsed.arch} is a float model; quant_main.py wants its quantized twin, --arch {quantized}.")
    if not (parsed.resume or parsed.pretrained_from_file or parsed.pretrained):
        raise UserError(
            "quantization starts from trained weights; give them with --pretrained-from-file, --pretrained or --resume."
        )
    if parsed.calibration_images < 1:
        raise UserError(f"--calibration-images must be at least 1, not {parsed.calibration_images}.")
    if not 0 < parsed.percentile <= 100:
        raise UserError(f"--percentile must be above 0 and at most 100, not {parsed.percentile}.")
    check_qat_arguments(parsed)
    if parsed.report and Path(parsed.report).suffix not in FORMATS:
        raise UserError(f"--report {parsed.report}: expected a file named {', '.join(FORMATS)}.")
    if parsed.report:
        check_writable(Path(parsed.report))
    with prepared(parsed, quantized=True) as ready:
        return _quantize(ready, parsed)


def _quantize(ready: Job, parsed: argparse.Namespace) -> int:
    trainer = ready.trainer
    if parsed.distill and not parsed.evaluate:
        trainer.loss = distilled(trainer.loss, parsed, model_options(parsed), ready.model)
    if not ready.has_ranges:
        if parsed.resume:
            raise UserError(
                f"{parsed.resume} holds no ranges; start from it with --pretrained-from-file to calibrate it."
            )
        if parsed.evaluate:
            raise UserError(
                f"{parsed.pretrained_from_file or '--pretrained'} holds float weights without ranges; calibrate them first, "
                "with --epochs 0 instead of --evaluate."
            )
        _calibrate(ready, parsed)
    elif not parsed.resume:
        print("the weights bring their ranges: no calibration", flush=True)
    # statistics of BatchNorm first: the outputs that are tracked depend on them
    trainer.callbacks.append(QatSchedule(trainer, parsed, lambda: _normalised_images(ready, parsed, "BatchNorm")))
    trainer.callbacks.append(_OutputTracking(ready, parsed))
    return train_or_evaluate(ready, parsed)


@explained_deaths()
def _calibrate(ready: Job, arguments: argparse.Namespace) -> None:
    """Ranges from training images through the evaluation transform; then a checkpoint."""
    loader, world = _calibration_images(ready, arguments), ready.world
    stopwatch = Stopwatch(world.size)
    seen = torch.zeros((), dtype=torch.int64, device=ready.device)

    def batches() -> Iterator[Tensor]:
        for images, _ in progress(loader.epoch(), len(loader), "calibrate", arguments.print_freq):
            stopwatch.data_ready()
            yield normalize(images.to(ready.device, non_blocking=True), ready.preprocessing)
            stopwatch.batch_done(len(images))
            seen.add_(len(images))

    method = arguments.calibration_method
    # the shares and the noise on the page of plots come from histograms
    observers = collect(ready.model, batches(), "mse" if arguments.report and method == "max" else method)
    set_ranges(ready.model, observers, method, arguments.percentile)
    ranges = [report.to_json() for report in report_ranges(ready.model, observers)]
    if arguments.report and world.is_main:
        write_calibration_page(ranges, Path(arguments.report))
    images = int(world.sum(seen))
    metrics: dict[str, float] = {"calib.images": images, **stopwatch.metrics("calib")}
    if not arguments.training_only:
        metrics |= ready.trainer.evaluate(ready.val, "calib", "evaluate the calibrated model")
    ready.recorder.record({**metrics, "calib.ranges": ranges})
    print(f"calibrated on {images} images: {describe(metrics)}", flush=True)
    ready.trainer.save()


class _OutputTracking(Callback):
    """Brings what is known of the convolutions' outputs up to date with the trained weights."""

    def __init__(self, ready: Job, arguments: argparse.Namespace) -> None:
        self._ready = ready
        self._arguments = arguments

    def on_epoch_end(self, epoch: int) -> None:
        for model in self._ready.trainer.models:
            track_outputs(model, _normalised_images(self._ready, self._arguments, "track output ranges"))


def _normalised_images(ready: Job, arguments: argparse.Namespace, title: str) -> Iterator[Tensor]:
    """The calibration images as the network takes them."""
    loader = _calibration_images(ready, arguments)
    for images, _ in progress(loader.epoch(), len(loader), title, arguments.print_freq):
        yield normalize(images.to(ready.device), ready.preprocessing)


def _calibration_images(ready: Job, arguments: argparse.Namespace) -> Loader:
    """This process' share of training images spread evenly over the set, through the evaluation transform."""
    assert ready.train_source is not None
    available = len(ready.train_source)
    count = min(arguments.calibration_images, available)
    chosen = torch.arange(count) * available // count
    # shares in a row, because a moving average goes by the order of the images
    share = chosen.tensor_split(ready.world.size)[ready.world.rank]
    return open_loader(
        "pytorch",
        ready.train_source,
        evaluation_transform(ready.preprocessing),
        ready.config.batch_size,
        ready.device,
        workers=arguments.workers,
        prefetch=arguments.prefetch,
        max_bad_images=arguments.max_bad_images,
        indices=share,
    )


def main() -> None:
    """Entry point of the script."""
    run(job)

"""quant_main.py: calibrate a network and fine-tune it with fake quantization."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effnet_quant.cli.arguments import Parser, add_training_arguments
from effnet_quant.cli.process import run
from effnet_quant.cli.training import Job, prepared, train_or_evaluate
from effnet_quant.data.backends import open_loader
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.calibration import METHODS, calibrate, track_outputs
from effnet_quant.training.callback import Callback
from effnet_quant.training.metrics import Stopwatch
from effnet_quant.training.progress import progress
from effnet_quant.training.trainer import describe


def build_parser() -> Parser:
    """The script's flags."""
    parser = Parser(
        "Quantize an image classifier: calibrate float weights (--epochs 0 stops there), then fine-tune with fake "
        "quantization."
    )
    add_training_arguments(parser)
    parser.add_argument("--calibration-method", choices=METHODS, default="percentile", help="how ranges are chosen")
    parser.add_argument("--percentile", type=float, default=99.99, help="share of magnitudes covered, in percent")
    parser.add_argument("--calibration-images", type=int, default=512, help="training images to calibrate with")
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
    with prepared(parsed, quantized=True) as ready:
        return _quantize(ready, parsed)


def _quantize(ready: Job, parsed: argparse.Namespace) -> int:
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
    ready.trainer.callbacks.append(_OutputTracking(ready, parsed))
    return train_or_evaluate(ready, parsed)


def _calibrate(ready: Job, arguments: argparse.Namespace) -> None:
    """Ranges from training images through the evaluation transform; then a checkpoint."""
    loader = _calibration_images(ready, arguments)
    stopwatch = Stopwatch()

    def batches() -> Iterator[Tensor]:
        for images, _ in progress(loader.epoch(), len(loader), "calibrate", arguments.print_freq):
            stopwatch.data_ready()
            yield normalize(images.to(ready.device, non_blocking=True), ready.preprocessing)
            stopwatch.batch_done(len(images))

    calibrate(ready.model, batches(), arguments.calibration_method, arguments.percentile)
    metrics: dict[str, float] = {"calib.images": loader.num_images, **stopwatch.metrics("calib")}
    if not arguments.training_only:
        metrics |= ready.trainer.evaluate(ready.val, "calib", "evaluate the calibrated model")
    ready.recorder.record(metrics)
    print(f"calibrated on {loader.num_images} images: {describe(metrics)}", flush=True)
    ready.trainer.save()


class _OutputTracking(Callback):
    """Brings what is known of the convolutions' outputs up to date with the trained weights."""

    def __init__(self, ready: Job, arguments: argparse.Namespace) -> None:
        self._ready = ready
        self._arguments = arguments

    def on_epoch_end(self, epoch: int) -> None:
        loader = _calibration_images(self._ready, self._arguments)
        batches = progress(loader.epoch(), len(loader), "track output ranges", self._arguments.print_freq)
        track_outputs(
            self._ready.model,
            (normalize(images.to(self._ready.device), self._ready.preprocessing) for images, _ in batches),
        )


def _calibration_images(ready: Job, arguments: argparse.Namespace) -> Loader:
    """Training images spread evenly over the set, through the evaluation transform."""
    assert ready.train_source is not None
    available = len(ready.train_source)
    count = min(arguments.calibration_images, available)
    return open_loader(
        "pytorch",
        ready.train_source,
        evaluation_transform(ready.preprocessing),
        ready.config.batch_size,
        ready.device,
        workers=arguments.workers,
        prefetch=arguments.prefetch,
        max_bad_images=arguments.max_bad_images,
        indices=torch.arange(count) * available // count,
    )


def main() -> None:
    """Entry point of the script."""
    run(job)

"""Calibrates networks and trains them with fake quantization, as quant_main.py does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from effnet_quant.api import Overrides, create_model, has_ranges
from effnet_quant.card import ModelCard
from effnet_quant.data.transforms import normalize
from effnet_quant.data.workers import explained_deaths
from effnet_quant.errors import UserError
from effnet_quant.files import create_folder
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.float_training import fit
from effnet_quant.jobs.run import Run, calibration_loader, open_run
from effnet_quant.models.weights import Weights
from effnet_quant.quantization.calibration import collect, report_ranges, set_ranges, track_outputs
from effnet_quant.quantization.placement.summary import summarize
from effnet_quant.quantization.ptq.step import StepContext
from effnet_quant.quantization.qat import (
    Distillation,
    QatConfig,
    find_not_finite,
    follow_ranges,
    freeze_batch_norm,
    freeze_ranges,
    gradual_start,
    reestimate_batch_norm,
)
from effnet_quant.quantization.recipe import apply_recipe
from effnet_quant.report.calibration_page import write_calibration_page
from effnet_quant.tasks.task import Inputs, Loss, Outputs, Targets
from effnet_quant.training.callback import Callback
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.metrics import Stopwatch, describe
from effnet_quant.training.progress import ProgressLines, progress


def finetune_quantized(
    card: ModelCard,
    data: DataConfig | str,
    config: TrainConfig,
    qat: QatConfig | None = None,
    place: PlaceConfig | None = None,
    start: StartConfig | None = None,
    *,
    overrides: Overrides = (),
    report: str | Path | None = None,
) -> ModelCard:
    """Calibrate trained weights, then train them with fake quantization, as quant_main.py does.

    ``TrainConfig(epochs=0)`` stops after the calibration. The other arguments are those of ``train``.

    Args:
        qat: settings of calibration and QAT; None for the defaults.
        overrides: pairs of a pattern and a preset or "float", on top of the card's quantization spec.
        report: file for a page of plots of all ranges.

    Returns:
        The card of the quantized model, as in its checkpoints.

    Raises:
        UserError: a setting or the data can't be used, or there are no weights to start from.
        Interrupted: a signal ended the run. The checkpoint has been written.
    """
    data = DataConfig(data) if isinstance(data, str) else data
    check_start(start)
    with open_run(card, data, config, place, start, quantized=True, overrides=overrides) as run:
        prepare_quantized(run, qat or QatConfig(), report)
        fit(run)
        return run.card


def check_start(start: StartConfig | None) -> None:
    """Raises UserError if there are no weights to start from."""
    if start is None or not (start.resume or start.weights or start.pretrained):
        raise UserError(
            "quantization starts from trained weights; give them with --pretrained-from-file, --pretrained or --resume."
        )


def prepare_quantized(run: Run, qat: QatConfig, report: str | Path | None = None) -> None:
    """Set up a quantized run: its teacher, its schedule, and calibration if the weights have no ranges.

    Raises:
        UserError: a resumed run has no ranges, calibration finds none, or two settings exclude each other.
    """
    if qat.reestimate_bn and run.config.freeze:
        raise UserError(
            "--reestimate-bn measures all BatchNorms again, and --freeze keeps some; leave one of them out."
        )
    if qat.distill:
        run.trainer.loss = distilled(run, qat, qat.distill)
    if not has_ranges(run.model):
        if run.began_with is not None:
            raise UserError(
                "the checkpoint to resume holds no ranges; start from it with --pretrained-from-file to calibrate it."
            )
        if qat.ptq is None:
            calibrate_run(run, qat, report)
        else:
            quantize_run(run, qat)
    elif qat.ptq is not None:
        raise UserError("the weights bring their ranges; --ptq starts from float weights.")
    elif run.began_with is None:
        print("the weights bring their ranges: no calibration", flush=True)
    # in this order, because the tracked outputs depend on BatchNorm's statistics
    run.trainer.callbacks.append(QatSchedule(run, qat))
    run.trainer.callbacks.append(OutputTracking(run, qat))


@explained_deaths()
def calibrate_run(run: Run, qat: QatConfig, report: str | Path | None = None) -> None:
    """Calibrate on training images with the evaluation transform, evaluate, and write a checkpoint.

    Args:
        run: the run.
        qat: method and number of images.
        report: file for a page of plots of all ranges.

    Raises:
        UserError: calibration finds no range for a quantizer.
    """
    loader, world = calibration_loader(run, qat.calibration_images), run.world
    if world.is_main:
        print(summarize(run.model), flush=True)
    stopwatch = Stopwatch(world.size)
    seen = torch.zeros((), dtype=torch.int64, device=run.device)
    assert run.card.input is not None
    spec = run.card.input

    def batches() -> Iterator[Tensor]:
        for images, _ in progress(loader.epoch(), len(loader), "calibrate", run.config.print_freq):
            stopwatch.data_ready()
            yield normalize(images.to(run.device, non_blocking=True), spec)
            stopwatch.batch_done(len(images))
            seen.add_(len(images))

    method = qat.calibration_method
    # the plots need histograms, which "max" does not count
    observers = collect(run.model, batches(), "mse" if report and method == "max" else method)
    set_ranges(run.model, observers, method, qat.percentile)
    ranges = [row.to_json() for row in report_ranges(run.model, observers)]
    if report and world.is_main:
        write_calibration_page(ranges, Path(report))
    images = int(world.sum(seen))
    metrics: dict[str, float] = {"calib.images": images, **stopwatch.metrics("calib")}
    if not run.config.training_only:
        metrics |= run.trainer.evaluate(run.val, "calib", "evaluate the calibrated model")
    run.recorder.record({**metrics, "calib.ranges": ranges})
    print(f"calibrated on {images} images: {describe(metrics)}", flush=True)
    run.trainer.save()


@explained_deaths()
def quantize_run(run: Run, qat: QatConfig) -> None:
    """Quantize without training by the recipe ``qat.ptq``, with training images; evaluate, and write a checkpoint.

    Until the checkpoint is written, finished blocks lie in the folder ``ptq`` of the workspace. The same run goes on from
    them after a kill.

    Args:
        run: the run.
        qat: recipe and number of images.

    Raises:
        UserError: the job has several processes, or the recipe can't use the model or the images.
    """
    if run.world.size > 1:
        raise UserError("--ptq runs in one process; start quant_main.py without multiproc.py.")
    assert qat.ptq is not None
    start = time.monotonic()
    batches = list(_calibration_inputs(run, qat, "calibration images"))
    seed = run.config.seed if run.config.seed is not None else 0
    folder = create_folder(run.trainer.workspace / "ptq", "--workspace") if run.config.save_checkpoints else None
    apply_recipe(run.model, batches, qat.ptq, StepContext(seed=seed, folder=folder, progress=ProgressLines()))
    images = sum(len(batch) for batch in batches)
    metrics: dict[str, float] = {"calib.images": images, "calib.seconds": time.monotonic() - start}
    if not run.config.training_only:
        metrics |= run.trainer.evaluate(run.val, "calib", "evaluate the quantized model")
    run.recorder.record(metrics)
    print(f"quantized by the recipe {qat.ptq} with {images} images: {describe(metrics)}", flush=True)
    run.trainer.save()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


class QatSchedule(Callback):
    """Switches quantizers and freezes or re-estimates BatchNorm between epochs.

    Every epoch ends with all quantizers on, so that validation sees the network that will be used.
    """

    def __init__(self, run: Run, qat: QatConfig) -> None:
        self._run = run
        self._model = run.trainer.model
        self._qat = qat

    def on_epoch_start(self, epoch: int) -> None:
        gradual_start(self._model, epoch, self._qat.gradual_start)
        freeze_ranges(self._model)
        if epoch < self._qat.follow_ranges:
            follow_ranges(self._model)
        if self._frozen(epoch):
            freeze_batch_norm(self._model)

    def on_divergence(self, images: Tensor) -> str | None:
        return find_not_finite(self._model, images)

    def on_epoch_end(self, epoch: int) -> None:
        gradual_start(self._model, epoch, 0)
        # every epoch, because any may be the best or the last; frozen statistics only at the end of training
        if self._qat.reestimate_bn and (not self._frozen(epoch) or epoch + 1 == self._run.config.epochs):
            for model in self._run.trainer.models:
                reestimate_batch_norm(model, _calibration_inputs(self._run, self._qat, "BatchNorm"))

    def _frozen(self, epoch: int) -> bool:
        return self._qat.freeze_bn is not None and epoch >= self._qat.freeze_bn


class OutputTracking(Callback):
    """Updates the ranges of the convolutions' outputs to the trained weights after each epoch."""

    def __init__(self, run: Run, qat: QatConfig) -> None:
        self._run = run
        self._qat = qat

    def on_epoch_end(self, epoch: int) -> None:
        for model in self._run.trainer.models:
            track_outputs(model, _calibration_inputs(self._run, self._qat, "track output ranges"))


def _calibration_inputs(run: Run, qat: QatConfig, title: str) -> Iterator[Tensor]:
    """Yield the normalised calibration images."""
    loader = calibration_loader(run, qat.calibration_images)
    assert run.card.input is not None
    for images, _ in progress(loader.epoch(), len(loader), title, run.config.print_freq):
        yield normalize(images.to(run.device), run.card.input)


def distilled(run: Run, qat: QatConfig, weights: str | Weights) -> Loss:
    """The run's loss mixed with the distillation loss of a teacher, the same model with float ``weights``."""
    card, config = run.card, run.config
    teacher = create_model(str(card.arch), card.num_classes, weights, quantized=False, **run.options)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    teacher = teacher.to(run.device, memory_format=memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]
    if config.compile:
        teacher.compile()
    distillation = Distillation(teacher, qat.distill_temperature, qat.distill_weight, run.trainer.task)
    loss = run.trainer.loss

    def mixed(outputs: Outputs, targets: Targets, inputs: Inputs) -> Tensor:
        return distillation.loss(loss(outputs, targets, inputs), outputs, inputs)

    return mixed

"""Quantization-aware training (QAT): its settings, and plain functions that a training loop calls between steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_quant.errors import UserError
from effnet_quant.quantization.batches import Key, argument_batches
from effnet_quant.quantization.calibration.methods import DEFAULT_METHOD, calibrator_factory
from effnet_quant.quantization.choices import PTQ_RECIPES
from effnet_quant.quantization.eager_evaluation import device_of, eager_pass
from effnet_quant.quantization.extremes import extremes
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Outputs, Task


@dataclass(frozen=True)
class QatConfig:
    """Settings of calibration and of training with fake quantization.

    Attributes:
        calibration_method: a name in calibration.METHODS.
        percentile: share of the magnitudes that the method "percentile" covers, in percent; None for the default.
        calibration_images: number of training images to calibrate with.
        ptq: a recipe of ``quantization.recipe`` in place of the calibration method; None for calibration alone.
        gradual_start: epochs over which the quantizers are switched on, one after another; 0 for all at once.
        follow_ranges: epochs at the start in which fixed ranges follow the data.
        freeze_bn: the epoch, counted from 0, that freezes BatchNorm's statistics; None for never.
        reestimate_bn: whether BatchNorm's statistics are measured again after every epoch.
        distill: file with float weights of the same model, which becomes the teacher; None for no teacher.
        distill_temperature: divides the outputs of teacher and student.
        distill_weight: the teacher's share of the loss, 0 … 1.

    Raises:
        UserError: an invalid value. The message names quant_main.py's flag.
    """

    calibration_method: str = DEFAULT_METHOD
    percentile: float | None = None
    calibration_images: int = 512
    ptq: str | None = None
    gradual_start: int = 0
    follow_ranges: int = 0
    freeze_bn: int | None = None
    reestimate_bn: bool = False
    distill: str | None = None
    distill_temperature: float = 2.0
    distill_weight: float = 0.5

    def __post_init__(self) -> None:
        calibrator_factory(self.calibration_method, self.percentile)
        if self.calibration_images < 1:
            raise UserError(f"--calibration-images must be at least 1, not {self.calibration_images}.")
        if self.ptq is not None and self.ptq not in PTQ_RECIPES:
            raise UserError(f"--ptq {self.ptq}: there is no such recipe; choose one of: {', '.join(PTQ_RECIPES)}.")
        for name in ("gradual_start", "follow_ranges", "freeze_bn"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {value}.")
        if self.distill_temperature <= 0:
            raise UserError(f"--distill-temperature must be above 0, not {self.distill_temperature}.")
        if not 0 <= self.distill_weight <= 1:
            raise UserError(f"--distill-weight must be between 0 and 1, not {self.distill_weight}.")


def gradual_start(model: nn.Module, epoch: int, epochs: int) -> None:
    """Switch on the quantizers whose turn has come by ``epoch``, counted from 0. Quantizers without a range stay off.

    They are switched on in the order of ``quantizers``, evenly over ``epochs``; from then on all are on. Call it before
    every epoch. The set depends on ``epoch`` alone, so a resumed run goes on as before. A compiled model compiles again
    when the set changes.
    """
    places = [quantizer for _, quantizer in quantizers(model)]
    count = len(places) if epoch >= epochs else math.ceil(len(places) * (epoch + 1) / (epochs + 1))
    for index, quantizer in enumerate(places):
        quantizer.enabled = index < count and quantizer.calibrated


class _RunningRange:
    """Moves a fixed range to the exponential moving average of each batch's extremes."""

    def __init__(self, quantizer: TensorQuantizer, momentum: float) -> None:
        self._quantizer = quantizer
        self._momentum = momentum

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        quantizer = self._quantizer
        if not quantizer.training:
            return
        low, high = extremes(x)
        if quantizer._amin is None:
            high = torch.maximum(high, -low) if quantizer.spec.signed else high.clamp(min=0)
        else:
            self._follow(quantizer._amin, low)
        self._follow(quantizer._amax, high)

    def _follow(self, end: Tensor, extreme: Tensor) -> None:
        """Move ``end`` towards ``extreme``. Infinity and NaN are skipped: a loss scaler skips such a batch too."""
        end.lerp_(torch.where(torch.isfinite(extreme), extreme, end), self._momentum)


def follow_ranges(model: nn.Module, momentum: float = 0.01) -> None:
    """From now on, let the fixed ranges of activations follow the data in training mode.

    Each range becomes an exponential moving average of the batches' extremes. Learned ranges and quantizers without a
    range are left out. DistributedDataParallel sends the buffers of process 0 to all, so ranges follow the images of that
    process.

    Args:
        model: a calibrated model.
        momentum: share of each new batch's extremes in the moving average.
    """
    for _, quantizer in quantizers(model):
        if quantizer.enabled and not (quantizer.spec.learned or quantizer.role == "weight"):
            quantizer.observer = _RunningRange(quantizer, momentum)


def freeze_ranges(model: nn.Module) -> None:
    """Undo ``follow_ranges``: the ranges stay as they are from now on."""
    for _, quantizer in quantizers(model):
        if isinstance(quantizer.observer, _RunningRange):
            quantizer.observer = None


def freeze_batch_norm(model: nn.Module) -> None:
    """Put BatchNorm layers in eval mode: they use their running statistics and do not change them.

    Their scale and offset still learn. ``model.train()`` undoes this, so call the function after it, in every epoch.
    """
    for module in _batch_norms(model):
        module.eval()


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], *, key: Key = None) -> None:
    """Measure BatchNorm's running statistics again, as the mean over all images of ``batches``.

    Quantized weights that oscillate between two values of the grid spoil the running averages (Nagel et al. 2022).
    All other modules are in eval mode (no dropout). Quantizers stay as they are, except those of outputs, which are off:
    their ranges depend on these statistics. Call ``track_outputs`` afterwards. In a process group all processes get the
    mean over all images.

    Args:
        model: any model with BatchNorm layers.
        batches: a DataLoader or other batches, as ``argument_batches`` takes them.
        key: for batches that are dicts, the entries with the model's arguments.

    Raises:
        UserError: there are no images, or a batch has another form.
    """
    layers = list(_batch_norms(model))
    momenta = [layer.momentum for layer in layers]
    device = device_of(model)
    rounding = [quantizer for quantizer in output_quantizers(model) if quantizer.enabled]
    images = 0
    try:
        for quantizer in rounding:
            quantizer.enabled = False
        with eager_pass(model):
            for layer in layers:
                layer.train()
            for arguments, examples in argument_batches(model, batches, key):
                images += examples
                for layer in layers:
                    layer.momentum = examples / images  # 1 for the first batch, which replaces the old statistics
                model(*arguments)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for quantizer in rounding:
            quantizer.enabled = True
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        images = _mean_over_ranks(layers, images, device)
    if images == 0:
        raise UserError("there are no images to estimate BatchNorm's statistics with.")


@torch.no_grad()
def _mean_over_ranks(layers: list[_BatchNorm], images: int, device: torch.device) -> int:
    total = torch.tensor(images, device=device)
    distributed.all_reduce(total)
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None
            statistic.mul_(images / max(int(total), 1))
            distributed.all_reduce(statistic)
    return int(total)


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield module


@dataclass(frozen=True)
class Distillation:
    """Distillation from a float network (Hinton et al. 2015).

    Attributes:
        teacher: the float network, in eval mode and not trained; see ``float_teacher``.
        temperature: above 0; see ``Task.distillation_loss``.
        weight: the teacher's share of the loss, 0 … 1; the targets have the rest.
        task: the task of both networks.
    """

    teacher: nn.Module
    temperature: float = 2.0
    weight: float = 0.5
    task: Task = CLASSIFICATION

    def loss(self, target_loss: Tensor, outputs: Outputs, images: Tensor) -> Tensor:
        """(1 - weight) * target_loss + weight * distillation loss, a scalar.

        ``images`` are the inputs that gave ``outputs``. The teacher runs on them, in the autocast around the call.
        """
        with torch.no_grad():
            taught = self.teacher(images)
        distilled = self.task.distillation_loss(outputs, taught, self.temperature)
        return (1 - self.weight) * target_loss + self.weight * distilled


def float_teacher(model: nn.Module) -> nn.Module:
    """A copy of a quantized network, in eval mode and without gradients, that computes in float."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for _, quantizer in quantizers(teacher):
        quantizer.enabled, quantizer.observer = False, None
    for rounding in output_quantizers(teacher):
        rounding.simulated = False
    return teacher


def find_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """The name of the first quantizer that meets NaN or infinity, or has it in its range; None if no quantizer does.

    It explains a loss that is not finite. The model runs once in eval mode, and "first" is in the order of that run.
    Afterwards the model is in its old mode.
    """
    found: list[str] = []
    before = {}
    for name, quantizer in quantizers(model):
        before[quantizer] = quantizer.observer
        quantizer.observer = _Finder(name, quantizer, found)
    try:
        with eager_pass(model):
            model(images)
    finally:
        for quantizer, observer in before.items():
            quantizer.observer = observer
    return found[0] if found else None


class _Finder:
    def __init__(self, name: str, quantizer: TensorQuantizer, found: list[str]) -> None:
        self._name = name
        self._quantizer = quantizer
        self._found = found

    def observe(self, x: Tensor) -> None:
        broken = self._quantizer.enabled and not self._quantizer.calibrated
        if broken or not bool(torch.isfinite(x).all()):
            self._found.append(self._name)

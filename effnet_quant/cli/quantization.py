"""The flags that say how a network is quantized, and how it is trained so."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from effnet_quant.api import create_model
from effnet_quant.errors import UserError
from effnet_quant.quantization.qat import (
    Distillation,
    find_not_finite,
    follow_ranges,
    freeze_batch_norm,
    freeze_ranges,
    gradual_start,
    reestimate_batch_norm,
)
from effnet_quant.quantization.spec import PRESETS, QuantSpec, resolve_spec
from effnet_quant.tasks.task import Loss
from effnet_quant.training.callback import Callback
from effnet_quant.training.trainer import Trainer

SPEC_KEY, TARGET_KEY = "quant_spec", "quant_target"  # in the metadata of checkpoints and weights


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """--quant-spec and --quant-override."""
    parser.add_argument(
        "--quant-spec",
        metavar="SPEC",
        help=f"{', '.join(PRESETS)}, or a YAML file (default: what the weights say, else w8a8)",
    )
    parser.add_argument(
        "--quant-override",
        metavar="PATTERN=SPEC",
        action="append",
        help="another preset, or 'float', for the modules that a pattern matches, e.g. 'stem=w8a16'; may be repeated",
    )


def add_qat_arguments(parser: argparse.ArgumentParser) -> None:
    """How to train with fake quantization."""
    add = parser.add_argument
    add("--gradual-start", type=int, default=0, metavar="EPOCHS", help="switch the quantizers on one after another")
    add("--follow-ranges", type=int, default=0, metavar="EPOCHS", help="let fixed ranges follow the data at first")
    add(
        "--freeze-bn",
        type=int,
        metavar="EPOCH",
        help="from this epoch (0 is the first) on, leave BatchNorm's statistics",
    )
    add("--reestimate-bn", action="store_true", help="measure BatchNorm's statistics anew after every epoch")
    add("--distill", metavar="FILE", help="float weights of the same model, a teacher for the training")
    add("--distill-temperature", type=float, default=2.0, help="divides the logits of teacher and student")
    add("--distill-weight", type=float, default=0.5, help="the teacher's share of the loss")


def check_qat_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError where one of ``add_qat_arguments`` has a value that means nothing."""
    for flag in ("gradual_start", "follow_ranges", "freeze_bn"):
        value = getattr(arguments, flag)
        if value is not None and value < 0:
            raise UserError(f"--{flag.replace('_', '-')} must be 0 or more, not {value}.")
    if arguments.distill_temperature <= 0:
        raise UserError(f"--distill-temperature must be above 0, not {arguments.distill_temperature}.")
    if not 0 <= arguments.distill_weight <= 1:
        raise UserError(f"--distill-weight must be between 0 and 1, not {arguments.distill_weight}.")


def chosen_spec(arguments: argparse.Namespace, metadata: dict[str, Any]) -> QuantSpec:
    """The spec of the command line; without one that of the weights' metadata, else w8a8.

    Raises:
        UserError: unknown preset, or a file or an override that can't be read.
    """
    given = getattr(arguments, "quant_spec", None)
    if given is None:
        spec = resolve_spec(metadata.get(SPEC_KEY, "w8a8"))
    elif Path(given).suffix in (".yml", ".yaml"):
        spec = resolve_spec(_read_yaml(Path(given)))
    else:
        spec = resolve_spec(given)
    overrides = []
    for override in getattr(arguments, "quant_override", None) or ():
        pattern, separator, name = override.rpartition("=")
        if not separator or not pattern:
            raise UserError(f"--quant-override {override}: expected a pattern and a preset, such as 'stem=w8a16'.")
        overrides.append((pattern, name))
    changed = spec.with_overrides(overrides)
    # the command line that made the file, given again, changes nothing
    repeated = given is None and changed.overrides[len(spec.overrides) :] == spec.overrides[-len(overrides) :]
    return spec if repeated else changed


def same_grids(spec: QuantSpec, metadata: dict[str, Any]) -> bool:
    """Whether the ranges of a file, which says in its metadata what it is, fit ``spec``; a file that says nothing is taken
    to fit. Fixed ranges may become learned ones."""
    said = metadata.get(SPEC_KEY)
    return said is None or _all_learned(resolve_spec(said)) == _all_learned(spec)


def _all_learned(spec: QuantSpec) -> QuantSpec:
    overrides = tuple((name, None if other is None else other.learned()) for name, other in spec.overrides)
    return replace(spec.learned(), overrides=overrides)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--quant-spec {path} can't be read: {reason}") from error


class QatSchedule(Callback):
    """What happens to quantizers and BatchNorm between the epochs of a training.

    Every epoch ends with all quantizers on: what is validated, and may be the best, is the network that will be used.

    Args:
        trainer: of the network.
        arguments: of ``add_qat_arguments``.
        calibration_batches: gives the images that BatchNorm's statistics are measured on.
    """

    def __init__(
        self,
        trainer: Trainer,
        arguments: argparse.Namespace,
        calibration_batches: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._trainer = trainer
        self._model = trainer.model
        self._arguments = arguments
        self._calibration_batches = calibration_batches

    def on_epoch_start(self, epoch: int) -> None:
        gradual_start(self._model, epoch, self._arguments.gradual_start)
        freeze_ranges(self._model)
        if epoch < self._arguments.follow_ranges:
            follow_ranges(self._model)
        if self._arguments.freeze_bn is not None and epoch >= self._arguments.freeze_bn:
            freeze_batch_norm(self._model)

    def on_divergence(self, images: Tensor) -> str | None:
        return find_not_finite(self._model, images)

    def on_epoch_end(self, epoch: int) -> None:
        gradual_start(self._model, epoch, 0)
        # an early stop, or the best epoch, may be any; frozen statistics are in use until the last
        frozen = self._arguments.freeze_bn is not None and epoch >= self._arguments.freeze_bn
        if self._arguments.reestimate_bn and (not frozen or epoch + 1 == self._trainer.config.epochs):
            for model in self._trainer.models:
                reestimate_batch_norm(model, self._calibration_batches())


def distilled(loss: Loss, arguments: argparse.Namespace, model_options: dict[str, Any], model: nn.Module) -> Loss:
    """``loss`` mixed with the teacher's of ``--distill``, on the device of ``model``."""
    device = next(model.parameters()).device
    teacher = create_model(arguments.arch, arguments.num_classes, arguments.distill, quantized=False, **model_options)
    memory_format = torch.channels_last if arguments.memory_format == "nhwc" else torch.contiguous_format
    teacher = teacher.to(device, memory_format=memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]
    if arguments.compile:
        teacher.compile()
    distillation = Distillation(teacher, arguments.distill_temperature, arguments.distill_weight)

    def mixed(logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        return distillation.loss(loss(logits, targets, images), logits, images)

    return mixed

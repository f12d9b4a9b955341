"""What main.py and quant_main.py have in common: from arguments to data, model and trainer."""

from __future__ import annotations

import argparse
import os
import random
import sys
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from effnet_quant.api import create_model
from effnet_quant.cli.arguments import model_options, refuse_unavailable
from effnet_quant.data.loaders import Loader
from effnet_quant.data.sources import DIGITS, ImageSource, SyntheticSource, open_sources, open_validation
from effnet_quant.data.transforms import CROP_MARGIN, Preprocessing, evaluation_transform, training_transform
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import load_weights, read_weights
from effnet_quant.training.checkpoint import load_checkpoint, prepare_workspace
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.trainer import Interrupted, Trainer

SYNTHETIC_IMAGES = 1_281_167  # of ImageNet's training set, so that an epoch has its length


@dataclass
class Job:
    """A run that is ready to start.

    Attributes:
        has_ranges: whether every quantizer of the model has a range (True for a float model).
    """

    model: nn.Module
    trainer: Trainer
    config: TrainConfig
    recorder: Recorder
    preprocessing: Preprocessing
    device: torch.device
    train: Loader | None
    train_source: ImageSource | None
    val: Loader
    has_ranges: bool


def prepare(arguments: argparse.Namespace) -> Job:
    """Check everything a user may have got wrong, then build the run; nothing is written before all checks have passed.

    Raises:
        UserError: what is wrong, and the way out.
    """
    refuse_unavailable(arguments)
    entry = get_entry(arguments.arch)
    config = _config(arguments)
    preprocessing = _preprocessing(arguments, entry.image_size)
    train_source, val_source = _open_sources(arguments, preprocessing)
    classes = val_source.classes
    if len(classes) != arguments.num_classes:
        raise UserError(
            f"{arguments.data} has {len(classes)} classes, but the model has {arguments.num_classes}; "
            f"pass --num-classes {len(classes)}."
        )
    torch.manual_seed(config.seed)
    model = create_model(arguments.arch, arguments.num_classes, **model_options(arguments))
    has_ranges = not entry.quantized
    checkpoint: dict[str, Any] | None = None
    if arguments.resume:
        checkpoint, has_ranges = load_checkpoint(arguments.resume), True
    elif arguments.pretrained_from_file:
        has_ranges = load_weights(model, read_weights(arguments.pretrained_from_file))
    workspace = prepare_workspace(arguments.workspace)
    recorder = Recorder(workspace / arguments.raport_file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.amp and device.type == "cpu":
        print("no GPU: --amp runs in bfloat16, without a loss scale", flush=True)
    metadata = {
        "arch": arguments.arch,
        "num_classes": arguments.num_classes,
        "classes": classes,
        "preprocessing": preprocessing.to_json(),
    }
    trainer = Trainer(model, config, preprocessing, device, workspace, recorder, metadata)
    if checkpoint is not None:
        trainer.resume(checkpoint, arguments.resume)
    loading = {"workers": arguments.workers, "prefetch": arguments.prefetch}
    evaluation = evaluation_transform(preprocessing)
    train = None
    if train_source is not None:
        augmented = training_transform(preprocessing, autoaugment=arguments.augmentation == "autoaugment")
        transform = augmented if train_source.augmentable else evaluation
        train = Loader(train_source, transform, config.batch_size, shuffle=True, seed=config.seed, **loading)
    val = Loader(val_source, evaluation, config.batch_size, **loading)
    return Job(model, trainer, config, recorder, preprocessing, device, train, train_source, val, has_ranges)


def train_or_evaluate(job: Job, arguments: argparse.Namespace) -> int:
    """The part after everything is prepared: ``--evaluate``, or training; returns the process's exit status."""
    if arguments.evaluate:
        metrics = job.trainer.evaluate(job.val)
        job.recorder.record(metrics)
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
        return 0
    assert job.train is not None
    try:
        job.trainer.fit(job.train, job.val)
    except Interrupted as interruption:
        path = os.path.join(arguments.workspace, arguments.checkpoint_filename)
        kept = f"; go on with --resume {path}" if job.config.save_checkpoints else ", without a checkpoint"
        print(f"{interruption}{kept}", file=sys.stderr)
        return 128 + interruption.signal_number
    return 0


def _config(arguments: argparse.Namespace) -> TrainConfig:
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig) if field.name in arguments}
    values["channels_last"] = arguments.memory_format == "nhwc"
    if arguments.seed is None:
        values["seed"] = random.SystemRandom().randrange(2**31)
    config = TrainConfig(**values)
    if config.batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {config.batch_size}; change --batch-size.")
    if config.optimizer_batch_size >= 0 and (
        config.optimizer_batch_size < config.batch_size or config.optimizer_batch_size % config.batch_size
    ):
        raise UserError(
            f"--optimizer-batch-size {config.optimizer_batch_size} must be a multiple of "
            f"--batch-size {config.batch_size}."
        )
    if config.nesterov and (config.optimizer != "sgd" or config.momentum <= 0):
        raise UserError("--nesterov goes with --optimizer sgd and a momentum above 0.")
    return config


def _preprocessing(arguments: argparse.Namespace, default_size: int) -> Preprocessing:
    size = arguments.image_size or default_size
    margin = 0 if arguments.data == DIGITS else CROP_MARGIN  # a digit fills its image
    return Preprocessing(size, size + margin, arguments.interpolation)


def _open_sources(
    arguments: argparse.Namespace, preprocessing: Preprocessing
) -> tuple[ImageSource | None, ImageSource]:
    if arguments.data_backend == "synthetic":
        source = SyntheticSource(SYNTHETIC_IMAGES, arguments.num_classes, preprocessing.image_size)
        return source, source
    if arguments.evaluate:
        return None, open_validation(arguments.data)
    return open_sources(arguments.data)

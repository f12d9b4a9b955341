"""The preset: settings for a good training that the data and the machine choose. docs/training.md has the table."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from effnet_quant.card import ModelCard
from effnet_quant.data.data_argument import open_sources
from effnet_quant.data.inspection import counts, is_random_access, look
from effnet_quant.data.sources import ImageSource
from effnet_quant.engines.cpu import cpu_flags, cpu_has_bf16
from effnet_quant.errors import UserError
from effnet_quant.models.download import within_reach
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.registry import get_entry
from effnet_quant.terminal import printable
from effnet_quant.training.config import TrainConfig

FEWEST = 5  # training images of a class
PRETRAINED = "torchvision:mobilenet_v2"  # of the networks with published weights, the one that gains most from 8 bits
FROM_NOTHING = "small-resnet9"
_SMALL, _MEDIUM = 48, 96  # pixels of the shorter side, up to which a picture counts as small or medium
_LOOKED_AT = 64  # pictures whose size is read
_MOST_WORKERS = 8
_SMALLEST_CROP = 0.4  # of the area; NVIDIA's 0.08 is for ImageNet's million images


@dataclass(frozen=True)
class Row:
    """A row of the table: the settings for at most so many training images."""

    images: float
    epochs: int
    batch_size: int
    lr: float


# a training of few images repeats them often; a small batch gives it enough steps
ROWS_FROM_NOTHING = (
    Row(400, 300, 16, 0.03),
    Row(3_000, 150, 32, 0.05),
    Row(12_000, 60, 64, 0.1),
    Row(40_000, 30, 128, 0.1),
    Row(float("inf"), 20, 128, 0.1),
)
ROWS_FROM_WEIGHTS = (
    Row(400, 30, 16, 0.01),
    Row(3_000, 12, 32, 0.01),
    Row(12_000, 6, 32, 0.01),
    Row(40_000, 4, 64, 0.02),
    Row(float("inf"), 3, 64, 0.02),
)


@dataclass(frozen=True)
class Facts:
    """What the preset looks at.

    Attributes:
        images: number of training images.
        classes: number of classes.
        side: median of the pictures' shorter sides in pixels; None if they can't be looked at cheaply.
    """

    images: int
    classes: int
    side: float | None


@dataclass(frozen=True)
class Preset:
    """The settings that data and machine choose.

    Attributes:
        arch: the network.
        image_size: in pixels.
        pretrained: whether the network starts from its published weights.
        smallest_crop: as in ``DataConfig``.
        config: hyperparameters.
        said: sentences that say what was chosen, and from what.
    """

    arch: str
    image_size: int
    pretrained: bool
    smallest_crop: float
    config: TrainConfig
    said: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """The settings by the names of main.py's flags."""
        config = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        layout = "nhwc" if config.pop("channels_last") else "nchw"
        own = {name: getattr(self, name) for name in ("arch", "image_size", "pretrained", "smallest_crop")}
        return {**config, **own, "memory_format": layout}


def choose_preset(data: str, arch: str | None = None, said: ModelCard | None = None) -> Preset:
    """Choose settings for the images of ``data``.

    Args:
        data: the DATA argument.
        arch: a network to take in place of the preset's.
        said: the card of the weights that the training starts from; None if it starts from no file.

    Raises:
        UserError: there is no such data, it has one class, a class has too few images, or the network is not known.
    """
    facts = examine(data)
    file = said is not None
    if said is not None and arch is None and said.arch is None:
        raise UserError("the weights do not say of which network they are; give its name with --arch.")
    entry, pretrained, sentence = _network(arch or (said.arch if said else None), file=file)
    from_weights = file or pretrained
    size = said.input.image_size if said and said.input else _image_size(entry, facts, from_weights=from_weights)
    config = _config(facts, size, from_weights=from_weights)
    pictures = f", pictures of about {facts.side:g} px" if facts.side else ""
    found = f"from {data}: {facts.images:,} training images of {facts.classes} classes{pictures}"
    return Preset(entry.name, size, pretrained, _SMALLEST_CROP, config, (found, *sentence))


def chosen(values: Mapping[str, Any]) -> str:
    """A sentence for the most important ones of settings, named as by ``Preset.values``."""
    return (
        f"trains {values['arch']} at {values['image_size']} px, {values['epochs']} epochs of batches of "
        f"{values['batch_size']}, learning rate {values['lr']:g}; a flag changes each"
    )


def examine(data: str) -> Facts:
    """Count the images of ``data`` and look at the size of some.

    Raises:
        UserError: there is no such data, it has one class, or a class has too few images.
    """
    train, _ = open_sources(data)
    if len(train.classes) < 2:
        raise UserError(
            f"{data} has one class, {printable(train.classes[0])}; a classifier needs two or more, a folder each."
        )
    if not is_random_access(train):  # shards, which would have to be read whole
        return Facts(len(train), len(train.classes), None)
    _check_counts(data, train.classes, counts(train).tolist())
    return Facts(len(train), len(train.classes), _shorter_side(train))


def _check_counts(data: str, classes: list[str], images: list[int]) -> None:
    fewest = min(images)
    name = printable(classes[images.index(fewest)])
    if fewest == 0:
        raise UserError(f"the class {name} of {data} has no training images; add some, or remove its folder.")
    if fewest < FEWEST:
        raise UserError(
            f"the class {name} of {data} has {fewest} training image{'s' * (fewest > 1)}; give at least {FEWEST} of every "
            "class, better 100."
        )


def _shorter_side(source: ImageSource) -> float | None:
    *_, findings = look(source, decode=False, workers=0, limit=_LOOKED_AT)
    sizes = findings.sizes
    return statistics.median(min(size) for size in sizes) if sizes else None


def _network(arch: str | None, *, file: bool) -> tuple[ModelEntry, bool, Sequence[str]]:
    """The network, whether its published weights can be had, and a sentence about them."""
    entry = get_entry(arch or PRETRAINED)
    if file:
        return entry, False, ()
    if entry.weights_at is None:
        reason = f"{entry.name} has no published weights"
    elif not within_reach(entry.weights_at):
        reason = f"the published weights of {entry.name} can't be reached"
    else:
        try:
            entry.pretrained()  # it stays in the cache for the run
            return entry, True, (f"starts from the published weights of {entry.name}",)
        except UserError as error:
            reason = str(error).rstrip(".")
    return (
        entry if arch else get_entry(FROM_NOTHING),
        False,
        (f"{reason}: starts from random weights (weights in a file: --pretrained-from-file)",),
    )


def _image_size(entry: ModelEntry, facts: Facts, *, from_weights: bool) -> int:
    """In pixels. A CPU trains at a smaller size than a GPU, to end in minutes."""
    side = facts.side or _MEDIUM + 1
    if from_weights:
        most = 128 if side <= _MEDIUM else 224 if torch.cuda.is_available() else 160
    elif entry.name == FROM_NOTHING:
        most = 32 if side <= _SMALL else 64
        return most
    else:
        most = 64 if side <= _SMALL else 128
    return min(entry.input.image_size, most)


def _config(facts: Facts, size: int, *, from_weights: bool) -> TrainConfig:
    rows = ROWS_FROM_WEIGHTS if from_weights else ROWS_FROM_NOTHING
    row = next(row for row in rows if facts.images <= row.images)
    amp, amp_dtype = _precision()
    return TrainConfig(
        epochs=row.epochs,
        batch_size=min(row.batch_size, max(facts.images // 4, 2)),  # a batch that is not full is left out
        lr=row.lr,
        lr_schedule="cosine",
        warmup=min(5, row.epochs // 4),
        label_smoothing=0.1,
        weight_decay=1e-4 if from_weights else 5e-4,
        nesterov=True,
        mixup=0.0 if from_weights else 0.2,
        amp=amp,
        amp_dtype=amp_dtype,
        channels_last=True,
        # small pictures are read faster than a process hands them over
        workers=0 if size <= _MEDIUM and (facts.side or size + 1) <= _MEDIUM else min(_cores(), _MOST_WORKERS),
        print_freq=50,
        seed=0,
    )


def _precision() -> tuple[bool, str | None]:
    """Mixed precision in bfloat16 where the processor has instructions for it."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_flags() is not None and cpu_has_bf16()
    return fast, "bf16" if fast else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The frozen configuration of a training run. The trainer reads it and no command-line arguments."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from effnet_quant.errors import UserError


@dataclass(frozen=True)
class Allowed:
    """The numbers that a setting accepts: as a test, and in words for messages."""

    contains: Callable[[float], bool]
    words: str


AT_LEAST_ONE = Allowed(lambda value: value >= 1, "at least 1")
NOT_NEGATIVE = Allowed(lambda value: 0 <= value < math.inf, "0 or more")
SHARE = Allowed(lambda value: 0 <= value <= 1, "between 0 and 1")
ABOVE_ZERO = Allowed(lambda value: value > 0, "above 0")
ABOVE_ZERO_TO_ONE = Allowed(lambda value: 0 < value <= 1, "above 0 and at most 1")
_ALLOWED = {
    "batch_size": AT_LEAST_ONE,
    "print_freq": AT_LEAST_ONE,
    "topk": AT_LEAST_ONE,
    "workers": NOT_NEGATIVE,
    "epochs": NOT_NEGATIVE,
    "run_epochs": Allowed(lambda value: value >= -1, "-1 (all that are left) or more"),
    "warmup": NOT_NEGATIVE,
    "lr": NOT_NEGATIVE,
    "end_lr": NOT_NEGATIVE,
    "momentum": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "gather_checkpoints": Allowed(lambda value: value >= -1, "-1 (all) or more"),
    "checkpoint_every_steps": NOT_NEGATIVE,
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
    "use_ema": SHARE,
    "rmsprop_alpha": SHARE,
    "rmsprop_eps": NOT_NEGATIVE,
    "layer_decay": Allowed(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "clip_grad_norm": ABOVE_ZERO,
    "random_erasing": SHARE,
    "seed": Allowed(lambda value: 0 <= value < 2**63, "between 0 and 2**63 - 1"),
    "static_loss_scale": ABOVE_ZERO,
    "prof": Allowed(lambda value: value == -1 or value >= 1, "-1 (all batches) or at least 1"),
    "label_smoothing": SHARE,
}


def check_allowed(name: str, value: float | None, allowed: Allowed) -> None:
    """Raises UserError if a setting's number is not allowed. None means not set."""
    if value is not None and not allowed.contains(value):
        raise UserError(f"--{name.replace('_', '-')} must be {allowed.words}, not {value}.")


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters and run control, named after NVIDIA's flags.

    Attributes:
        epochs: epochs of the whole training, which the learning-rate schedule spans.
        run_epochs: epochs of this run; -1 for all that are left.
        lr_schedule: "step", "linear" or "cosine".
        warmup: epochs of linear warm-up.
        optimizer: "sgd", "rmsprop" or "adamw".
        momentum: of SGD and RMSprop; beta1 of AdamW, whose beta2 is 0.999 and whose epsilon is 1e-8.
        layer_decay: factor of the learning rate from each layer to the one before it; 1 for one rate. See ``layer_depths``.
        clip_grad_norm: the largest norm of all gradients together; larger ones are scaled down. None for no limit.
        freeze: patterns of modules and parameters that are not trained; see ``freeze``.
        bn_weight_decay: whether BatchNorm's parameters decay too.
        batch_size: images per batch of one process.
        workers: processes that read images. For shards, the order of images depends on their number.
        optimizer_batch_size: images per optimizer step, over all processes: a multiple of processes x batch_size. -1 for one
            batch of each process.
        mixup: alpha of mixup's Beta distribution; 0 for no mixup.
        random_erasing: probability with which a box of a training image is erased; see ``erase``.
        cutmix: alpha of CutMix's Beta distribution; 0 for no CutMix. With both, each batch takes one of them at random.
        use_ema: decay of the moving average of the weights; None for no average.
        amp: autocast, to float16 with a scaled loss on CUDA and to bfloat16 on the CPU.
        amp_dtype: "fp16" or "bf16", to override autocast's type.
        static_loss_scale: the loss scale of float16. It stays fixed unless ``dynamic_loss_scale`` lets it grow.
        compile: use torch.compile.
        prof: batches per epoch; -1 for all. The first tenth is warm-up and left out of the speeds.
        early_stopping_patience: epochs without a better score before training stops; -1 for never.
        gather_checkpoints: how many epochs' checkpoints to keep beside the latest and the best; -1 for all.
        checkpoint_every_steps: optimizer steps between two checkpoints within an epoch; 0 for none.
        topk: k of a classifier's second accuracy, val.topk.
        channels_last: memory format NHWC.
        print_freq: batches between two progress lines where there is no terminal.
        seed: seed of all random numbers; None for a random seed, which checkpoints store.

    Raises:
        UserError: a value is not allowed, or two settings exclude each other. The message names main.py's flag.
    """

    epochs: int = 90
    run_epochs: int = -1
    lr: float = 0.1
    lr_schedule: str = "step"
    end_lr: float = 0.0
    warmup: int = 0
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bn_weight_decay: bool = False
    nesterov: bool = False
    rmsprop_alpha: float = 0.9
    rmsprop_eps: float = 1e-3
    layer_decay: float = 1.0
    clip_grad_norm: float | None = None
    freeze: tuple[str, ...] = ()
    batch_size: int = 256
    workers: int = 0
    optimizer_batch_size: int = -1
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0
    use_ema: float | None = None
    amp: bool = False
    amp_dtype: str | None = None
    static_loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    compile: bool = False
    prof: int = -1
    early_stopping_patience: int = -1
    gather_checkpoints: int = 0
    checkpoint_every_steps: int = 0
    topk: int = 5
    channels_last: bool = False
    print_freq: int = 10
    seed: int | None = 0
    training_only: bool = False
    save_checkpoints: bool = True
    checkpoint_filename: str = "checkpoint.pth.tar"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            check_allowed(name, getattr(self, name), allowed)
        filename = self.checkpoint_filename
        if not filename or os.path.basename(filename) != filename:
            raise UserError(
                f"--checkpoint-filename names a file in the workspace, without a folder; '{filename}' does not."
            )
        if re.fullmatch(r"model_best\.pth\.tar|checkpoint_\d+\.pth\.tar", filename):
            raise UserError(
                f"--checkpoint-filename {filename} is the name of the best or of an epoch's checkpoint; choose another."
            )
        if self.amp_dtype is not None and not self.amp:
            raise UserError(f"--amp-dtype {self.amp_dtype} says what --amp computes in; give both.")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum <= 0):
            raise UserError("--nesterov goes with --optimizer sgd and a momentum above 0.")
        if self.optimizer == "adamw" and self.momentum >= 1:
            raise UserError("--momentum is AdamW's beta1, which must be below 1.")

    def check_processes(self, processes: int) -> None:
        """Raises UserError if ``optimizer_batch_size`` is not a multiple of processes x batch_size."""
        together = self.batch_size * processes
        if self.optimizer_batch_size >= 0 and (
            self.optimizer_batch_size < together or self.optimizer_batch_size % together
        ):
            by = f" by {processes} processes" if processes > 1 else ""
            raise UserError(
                f"--optimizer-batch-size {self.optimizer_batch_size} must be a multiple of "
                f"--batch-size {self.batch_size}{by}."
            )

    def batches_per_step(self, processes: int) -> int:
        """Number of batches of one process whose gradients are averaged for one optimizer step."""
        return 1 if self.optimizer_batch_size < 0 else self.optimizer_batch_size // (self.batch_size * processes)

"""The frozen configuration of a training run; nothing downstream of it reads command-line arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters and run control, named after NVIDIA's flags.

    Attributes:
        epochs: epochs of the whole training, which the learning-rate schedule spans.
        run_epochs: epochs of this run, -1 for all that are left.
        lr_schedule: "step", "linear" or "cosine".
        warmup: epochs of linear warm-up.
        optimizer: "sgd" or "rmsprop".
        bn_weight_decay: whether BatchNorm's parameters decay too.
        optimizer_batch_size: images an optimizer step, -1 for the batch size (else a multiple of it).
        amp: autocast, to float16 with a scaled loss on CUDA and to bfloat16 on the CPU.
        static_loss_scale: the fixed scale of the loss under float16.
        prof: batches an epoch, -1 for all.
        early_stopping_patience: epochs without a better top-1 before training stops, -1 for never.
        gather_checkpoints: how many epochs' checkpoints to keep beside the latest and the best.
        topk: k of the second accuracy, val.topk.
        channels_last: memory format NHWC.
        print_freq: batches between two progress lines where there is no terminal.
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
    batch_size: int = 256
    optimizer_batch_size: int = -1
    amp: bool = False
    static_loss_scale: float = 1.0
    prof: int = -1
    early_stopping_patience: int = -1
    gather_checkpoints: int = 0
    topk: int = 5
    channels_last: bool = False
    print_freq: int = 10
    seed: int = 0
    training_only: bool = False
    save_checkpoints: bool = True
    checkpoint_filename: str = "checkpoint.pth.tar"

    @property
    def batches_per_step(self) -> int:
        """Batches whose gradients are averaged before the optimizer steps."""
        return 1 if self.optimizer_batch_size < 0 else self.optimizer_batch_size // self.batch_size

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
        batch_size: images a batch of one process.
        workers: processes that read images for it; the order of images from shards depends on how many.
        optimizer_batch_size: images an optimizer step of all processes together, -1 for a batch of each (else a multiple
            of that).
        mixup: alpha of the Beta distribution that images are blended by, 0 for no blending.
        cutmix: alpha of the Beta distribution that boxes of images are exchanged by, 0 for none; with both, a coin decides.
        use_ema: decay of the moving average of the weights, None for no average.
        amp: autocast, to float16 with a scaled loss on CUDA and to bfloat16 on the CPU.
        amp_dtype: "fp16" or "bf16" for another choice.
        static_loss_scale: the scale of the loss under float16; fixed, unless ``dynamic_loss_scale`` lets it grow.
        compile: torch.compile.
        prof: batches an epoch, -1 for all; the first tenth is warm-up and left out of the speeds.
        early_stopping_patience: epochs without a better score before training stops, -1 for never.
        gather_checkpoints: how many epochs' checkpoints to keep beside the latest and the best, -1 for all.
        checkpoint_every_steps: optimizer steps between two checkpoints within an epoch, 0 for none.
        topk: k of a classifier's second accuracy, val.topk.
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
    workers: int = 0
    optimizer_batch_size: int = -1
    mixup: float = 0.0
    cutmix: float = 0.0
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
    seed: int = 0
    training_only: bool = False
    save_checkpoints: bool = True
    checkpoint_filename: str = "checkpoint.pth.tar"

    def batches_per_step(self, processes: int) -> int:
        """Batches of one process whose gradients are averaged before the optimizer steps."""
        return 1 if self.optimizer_batch_size < 0 else self.optimizer_batch_size // (self.batch_size * processes)

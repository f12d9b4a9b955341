"""The frozen settings of a run beside TrainConfig: its images, its place on disk and its starting point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.training.config import AT_LEAST_ONE, NOT_NEGATIVE, check_allowed


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are loaded.

    Attributes:
        data: a folder with train/ and val/, or what else docs/data.md lists.
        backend: "pytorch", "dali-cpu", "dali-gpu" or "synthetic".
        prefetch: batches that each worker prepares ahead.
        max_bad_images: unreadable images that are reported and left out before a run gives up.
        augmentation: the policy that training images go through: "autoaugment", "randaugment", "trivialaugment" or None.

    Raises:
        UserError: a number that means nothing.
    """

    data: str
    backend: str = "pytorch"
    prefetch: int = 2
    max_bad_images: int = 50
    augmentation: str | None = None

    def __post_init__(self) -> None:
        check_allowed("prefetch", self.prefetch, AT_LEAST_ONE)
        check_allowed("max_bad_images", self.max_bad_images, NOT_NEGATIVE)


@dataclass(frozen=True)
class PlaceConfig:
    """Where a run writes, and which device settings it wants.

    Attributes:
        workspace: folder of checkpoints and logs.
        raport_file: name of the metrics log in the workspace.
        tensorboard: whether metrics go to TensorBoard too.
        wandb: project of Weights & Biases that metrics go to, or None.
        tf32: on a GPU, TF32 instead of float32 in convolutions and products.
        gpu_affinity: how processes are bound to the CPU cores near their GPU; "none" for not at all.
    """

    workspace: str = "./"
    raport_file: str = "experiment_raport.json"
    tensorboard: bool = False
    wandb: str | None = None
    tf32: bool = True
    gpu_affinity: str = "none"


@dataclass(frozen=True)
class StartConfig:
    """What a run starts from; random weights without any of these.

    Attributes:
        weights: a weights file, or a checkpoint of which the weights alone are taken.
        ema: of a checkpoint's weights, take their moving average.
        pretrained: take the model's published weights.
        new_classifier: keep the model's own classifier where the weights are for another number of classes.
        resume: a checkpoint to go on from, with optimizer and position.
        options: of the network, as ``create_model`` takes them.

    Raises:
        UserError: two of them bring weights.
    """

    weights: str | None = None
    ema: bool = False
    pretrained: bool = False
    new_classifier: bool = False
    resume: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pretrained and self.weights:
            raise UserError("--pretrained and --pretrained-from-file both bring weights; give one of them.")
        if self.ema and not self.weights:
            raise UserError("--ema chooses among the weights of a checkpoint; give it with --pretrained-from-file.")

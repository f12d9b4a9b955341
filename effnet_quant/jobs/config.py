"""The frozen settings of a run beside TrainConfig: its images, its folder and its starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.training.config import ABOVE_ZERO_TO_ONE, AT_LEAST_ONE, NOT_NEGATIVE, check_allowed


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are loaded.

    Attributes:
        data: a folder with train/ and val/, or another name from docs/data.md.
        backend: "pytorch", "dali-cpu", "dali-gpu" or "synthetic".
        prefetch: batches that each worker prepares ahead.
        max_bad_images: how many unreadable images are reported and left out; one more ends the run.
        augmentation: policy for training images: "autoaugment", "randaugment", "trivialaugment" or None.
        smallest_crop: share of an image's area that a random crop for training has at least.

    Raises:
        UserError: a number is not allowed.
    """

    data: str
    backend: str = "pytorch"
    prefetch: int = 2
    max_bad_images: int = 50
    augmentation: str | None = None
    smallest_crop: float = 0.08

    def __post_init__(self) -> None:
        check_allowed("prefetch", self.prefetch, AT_LEAST_ONE)
        check_allowed("max_bad_images", self.max_bad_images, NOT_NEGATIVE)
        check_allowed("smallest_crop", self.smallest_crop, ABOVE_ZERO_TO_ONE)


@dataclass(frozen=True)
class PlaceConfig:
    """Where a run writes, and its device settings.

    Attributes:
        workspace: folder of checkpoints and logs.
        overwrite: whether a new run may replace the checkpoints of an earlier one.
        raport_file: name of the metrics log in the workspace.
        tensorboard: whether metrics go to TensorBoard too.
        wandb: project of Weights & Biases that gets the metrics, or None.
        tf32: on a GPU, TF32 instead of float32 in convolutions and matrix products.
        gpu_affinity: how to bind processes to the CPU cores near their GPU; "none" for no binding.
    """

    workspace: str = "./"
    overwrite: bool = False
    raport_file: str = "experiment_raport.json"
    tensorboard: bool = False
    wandb: str | None = None
    tf32: bool = True
    gpu_affinity: str = "none"


@dataclass(frozen=True)
class StartConfig:
    """What a run starts from. The default is random weights.

    Attributes:
        weights: a weights file, or a checkpoint, from which only the weights are read.
        ema: read the moving average of a checkpoint's weights.
        pretrained: use the model's published weights.
        new_classifier: start with a new classifier if the weights have another number of classes.
        resume: a checkpoint to continue from, with optimizer and position.
        options: options of the network, as ``create_model`` takes them.

    Raises:
        UserError: weights are given twice, or ``ema`` without ``weights``.
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

"""What the registry knows of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnet_quant.errors import UserError
from effnet_quant.models.weights import Weights, other_class_count

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputSpec:
    """The images that a model was designed for, and that its published weights expect.

    Attributes:
        image_size: height and width, in pixels.
        resize_size: length that the shorter side is scaled to before the centre crop, in pixels.
        interpolation: "bilinear" or "bicubic".
        mean, std: per channel, of values in 0 … 1.
    """

    image_size: int
    resize_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class ModelEntry:
    """One model of the registry.

    Attributes:
        name: as on the command line.
        build: builds the float network from ``num_classes`` and the options of its kind.
        input: the images it takes.
        num_classes: classes of the network by default, and of its published weights.
        quantized: whether quantizers are placed in the network once it is built; None where the name leaves that open,
            and the script or the weights decide.
        weights_at: where its weights are published, None if they are not.
        fetch_weights: gets them.
    """

    name: str
    build: Callable[..., nn.Module]
    input: InputSpec
    num_classes: int = 1000
    quantized: bool | None = None
    weights_at: str | None = None
    fetch_weights: Callable[[], Weights] | None = None

    def create(self, num_classes: int, **options: Any) -> nn.Module:
        """The float network.

        Raises:
            UserError: the network has no such option.
        """
        try:
            return self.build(num_classes=num_classes, **options)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            raise UserError(f"{self.name} has no option '{unknown.group(1)}'; leave it out.") from error

    def pretrained(self) -> Weights:
        """The published weights, downloaded if need be.

        Raises:
            UserError: there are none, or they can't be had.
        """
        if self.fetch_weights is None:
            raise UserError(f"no weights of {self.name} are published; give a file with --pretrained-from-file.")
        return self.fetch_weights()

    def class_count(self, weights: Weights) -> int:
        """Classes of the network that ``weights`` belong to."""
        stated = weights.metadata.get("num_classes")
        if isinstance(stated, int):
            return stated
        return other_class_count(self.shapes(), weights) or self.num_classes

    def shapes(self) -> nn.Module:
        """The float network with the default number of classes, for its names and shapes: without values if possible."""
        try:
            with torch.device("meta"):
                return self.build(num_classes=self.num_classes)
        except NotImplementedError:  # torchvision's RegNets reckon with tensors when they are built
            return self.build(num_classes=self.num_classes)

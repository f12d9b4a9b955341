"""What the registry knows of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnet_quant.card import InputSpec
from effnet_quant.errors import UserError
from effnet_quant.models.weights import Weights, other_class_count


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
        return weights.card.num_classes or other_class_count(self.shapes(), weights) or self.num_classes

    def shapes(self) -> nn.Module:
        """The float network with the default number of classes, for its names and shapes: without values if possible."""
        try:
            with torch.device("meta"):
                return self.build(num_classes=self.num_classes)
        except NotImplementedError:  # torchvision's RegNets reckon with tensors when they are built
            return self.build(num_classes=self.num_classes)

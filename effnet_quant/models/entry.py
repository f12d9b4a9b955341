"""ModelEntry: the registry's description of a model."""

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
        build: builds the float network from ``num_classes`` and the network's options.
        input: the images that the model takes.
        num_classes: number of classes by default, and of the published weights.
        quantized: whether quantizers are placed in the network. None: the script or the weights decide.
        weights_at: where weights are published; None if nowhere.
        fetch_weights: gets the published weights; None if there are none.
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
            UserError: no weights are published, or the download fails.
        """
        if self.fetch_weights is None:
            raise UserError(f"no weights of {self.name} are published; give a file with --pretrained-from-file.")
        return self.fetch_weights()

    def class_count(self, weights: Weights) -> int:
        """The number of classes of ``weights``; the default if neither their card nor their shapes tell it."""
        return weights.card.num_classes or other_class_count(self.shapes(), weights) or self.num_classes

    def shapes(self, num_classes: int | None = None) -> nn.Module:
        """The float network, for its names and shapes, by default with the default number of classes. Without values if
        possible."""
        count = self.num_classes if num_classes is None else num_classes
        try:
            with torch.device("meta"):
                return self.build(num_classes=count)
        except NotImplementedError:  # torchvision's RegNets compute with tensors when they are built
            return self.build(num_classes=count)

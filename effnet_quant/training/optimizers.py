"""Optimizers with NVIDIA's parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from effnet_quant.training.config import TrainConfig

OPTIMIZERS = ("sgd", "rmsprop")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or RMSprop over two groups: BatchNorm's parameters, which do not decay unless asked for, and all others."""
    normalisation = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bn_decay = config.weight_decay if config.bn_weight_decay else 0.0
    groups = [
        {"params": [p for p in parameters if id(p) in normalisation], "weight_decay": bn_decay},
        {"params": [p for p in parameters if id(p) not in normalisation], "weight_decay": config.weight_decay},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.RMSprop(
        groups, lr=config.lr, alpha=config.rmsprop_alpha, eps=config.rmsprop_eps, momentum=config.momentum
    )

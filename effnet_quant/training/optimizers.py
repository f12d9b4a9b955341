"""SGD, RMSprop and AdamW with NVIDIA's parameter groups, and their state in checkpoints."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.layer_depth import layer_depths

_RANGES = ("_quantizer._amax", "_quantizer._amin")
LR_SCALE = "lr_scale"  # key of a parameter group: its share of the learning rate, as in timm
_OF_THIS_RUN = ("fused", "foreach", LR_SCALE)  # keys of a parameter group that a checkpoint does not decide
_BETA2, _EPSILON = 0.999, 1e-8  # of AdamW, as in its paper
# what an optimizer keeps for each parameter, if it keeps anything
_KEPT = {torch.optim.RMSprop: {"step", "square_avg"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def learned_ranges(model: nn.Module) -> list[nn.Parameter]:
    """The quantizer ranges that training changes, as in the preset w8a8-lsq."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith(_RANGES)]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build SGD, RMSprop or AdamW (Loshchilov and Hutter, arXiv:1711.05101) with NVIDIA's parameter groups.

    BatchNorm's parameters are one group and all others the second. BatchNorm's group decays only with
    ``bn_weight_decay``; SGD then puts all parameters into one group. Learned ranges of quantizers are a further group,
    which never decays. With ``layer_decay``, each of these groups is split by ``layer_depths``, and every group has its
    share of the learning rate as ``lr_scale``. Parameters that require no gradient are in no group.

    SGD and AdamW use one fused kernel for all parameters. RMSprop has no fused kernel and uses ``foreach``.
    """
    normalisation = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranges = {id(parameter) for parameter in learned_ranges(model)}
    if config.bn_weight_decay and config.optimizer == "sgd":
        normalisation = set()
    others = [p for p in parameters if id(p) not in normalisation and id(p) not in ranges]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": config.weight_decay}]
    if normalisation:
        bn_decay = config.weight_decay if config.bn_weight_decay else 0.0
        groups.insert(0, {"params": [p for p in parameters if id(p) in normalisation], "weight_decay": bn_decay})
    if ranges:
        groups.append({"params": [p for p in parameters if id(p) in ranges], "weight_decay": 0.0})
    if config.layer_decay != 1:
        groups = _by_layer(groups, layer_depths(model, ranges), config.layer_decay)
    # SGD's fused kernel fails if some parameters get their first gradient later, as ranges do that are switched on later
    fused = not ranges
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.momentum, _BETA2),
            eps=_EPSILON,
            fused=fused,
            foreach=None if fused else True,
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=fused,
            foreach=None if fused else True,
        )
    return torch.optim.RMSprop(
        groups, lr=config.lr, alpha=config.rmsprop_alpha, eps=config.rmsprop_eps, momentum=config.momentum, foreach=True
    )


def _by_layer(groups: list[dict[str, Any]], depths: dict[int, int], decay: float) -> list[dict[str, Any]]:
    """The groups, each split by layers. The last layer has the whole learning rate, the one before it ``decay`` of it."""
    last = max(depths.values())
    split = []
    for group in groups:
        for depth in sorted({depths[id(parameter)] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if depths[id(parameter)] == depth]
            split.append({**group, "params": members, LR_SCALE: decay ** (last - depth)})
    return split


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, checkpoint: dict[str, Any], source: str
) -> None:
    """Load the states of optimizer and loss scale from a checkpoint, if it has them.

    Raises:
        UserError: the optimizer's state belongs to another optimizer or model.
    """
    of_this_run = [{name: group[name] for name in _OF_THIS_RUN if name in group} for group in optimizer.param_groups]
    try:
        if checkpoint.get("optimizer"):
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:
                _check_group(group, optimizer.defaults)
            for parameter, state in optimizer.state.items():
                if not isinstance(parameter, Tensor):
                    raise ValueError("it has a state without a parameter")
                if missing := _KEPT.get(type(optimizer), set()) - state.keys():
                    raise ValueError(f"it has no {min(missing)} of a parameter")
                for name, value in state.items():
                    state[name] = _checked_state(parameter, value, name)
            for group, own in zip(optimizer.param_groups, of_this_run, strict=True):
                for name in _OF_THIS_RUN:
                    group.pop(name, None)
                group.update(own)
        if checkpoint.get("scaler") and scaler.is_enabled():
            growth_interval = scaler.get_growth_interval()
            scaler.load_state_dict(checkpoint["scaler"])
            scaler.set_growth_interval(growth_interval)  # so is whether the scale grows
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"the optimizer state in {source} does not fit: {error}; resume with the --optimizer, --freeze and "
            "--layer-decay that it was made with."
        ) from error


def _check_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ValueError if a setting of a parameter group is missing or of another kind than the optimizer's own."""
    for name, own in defaults.items():
        if name not in group:
            raise ValueError(f"it has no {name}")
        value = group[name]
        if isinstance(own, tuple):  # AdamW's betas
            is_right = isinstance(value, tuple) and len(value) == len(own) and all(_is_share(beta) for beta in value)
        elif isinstance(own, (bool, type(None))):
            is_right = isinstance(value, (bool, type(None)))
        else:
            is_right = isinstance(value, Real) and math.isfinite(value)
        if not is_right:
            raise ValueError(f"{name} is {value!r:.40}")


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1


def _checked_state(parameter: Tensor, value: Any, name: str) -> Any:
    """A value of a parameter's state, in the memory layout that fused kernels assume. They check nothing themselves.

    Raises:
        ValueError: it has another shape, type or kind than the optimizer's own.
    """
    if name == "step" or value is None:
        if not isinstance(value, (Real, type(None))) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"{name} is {value!r:.40}")
        # fused kernels read a float32 number
        return value.reshape(()).float() if isinstance(value, Tensor) else value
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.dtype != parameter.dtype:
        raise ValueError(f"{name} is no {parameter.dtype} tensor")
    if value.shape != parameter.shape:
        raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)

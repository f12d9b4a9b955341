"""Registry entries of timm's and torchvision's image classifiers, named ``timm:<name>`` and ``torchvision:<name>``.

A library is imported when one of its models is asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.download import fetch
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.weights import Weights, read_weights

# our options -> the libraries' keywords
_TIMM_KEYWORDS = {"dropout": "drop_rate", "survival_prob": "drop_path_rate", "in_channels": "in_chans"}
_TORCHVISION_KEYWORDS = {"dropout": "dropout", "survival_prob": "stochastic_depth_prob"}
# Auxiliary classifiers only help training from scratch. The networks' own normalisation is in InputSpec instead.
_INCEPTION = {"aux_logits": False, "transform_input": False, "init_weights": True}
_INCEPTION_MEAN = _INCEPTION_STD = (0.5, 0.5, 0.5)


def list_external(library: str) -> list[str]:
    """Full names of a library's image classifiers.

    Args:
        library: "timm" or "torchvision".

    Raises:
        UserError: timm is not installed.
    """
    names = _timm().list_models() if library == "timm" else _torchvision_names()
    return [f"{library}:{name}" for name in names]


def external_entry(name: str) -> ModelEntry:
    """The entry of ``timm:<name>`` (the name may have a pretrained tag: resnet50.a1_in1k) or ``torchvision:<name>``.

    Raises:
        UserError: the library is not installed or has no such model. The message names similar models.
    """
    library, _, model = name.partition(":")
    return _timm_entry(model) if library == "timm" else _torchvision_entry(model)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm is not installed; install it with: pip install 'effnet-quant[timm]'.") from error
    return timm


def _timm_entry(model: str) -> ModelEntry:
    timm = _timm()
    name = f"timm:{model}"
    if not timm.is_model(model):
        raise _unknown(name)
    config = timm.get_pretrained_cfg(model)
    if config is None:
        raise UserError(
            f"timm's {model.partition('.')[0]} has no weights with the tag '{model.partition('.')[2]}'; check the tag."
        )
    size = config.input_size[-1]
    published = config.has_weights
    return ModelEntry(
        name,
        partial(_build, partial(timm.create_model, model), _TIMM_KEYWORDS),
        InputSpec(
            size,
            math.floor(size / config.crop_pct),
            config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bilinear",
            tuple(config.mean),
            tuple(config.std),
        ),
        weights_at=f"timm ({config.hf_hub_id or config.url})" if published else None,
        fetch_weights=partial(_timm_weights, model) if published else None,
    )


def _timm_weights(model: str) -> Weights:
    try:
        tensors = _timm().create_model(model, pretrained=True).state_dict()
    except Exception as error:  # timm loads weights in several ways, and each raises its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"timm can't get the weights of {model}: {reason}; get them elsewhere and give the file with "
            "--pretrained-from-file."
        ) from error
    return Weights(tensors, source=f"timm's weights of {model}")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _torchvision_entry(model: str) -> ModelEntry:
    from torchvision import models

    name = f"torchvision:{model}"
    if model not in _torchvision_names():
        raise _unknown(name)
    weights = models.get_model_weights(model).DEFAULT
    transform = weights.transforms()
    fixed = _INCEPTION if model in ("googlenet", "inception_v3") else {}
    return ModelEntry(
        name,
        partial(_build, partial(models.get_model, model, weights=None, **fixed), _TORCHVISION_KEYWORDS),
        InputSpec(
            transform.crop_size[0],
            transform.resize_size[0],
            transform.interpolation.value,
            tuple(_INCEPTION_MEAN if fixed else transform.mean),
            tuple(_INCEPTION_STD if fixed else transform.std),
        ),
        weights_at=weights.url,
        fetch_weights=partial(_torchvision_weights, weights),
    )


def _torchvision_weights(weights: Any) -> Weights:
    published = read_weights(fetch(weights.url))
    return Weights(published.tensors, ModelCard(classes=tuple(weights.meta["categories"])), published.source)


def _build(
    builder: Callable[..., nn.Module],
    keywords: Mapping[str, str],
    *,
    num_classes: int,
    bn_momentum: float | None = None,
    bn_epsilon: float | None = None,
    **options: Any,
) -> nn.Module:
    """Call a library's builder with our options.

    Raises:
        TypeError: the network has no such option. The message is Python's for an unknown keyword argument.
    """
    translated = {}
    for option, value in options.items():
        if option not in keywords:
            raise TypeError(f"unexpected keyword argument '{option}'")
        translated[keywords[option]] = 1 - value if option == "survival_prob" else value
    try:
        model = builder(num_classes=num_classes, **translated)
    except TypeError as error:
        for option in options:
            if f"unexpected keyword argument '{keywords[option]}'" in str(error):
                raise TypeError(f"unexpected keyword argument '{option}'") from error
        raise
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = module.momentum if bn_momentum is None else bn_momentum
            module.eps = module.eps if bn_epsilon is None else bn_epsilon
    return model


def _unknown(name: str) -> UserError:
    library, _, model = name.partition(":")
    names = [full.partition(":")[2] for full in list_external(library)]
    near = [f"{library}:{match}" for match in difflib.get_close_matches(model, names, n=3, cutoff=0.5)]
    hint = f"did you mean: {', '.join(near)}?" if near else f"effnet-quant models '{library}:*' lists them."
    return UserError(f"{library} has no model '{model}'; {hint}")

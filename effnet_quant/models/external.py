"""Registry entries of timm's and torchvision's image classifiers, named ``timm:<name>`` and ``torchvision:<name>``.

``timm:hf-hub:<organisation>/<name>`` is a model of timm's on the Hugging Face hub.

A library is imported when one of its models is asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.download import fetch
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.hub import fetch_from_hub, quiet, read_json
from effnet_quant.models.weights import Weights, read_weights

# our options -> the libraries' keywords
_TIMM_KEYWORDS = {"dropout": "drop_rate", "survival_prob": "drop_path_rate", "in_channels": "in_chans"}
_TORCHVISION_KEYWORDS = {"dropout": "dropout", "survival_prob": "stochastic_depth_prob"}
# Auxiliary classifiers only help training from scratch. The networks' own normalisation is in InputSpec instead.
_INCEPTION = {"aux_logits": False, "transform_input": False, "init_weights": True}
HUB = "hf-hub:"  # before the name of a repository
_MOST_CLASSES = 100_000  # of a model on the hub; ImageNet-21k has 21,843
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


def same_in_libraries(model: str) -> list[str]:
    """The full names of the libraries' networks that are called ``model``."""
    names = [f"torchvision:{model}"] if model in _torchvision_names() else []
    with suppress(UserError):  # timm is not installed
        names += [f"timm:{model}"] if _timm().is_model(model) else []
    return names


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
    if model.startswith(HUB):
        return _hub_entry(model.removeprefix(HUB))
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
    config = _timm().get_pretrained_cfg(model)
    file = None
    if config.hf_hub_id and not config.custom_load:
        # timm's own download retries for a minute if the hub can't be reached
        file = fetch_from_hub(config.hf_hub_id, _safe_filename(config.hf_hub_filename))
    overlay = None if file is None else {"file": str(file)}
    try:
        with quiet():
            tensors = _timm().create_model(model, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except Exception as error:  # timm loads weights in several ways, and each raises its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"timm can't get the weights of {model}: {reason}; get them elsewhere and give the file with "
            "--pretrained-from-file."
        ) from error
    return Weights(tensors, source=f"timm's weights of {model}")


def _safe_filename(filename: str | None) -> str:
    """The safetensors file that stands beside a repository's pickle."""
    if filename in (None, "pytorch_model.bin"):
        return "model.safetensors"
    return f"{filename.rpartition('.')[0]}.safetensors" if "." in filename else filename


def _hub_entry(hub_name: str) -> ModelEntry:
    """The entry of a timm model in a repository of the Hugging Face hub; its name is that of its architecture.

    Raises:
        UserError: the repository can't be read, or it holds no model of timm's.
    """
    timm = _timm()
    path = fetch_from_hub(hub_name, "config.json")
    said = {} if path is None else read_json(path)
    model = said.get("architecture")
    if not isinstance(model, str) or not timm.is_model(model) or "." in model:
        raise UserError(
            f"{hub_name} holds no model of timm's; effnet_quant.from_pretrained loads what effnet_quant.push has written."
        )
    if said.get("model_args"):
        raise UserError(f"{hub_name} changes timm's {model} by arguments of its own, which is not supported.")
    config = said.get("pretrained_cfg", said)
    classes = said.get("num_classes", config.get("num_classes") if isinstance(config, dict) else None)
    if not isinstance(config, dict) or type(classes) is not int or not 0 < classes <= _MOST_CLASSES:
        raise UserError(f"{hub_name} does not say how many classes its model has; check its config.json.")
    usual = _timm_entry(model)
    return replace(
        usual,
        input=_hub_input(config, usual.input, hub_name),
        num_classes=classes,
        weights_at=f"hf-hub:{hub_name}",
        fetch_weights=partial(_hub_weights, model, hub_name, classes),
    )


def _hub_input(config: dict[str, Any], usual: InputSpec, hub_name: str) -> InputSpec:
    """What a repository's config says of the images; ``usual`` where it is silent."""
    try:
        size = int(config.get("input_size", (3, 0, usual.image_size))[-1])
        crop = float(config.get("crop_pct", usual.image_size / usual.resize_size))
        interpolation = config.get("interpolation", usual.interpolation)
        return InputSpec(
            size,
            math.floor(size / crop),
            interpolation if interpolation in ("bilinear", "bicubic") else "bilinear",
            tuple(map(float, config.get("mean", usual.mean))),
            tuple(map(float, config.get("std", usual.std))),
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{hub_name} does not say what images its model takes; check its config.json.") from error


def _hub_weights(model: str, hub_name: str, classes: int) -> Weights:
    path = fetch_from_hub(hub_name, "model.safetensors")
    if path is None:
        raise UserError(f"{hub_name} has no model.safetensors; other formats are not read from strangers.")
    own = read_weights(path)
    return Weights(own.tensors, ModelCard(num_classes=classes), f"hf-hub:{hub_name}")


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

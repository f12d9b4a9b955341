"""save and load: a model, float or quantized in any state, in one file with its card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from effnet_quant.api import Built, build
from effnet_quant.card import ModelCard, parse_json
from effnet_quant.errors import UserError
from effnet_quant.models.weights import load_weights, read_weights, write_weights
from effnet_quant.quantization.placement.insertion import placement_of, quantize, quantizers, simulate_target
from effnet_quant.quantization.quantizer import TensorQuantizer
from effnet_quant.quantization.targets import get_target

STATE_KEY = "effnet_quant.state"  # entry of the file, beside the card


def save(model: nn.Module, path: str | Path, card: ModelCard | None = None) -> None:
    """Write a model to a ``.safetensors`` file: weights, ranges and card, and what ``load`` needs to go on from here.

    Quantizers that are off stay off, and learned ranges stay learned. The file has no optimizer's state; checkpoints of
    ``finetune_quantized`` have it.

    Args:
        model: any model, before or after ``quantize``, calibrated or not, in training or not.
        path: the file; replaced only when the new one is complete.
        card: describes the model; None for the card of a model of ``create_model``. Quantization and target are the model's.

    Raises:
        UserError: another extension, a state that is no tensor, or the file can't be written.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: a model is saved in one format; name the file .safetensors.")
    card = _as_quantized(card or card_of(model), model)
    built = _built(model)
    tensors = model.state_dict()
    if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{others[0]} in the model's state is no tensor; leave it out of the state.")
    state = {
        "options": {} if built is None else dict(built.options),
        "training": model.training,
        "off": [name for name, quantizer in _of_ranges(model) if quantizer.calibrated and not quantizer.enabled],
    }
    # a file can't say that two names share one tensor; load finds that in the model
    own = {name: value.detach().clone() for name, value in tensors.items()}
    write_weights(path, own, card, {STATE_KEY: json.dumps(state)})


def card_of(model: nn.Module) -> ModelCard:
    """What is known of a model: the card that ``build`` made it of, and its quantization. The other fields are open."""
    built = _built(model)
    return _as_quantized(ModelCard() if built is None else built.card, model)


def _as_quantized(card: ModelCard, model: nn.Module) -> ModelCard:
    """``card`` with the quantization of ``model``, and the runtime that it simulates."""
    placed = placement_of(model)
    if placed is None:
        return replace(card, quant_spec=None, target=None, float_operations=())
    left = get_target(placed.target.name).quantized - placed.target.quantized
    return replace(
        card,
        quant_spec=placed.spec.to_json(),
        target=placed.target.name,
        float_operations=tuple(sorted(left)),
    )


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that ``save`` has written, on the CPU, as it was.

    Args:
        path: the file.
        model: the float model of the same class, for a network that is not of ``create_model``: its code is not in the file.
            It is changed in place. Its weights do not matter.

    Raises:
        UserError: the file is missing, damaged or does not fit, or ``model`` is missing or quantized.
    """
    weights = read_weights(path)
    card, state = weights.card, _state(path)
    if model is None:
        if card.arch is None:
            raise UserError(
                f"{path} does not hold the code of its network; make the float model and give it: load(path, model)."
            )
        model = build(card, weights, **state["options"])
    else:
        if any(True for _ in quantizers(model)):
            raise UserError("load takes the float model, before quantize; the quantization is in the file.")
        if card.quant_spec is not None:
            quantize(model, card.quant_spec, target=card.target or "onnxruntime")
        load_weights(model, weights)
    if card.target is not None:
        simulate_target(model, get_target(card.target).leaving_in_float(card.float_operations))
    off = set(state["off"])
    for name, quantizer in _of_ranges(model):
        quantizer.enabled = quantizer.enabled and name not in off
    return model.train(state["training"])


def _built(model: nn.Module) -> Built | None:
    built = getattr(model, "_built", None)
    return built if isinstance(built, Built) else None


def _of_ranges(model: nn.Module) -> list[tuple[str, TensorQuantizer]]:
    """The quantizers whose range is in the state dict."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.role != "gate"
    ]


def _state(path: str | Path) -> dict[str, Any]:
    """The entry STATE_KEY of a file; what holds for a weights file without it."""
    usual: dict[str, Any] = {"options": {}, "training": False, "off": []}
    if Path(path).suffix != ".safetensors":
        return usual
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(STATE_KEY, "{}")
    said = parse_json(text, str(path))
    wrong = not isinstance(said, dict) or any(
        type(said[name]) is not type(usual[name]) for name in set(said) & set(usual)
    )
    if wrong:
        raise UserError(f"{path} describes its model's state in a way that can't be used; save it again.")
    return usual | said

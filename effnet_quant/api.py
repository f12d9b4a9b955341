"""Assembles models: create_model; choose_card, which makes a model's card; and build, which makes the model of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from effnet_quant.card import HARD_SWISH, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.activations import replace_silu
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, load_weights, other_class_count, read_weights
from effnet_quant.quantization.placement.insertion import quantize, quantizers
from effnet_quant.quantization.spec import QuantSpec, resolve_spec, same_grids
from effnet_quant.quantization.targets import get_target

Overrides = Sequence[tuple[str, str]]  # pattern and preset, or "float"


def create_model(
    name: str,
    num_classes: int | None = None,
    weights: str | Path | Weights | None = None,
    *,
    pretrained: bool = False,
    quantized: bool | None = None,
    quant_spec: str | QuantSpec | Mapping[str, Any] | None = None,
    target: str | None = None,
    hard_swish: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model, in training mode, on the CPU.

    Args:
        name: one of ``list_models()``, or ``timm:<name>``, ``torchvision:<name>`` or ``hf-hub:<organisation>/<name>``.
        num_classes: number of classes. None: that of the weights, else the model's default.
        weights: a ``.safetensors``, ``.pth`` or ``.pth.tar`` file to load. None: random initialisation.
        pretrained: load the published weights instead.
        quantized: whether quantizers are placed; they are off until they have ranges. None: by the name for
            ``efficientnet-*``; for other models, if the weights have ranges.
        quant_spec: the quantization spec, as ``resolve_spec`` takes it. None: that of the weights' card, else "w8a8".
        target: the runtime that a quantized network simulates (``simulate_target``). None: that of the weights' card, else
            "tensorrt" for ``efficientnet-quant-*`` and "onnxruntime" for the others.
        hard_swish: replace SiLU by hard-swish (``replace_silu``). None: as the weights' card says, else SiLU.
        **options: of the network, e.g. ``dropout``, ``bn_momentum``, ``survival_prob``, ``in_channels``, and ``se_as_conv``
            of the EfficientNets.

    Raises:
        UserError: unknown name or option, ``hard_swish`` for a network without SiLU, or weights that are missing, damaged
            or do not fit.
    """
    if pretrained and weights is not None:
        raise UserError("weights= and pretrained=True both bring weights; give one of them.")
    given = get_entry(name).pretrained() if pretrained else weights
    if given is not None and not isinstance(given, Weights):
        given = read_weights(given)
    card = choose_card(
        name,
        given,
        num_classes=num_classes,
        quantized=quantized,
        quant_spec=None if quant_spec is None else resolve_spec(quant_spec),
        target=target,
        hard_swish=hard_swish,
    )
    return build(card, given, **options)


def choose_card(
    name: str,
    weights: Weights | None = None,
    *,
    num_classes: int | None = None,
    quantized: bool | None = None,
    quant_spec: QuantSpec | None = None,
    overrides: Overrides = (),
    target: str | None = None,
    hard_swish: bool | None = None,
) -> ModelCard:
    """The card of the model that a name, weights and arguments ask for.

    An argument wins over the weights' card, and the card wins over the model's defaults. The arguments are those of
    ``create_model``; ``overrides`` are added to the spec (``QuantSpec.with_overrides``).

    Raises:
        UserError: unknown name or target, or an invalid override.
    """
    entry = get_entry(name)
    said = ModelCard() if weights is None else weights.card
    if quantized is None:
        quantized = weights is not None and weights.has_ranges if entry.quantized is None else entry.quantized
    if num_classes is None:
        num_classes = entry.num_classes if weights is None else entry.class_count(weights)
    if hard_swish is None:
        hard_swish = said.activation == HARD_SWISH
    card = ModelCard(
        arch=entry.name,  # of a model on the hub: its architecture
        task=said.task,
        num_classes=num_classes,
        classes=said.classes if said.classes is None or len(said.classes) == num_classes else None,
        input=said.input or entry.input,
        activation=HARD_SWISH if hard_swish else None,
    )
    if not quantized:
        return card
    spec = quant_spec or resolve_spec(said.quant_spec or "w8a8")
    changed = spec.with_overrides(overrides)
    # Overrides that the weights' spec ends with already are not added again.
    repeated = quant_spec is None and changed.overrides[len(spec.overrides) :] == spec.overrides[-len(overrides) :]
    spec = spec if repeated else changed
    usual = "tensorrt" if entry.quantized else "onnxruntime"  # efficientnet-quant-* compute NVIDIA's numbers
    return replace(card, quant_spec=spec.to_json(), target=get_target(target or said.target or usual).name)


def build(
    card: ModelCard, weights: Weights | None = None, *, new_classifier: bool = False, **options: Any
) -> nn.Module:
    """Build the model of a card, in training mode, on the CPU.

    Args:
        card: names arch; num_classes, activation, quant_spec and target where they differ from the model's defaults.
        weights: to load. None: random initialisation. Ranges for other grids or activations are left out (``ranges_fit``).
        new_classifier: if the weights are for another number of classes, keep the model's own classifier.
        **options: of the network, as ``create_model`` takes them.

    Raises:
        UserError: the card has no arch, or as ``create_model``.
    """
    if card.arch is None:
        raise UserError("which model is it? The card names no arch; give one.")
    entry = get_entry(card.arch)
    model = entry.create(entry.num_classes if card.num_classes is None else card.num_classes, **options)
    if card.activation == HARD_SWISH and not replace_silu(model):
        raise UserError(f"{card.arch} has no SiLU that hard-swish could take the place of; leave it out.")
    if card.quant_spec is not None:
        quantize(model, card.quant_spec, **({} if card.target is None else {"target": card.target}))
    if weights is not None:
        fitting = weights if ranges_fit(weights, card) else weights.without_ranges()
        load_weights(model, fitting, new_classifier=new_classifier)
    model._built = Built(card, options)  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Built:
    """What ``build`` made a model of."""

    card: ModelCard
    options: Mapping[str, Any]


def ranges_fit(weights: Weights, card: ModelCard) -> bool:
    """Whether the ranges in ``weights`` are for the grids and activations of ``card``.

    Weights without ranges fit. Weights whose card has no spec are taken to fit. All weights fit a float model, which drops
    ranges.
    """
    said = weights.card
    if card.quant_spec is None or not weights.has_ranges:
        return True
    if said.activation != card.activation:
        return False
    return said.quant_spec is None or same_grids(resolve_spec(said.quant_spec), resolve_spec(card.quant_spec))


def left_out(weights: Weights, model: nn.Module, card: ModelCard) -> list[str]:
    """Sentences that name the parts of ``weights`` that ``build`` did not load into ``model``, or that silence it."""
    sentences = []
    tensors = weights.tensors.items() if card.quantized else ()
    zero = [name for name, tensor in tensors if name.endswith("._amax") and tensor.numel() == 1 and not tensor.any()]
    if zero:
        sentences.append(f"{len(zero)} ranges in {weights.source} are 0, so all values there become 0 ({zero[0]})")
    if not ranges_fit(weights, card):
        sentences.append(f"the ranges in {weights.source} are for another quantization; they are left out")
    other = other_class_count(model, weights)
    if other is not None:
        sentences.append(f"{weights.source} is for {other} classes; the classifier starts anew")
    if weights.has_ranges and not card.quantized:
        sentences.append(f"{card.arch} is a float model here; the ranges in the weights are left out")
    return sentences


def has_ranges(model: nn.Module) -> bool:
    """Whether every quantizer of the model has a range (True for a float model)."""
    return all(quantizer.calibrated for _, quantizer in quantizers(model))

"""Reads, checks, renames, loads and writes weights."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effnet_quant.card import CARD_KEY, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file, possible_path, replace_file
from effnet_quant.models.efficientnet_pytorch import has_package_names, takes_package_weights, with_timm_names
from effnet_quant.models.foreign_tensors import RANGE_SUFFIXES, check_tensors

EMA_KEY = "state_dict_ema"  # in checkpoints, as in NVIDIA's
# In torchvision's published files: auxiliary classifiers, which only training from scratch needs, and DenseNet's old names
_AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])(?=\.)")
_TRACKED_SUFFIXES = ("._low", "._high")
_COUNT_SUFFIX = "num_batches_tracked"  # missing in weights from before PyTorch 0.4.1, and not needed

# NVIDIA's checkpoints hold the learning rate of the cosine schedule as a NumPy number. These functions only make numbers.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),  # its name in files of NumPy 1
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")),
]


@dataclass
class Weights:
    """The contents of a weights file.

    Attributes:
        tensors: state-dict entries as published.
        card: the file's card; an empty card if the file has none.
        source: name of the file, for messages.
    """

    tensors: dict[str, Tensor]
    card: ModelCard = field(default_factory=ModelCard)
    source: str = "the weights"

    @property
    def has_ranges(self) -> bool:
        """Whether the weights hold ranges, as a quantized network's do."""
        return any(name.endswith(RANGE_SUFFIXES) for name in self.tensors)

    def without_ranges(self) -> Weights:
        """A copy without ranges, as of a float network."""
        left_out = RANGE_SUFFIXES + _TRACKED_SUFFIXES
        return replace(
            self, tensors={name: value for name, value in self.tensors.items() if not name.endswith(left_out)}
        )


def read_torch_file(path: str | Path) -> Any:
    """The object in a ``.pth`` or ``.pth.tar`` file, read on the CPU without executing anything in it.

    Raises:
        UserError: the file is missing, truncated, not a PyTorch file, or a pickle that wants to run code.
    """
    path = existing_file(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on files that torch then refuses; the sentence below says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global|class) `?([\w.]+)", str(error))
        if wanted is None:
            raise UserError(
                f"{path} is not a PyTorch file or is damaged; get it again from where it came from."
            ) from error
        raise UserError(
            f"{path} is refused: reading it would run code ('{wanted.group(1)}'), which weights never need; "
            "save a plain state_dict or convert it to .safetensors where it was made."
        ) from error
    except (
        Exception
    ) as error:  # a damaged file can break the reader anywhere: IndexError, struct.error, AssertionError …
        raise UserError(
            f"{path} is truncated, damaged or no PyTorch file; get it again from where it came from."
        ) from error


def read_weights(path: str | Path, *, ema: bool = False) -> Weights:
    """Read a ``.safetensors``, ``.pth`` or ``.pth.tar`` file: a state dict, or a checkpoint that holds one.

    Args:
        path: the file.
        ema: read a checkpoint's exponential moving average of the weights instead of its weights.

    Raises:
        UserError: the file is missing, damaged or refused, it holds no tensors or no moving average, a tensor is nothing
            that a network computes with (``check_tensors``), or the card contradicts them.
    """
    path = existing_file(path)
    if path.suffix == ".safetensors":
        if ema:
            raise _no_average(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                text = (file.metadata() or {}).get(CARD_KEY, "{}")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise _damaged(path) from error
        return _checked(tensors, ModelCard.from_text(text, str(path)), str(path))
    content = read_torch_file(path)
    said: Any = None
    if ema and not (isinstance(content, dict) and isinstance(content.get(EMA_KEY), dict)):
        raise _no_average(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        said = content.get("metadata")
        content = content[EMA_KEY if ema else "state_dict"]
    return _checked(content, ModelCard.from_json({} if said is None else said, str(path)), str(path))


def _checked(content: Any, card: ModelCard, source: str) -> Weights:
    """The weights of a file of unknown origin."""
    tensors = check_tensors(content, source)
    count = card.num_classes
    # before a network for so many classes is built
    if count is not None and not any(len(tensor) == count for tensor in tensors.values() if tensor.dim() > 0):
        raise UserError(
            f"{source} contradicts itself: it names {count} classes, and no layer has so many; get it again."
        )
    return Weights(tensors, card, source)


def read_card(path: str | Path) -> ModelCard:
    """The card of a weights file or a checkpoint; an empty card if the file has none.

    Raises:
        UserError: as ``read_weights``.
    """
    path = existing_file(path)
    if path.suffix != ".safetensors":
        return read_weights(path).card
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # reads the header alone
            text = (file.metadata() or {}).get(CARD_KEY, "{}")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path) from error
    return ModelCard.from_text(text, str(path))


def write_weights(
    path: str | Path, tensors: dict[str, Tensor], card: ModelCard | None = None, entries: dict[str, str] | None = None
) -> None:
    """Write a state dict. The extension chooses ``.safetensors`` (with the card) or ``.pth`` (a plain state dict).

    ``entries`` are further texts by name, which a ``.safetensors`` file keeps beside the card.

    Raises:
        UserError: another extension, or the file can't be written.
    """
    path = possible_path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        said = json.dumps((card or ModelCard()).to_json(), sort_keys=True)
        content = safetensors.torch.save(tensors, {**(entries or {}), CARD_KEY: said})
    elif path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    else:
        raise UserError(f"can't tell the format of {path} from its extension; name it .safetensors or .pth.")
    replace_file(path, content)


def load_weights(model: nn.Module, weights: Weights, *, new_classifier: bool = False) -> bool:
    """Load ``weights`` into ``model``, translating published names and shapes.

    - The prefixes ``module.`` and ``_orig_mod.`` are removed.
    - EfficientNet's stages may be called ``layer1`` instead of ``layers.0``.
    - timm's tf_efficientnet_* take the names of the EfficientNet-PyTorch package.
    - Weights of squeeze-and-excitation may have the shape of linear layers (out, in) or 1x1 convolutions (out, in, 1, 1).
    - Auxiliary classifiers in torchvision's files are left out.
    - Float weights fit a quantized model; its ranges stay unset.
    - Quantized weights fit a float model; their ranges are left out.

    Args:
        model: the network.
        weights: the weights to load.
        new_classifier: accept weights for another number of classes. The model then keeps its own classifier, and no ranges
            are loaded.

    Returns:
        Whether every quantizer of the model has a range now (True for a float model).

    Raises:
        UserError: another class count, entries that are missing, unexpected, of another shape or integers in place of
            floats, or a range that is none; nothing is loaded.
    """
    own = model.state_dict()
    given = _as_named_by(own, weights, model)
    ranges = {name for name in own if name.endswith(RANGE_SUFFIXES)}
    reshaped = _reshaped(own, given)
    classifier = _classifier(own, given)
    if classifier and not new_classifier:
        count, own_count = len(given[classifier[0]]), len(own[classifier[0]])
        raise UserError(
            f"{weights.source} has {count} classes, but the model has {own_count}; "
            f"pass --num-classes {count} (num_classes={count}), or other weights."
        )
    if classifier:
        given = {name: tensor for name, tensor in given.items() if name not in classifier and name not in ranges}
        reshaped = []
    given_ranges = ranges & set(given)
    missing = [name for name in own if name not in given and name not in ranges and name not in classifier]
    if given_ranges:  # a file has all ranges or, if it is a float network's, none
        missing += [name for name in own if name in ranges and name not in given]
    missing = [name for name in missing if not name.endswith(_COUNT_SUFFIX)]
    integers = [name for name in given if name in own and _is_float(own[name]) and not _is_float(given[name])]
    unexpected = [name for name in given if name not in own and not name.endswith(_TRACKED_SUFFIXES)]
    if has_package_names(given):
        raise UserError(
            f"{weights.source} has the names of the EfficientNet-PyTorch package; load it into timm:tf_efficientnet_b0 to "
            "b7 or timm:tf_efficientnet_lite0 to lite4 (--arch), which pad images as that package does."
        )
    if missing or unexpected or reshaped or integers:
        raise UserError(
            f"{weights.source} does not fit the model: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for what, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("of another shape", reshaped),
                    ("stored as integers", integers),
                )
                if names
            )
            + (f"; it is for {weights.card.arch}, so" if weights.card.arch else ";")
            + " check --arch."
        )
    _check_ranges(model, given, weights.source)
    tensors = OrderedDict(given)
    # Versions of the modules' state dicts. torchvision's MNASNets refuse a state dict without them.
    tensors._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(tensors, strict=False)
    return not ranges or (bool(given_ranges) and all(bool(torch.isfinite(given[name]).all()) for name in ranges))


def other_class_count(model: nn.Module, weights: Weights) -> int | None:
    """The number of classes of ``weights`` if it is all that keeps them from fitting ``model``; else None."""
    own = model.state_dict()
    given = _as_named_by(own, weights, model)
    classifier = _classifier(own, given)
    return len(given[classifier[0]]) if classifier else None


def _as_named_by(own: dict[str, Tensor], weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """The entries of ``weights``, with names and shapes translated to those of the state dict ``own`` of ``model``."""
    stages = any(name.startswith("layers.") for name in own)
    # Ranges without a place in the model are dropped. Only an _amin stays, as an error, in a quantized model: an affine
    # range means something else on a symmetric grid.
    dropped = RANGE_SUFFIXES[:1] if any(name.endswith(RANGE_SUFFIXES) for name in own) else RANGE_SUFFIXES
    given = {}
    published = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): value for name, value in weights.tensors.items()}
    if has_package_names(published) and takes_package_weights(model):
        published = with_timm_names(published, own)
    for name, value in published.items():
        tensor, known = value, name
        if stages:
            known = re.sub(r"^layer(\d+)\.", lambda match: f"layers.{int(match.group(1)) - 1}.", known)
        known = _OLD_DENSENET.sub(r"\1\2", known)
        if known in own and tensor.shape != own[known].shape and _same_matrix(tensor, own[known]):
            tensor = tensor.reshape(own[known].shape)
        if known in own or not (known.endswith(dropped) or known.startswith(_AUXILIARY_PREFIXES)):
            given[known] = tensor
    return given


def _reshaped(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    return [name for name in given if name in own and given[name].shape != own[name].shape]


def _classifier(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """The entries of the classifier if ``given`` differs from ``own`` in the number of classes alone; else none.

    Then all entries of another shape differ in the first dimension only, in the same two numbers. They belong to layers
    whose weights are among them.
    """
    reshaped = _reshaped(own, given)
    counts = {(given[name].shape[:1], own[name].shape[:1]) for name in reshaped}
    alike = all(given[name].shape[1:] == own[name].shape[1:] for name in reshaped)
    layers = {re.sub(r"\.(?:_weight_quantizer\._amax|[^.]+)$", "", name) for name in reshaped}
    complete = all(f"{layer}.weight" in reshaped for layer in layers)
    return reshaped if len(counts) == 1 and alike and complete else []


def _same_matrix(given: Tensor, own: Tensor) -> bool:
    """Whether one shape is that of a linear layer's weights and the other that of the same 1x1 convolution."""
    short, long = sorted((tuple(given.shape), tuple(own.shape)), key=len)
    return len(short) == 2 and long == (*short, 1, 1)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _check_ranges(model: nn.Module, given: dict[str, Tensor], source: str) -> None:
    """Raises UserError if a fixed range is negative or its ends are swapped. Learned ranges may pass zero in training."""
    learned = {name for name, _ in model.named_parameters()}
    for name, upper in given.items():
        lower_name = re.sub(r"\._amax$", "._amin", re.sub(r"\._high$", "._low", name))
        if lower_name == name or name in learned:
            continue
        lower = given.get(lower_name, torch.zeros(()))  # the largest magnitude, on a symmetric grid
        if bool((upper.float() < lower.float()).any()):
            raise UserError(f"{source} can't be used: {name} is no upper end of a range; calibrate the network again.")


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no safetensors file; get it again from where it came from.")


def _no_average(path: Path) -> UserError:
    return UserError(f"{path} holds no moving average of the weights; leave out --ema, or train with --use-ema.")

"""Reading, checking, renaming and writing weights."""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from effnet_quant.errors import UserError
from effnet_quant.files import replace_file

METADATA_KEY = "effnet_quant"
_RANGE_SUFFIXES = ("_quantizer._amax", "_quantizer._amin")
_TRACKED_SUFFIXES = ("output._low", "output._high")

# NVIDIA's checkpoints hold the learning rate of their cosine schedule as a NumPy number; these only build numbers.
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
        metadata: what the file says of itself (arch, classes, preprocessing …); empty where it says nothing.
        source: the file, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = "the weights"

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classifier, None if the file holds no classifier of this family."""
        bias = next((tensor for name, tensor in self.tensors.items() if name.endswith("classifier.fc.bias")), None)
        return None if bias is None else len(bias)


def read_torch_file(path: str | Path) -> Any:
    """The object in a ``.pth`` or ``.pth.tar`` file, read on the CPU without executing anything in it.

    Raises:
        UserError: the file is missing, truncated, not a PyTorch file, or a pickle that wants to run code.
    """
    path = _existing_file(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
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


def read_weights(path: str | Path) -> Weights:
    """Read a ``.safetensors``, ``.pth`` or ``.pth.tar`` file: a state dict, or a checkpoint that holds one.

    Raises:
        UserError: the file is missing, damaged, refused, or holds no tensors.
    """
    path = _existing_file(path)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is truncated, damaged or no safetensors file; get it again from where it came from."
            ) from error
        return Weights(tensors, metadata if isinstance(metadata, dict) else {}, str(path))
    content = read_torch_file(path)
    metadata = {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        metadata = content.get("metadata") or {}
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights: expected a state_dict of tensors or a checkpoint with one.")
    return Weights(dict(content), metadata, str(path))


def write_weights(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a state dict as ``.safetensors`` (with its metadata) or ``.pth`` (a plain state dict), by extension.

    Raises:
        UserError: another extension, or the file can't be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        content = safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    elif path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    else:
        raise UserError(f"can't tell the format of {path} from its extension; name it .safetensors or .pth.")
    replace_file(path, content)


def load_weights(model: nn.Module, weights: Weights) -> bool:
    """Load ``weights`` into ``model``, translating published names and shapes.

    Accepted are the prefixes ``module.`` and ``_orig_mod.``, stages called ``layer1`` instead of ``layers.0``, and
    squeeze-and-excitation weights as linear layers (out, in) or 1x1 convolutions (out, in, 1, 1). Float weights fit a
    quantized model, whose ranges then stay unset, and quantized weights a float model, which drops the ranges.

    Returns:
        Whether every quantizer of the model has a range now (True for a float model).

    Raises:
        UserError: another class count, or entries that are missing, unexpected or of another shape; nothing is loaded.
    """
    own = model.state_dict()
    given = {_canonical_name(name): tensor for name, tensor in weights.tensors.items()}
    ranges = {name for name in own if name.endswith(_RANGE_SUFFIXES)}
    given = {name: tensor for name, tensor in given.items() if name in own or not name.endswith(_RANGE_SUFFIXES[0])}
    if not ranges:  # to a symmetric grid an affine range would mean something else: there it is unexpected
        given = {name: tensor for name, tensor in given.items() if not name.endswith(_RANGE_SUFFIXES[1])}
    for name, tensor in given.items():
        if name in own and tensor.shape != own[name].shape and _same_matrix(tensor, own[name]):
            given[name] = tensor.reshape(own[name].shape)

    classes = own.get("classifier.fc.bias")
    if classes is not None and weights.num_classes not in (None, len(classes)):
        raise UserError(
            f"{weights.source} has {weights.num_classes} classes, but the model has {len(classes)}; "
            f"pass --num-classes {weights.num_classes} (num_classes={weights.num_classes}), or other weights."
        )
    given_ranges = ranges & set(given)
    missing = [name for name in own if name not in given and name not in ranges]
    if given_ranges:  # half a set of ranges is a mistake, none at all is a float file
        missing += [name for name in own if name in ranges and name not in given]
    unexpected = [name for name in given if name not in own and not name.endswith(_TRACKED_SUFFIXES)]
    reshaped = [name for name in given if name in own and given[name].shape != own[name].shape]
    if missing or unexpected or reshaped:
        raise UserError(
            f"{weights.source} does not fit the model: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
                if names
            )
            + "; check --arch."
        )
    model.load_state_dict(given, strict=False)
    return not ranges or (bool(given_ranges) and all(bool(torch.isfinite(given[name]).all()) for name in ranges))


def _canonical_name(name: str) -> str:
    name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)
    return re.sub(r"^layer(\d+)\.", lambda match: f"layers.{int(match.group(1)) - 1}.", name)


def _same_matrix(given: Tensor, own: Tensor) -> bool:
    """Whether two shapes are the linear and the 1x1-convolution form of the same matrix."""
    short, long = sorted((tuple(given.shape), tuple(own.shape)), key=len)
    return len(short) == 2 and long == (*short, 1, 1)


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    return path

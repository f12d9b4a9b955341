"""The model itself, float or simulated, behind the interface of an engine: what the other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from effnet_quant.api import create_model
from effnet_quant.engines.compiled import Compiled, ImageInput, Settings
from effnet_quant.errors import UserError
from effnet_quant.export.tracing import image_channels
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import read_weights
from effnet_quant.quantization.placement.insertion import quantizers

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compile_file(path: Path, settings: Settings) -> Compiled:
    """The model of a weights file or checkpoint that says which model it is (those of this package do), in eval mode.

    Raises:
        UserError: there is no CUDA card, or the file is missing, damaged, an ONNX file or without a model's name.
    """
    if path.suffix in (".onnx", ".plan"):
        raise UserError(f"the backend torch takes weights (.safetensors, .pth.tar), and {path} is compiled from some.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA card; take the device cpu.")
    weights = read_weights(path)
    name = weights.card.arch
    if not name:
        raise UserError(f"{path} does not say which model it is for; take a .safetensors file of checkpoint2model.py.")
    model = create_model(name, weights=weights).eval().to(settings.device)
    size = (weights.card.input or get_entry(name).input).image_size
    channels = image_channels(model, size)
    metadata = {"image_size": size, **weights.card.to_json()}
    run = _Run(model, torch.device(settings.device), _AUTOCAST.get(settings.precision), settings.threads)
    simulated = any(True for _ in quantizers(model))
    precision = f"int8 simulated in {settings.precision}" if simulated else settings.precision
    return Compiled(run, ImageInput("input", "float32", (channels, size, size)), precision, weights.card, metadata)


class _Run:
    """Runs a model on NumPy images, with threads of its own if given: PyTorch's setting is the process's."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, threads: int | None) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._threads = threads

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None),
            ):
                return np.asarray(self._model(torch.from_numpy(images).to(self._device)).float().cpu())
        finally:
            if self._threads is not None:
                torch.set_num_threads(before)

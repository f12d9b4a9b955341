"""Backend "torch": runs the PyTorch model, float or simulated. The other backends are compared with it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from effnet_quant.api import create_model
from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.errors import UserError
from effnet_quant.models.input_channels import image_channels
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import read_weights
from effnet_quant.quantization.placement.insertion import quantizers
from effnet_quant.tasks import get_task

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Make the model of a weights file or checkpoint, in eval mode. Its card must name the model.

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
    image = ArrayInput("input", "float32", (channels, size, size))
    output = ArrayOutput(get_task(weights.card.task).output_names[0], "float32")
    return Compiled(run, Signature((image,), (output,)), precision, weights.card, metadata)


class _Run:
    """Runs a model on NumPy arrays, with ``threads`` threads if given.

    PyTorch has one number of threads per process. So runs that set it take turns, across all engines.
    """

    _setting_threads = threading.Lock()

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, threads: int | None) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._threads = threads

    def __call__(self, arrays: Arrays) -> Arrays:
        if self._threads is None:
            return self._compute(arrays)
        with self._setting_threads:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                return self._compute(arrays)
            finally:
                torch.set_num_threads(before)

    def _compute(self, arrays: Arrays) -> Arrays:
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None),
        ):
            output = self._model(*(torch.from_numpy(array).to(self._device) for array in arrays))
            return [np.asarray(output.float().cpu())]

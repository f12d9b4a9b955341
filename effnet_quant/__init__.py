"""effnet-quant: image classifiers, from training to a verified 8-bit engine."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it; loaded on first use, so that `import effnet_quant` stays quick.
_PUBLIC = {
    "DataConfig": "effnet_quant.jobs.config",
    "InputSpec": "effnet_quant.card",
    "ModelCard": "effnet_quant.card",
    "PlaceConfig": "effnet_quant.jobs.config",
    "QatConfig": "effnet_quant.quantization.qat",
    "StartConfig": "effnet_quant.jobs.config",
    "TrainConfig": "effnet_quant.training.config",
    "UserError": "effnet_quant.errors",
    "build": "effnet_quant.api",
    "calibrate": "effnet_quant.quantization.calibration",
    "compile_engine": "effnet_quant.engines.tensorrt.plans",
    "create_model": "effnet_quant.api",
    "deploy": "effnet_quant.jobs.deploy",
    "export_executorch": "effnet_quant.export.executorch",
    "export_integer": "effnet_quant.export.integer",
    "export_onnx": "effnet_quant.export.onnx",
    "finetune_quantized": "effnet_quant.jobs.quantized_training",
    "from_pretrained": "effnet_quant.serving.hub",
    "list_models": "effnet_quant.models.registry",
    "load": "effnet_quant.saved_model",
    "load_engine": "effnet_quant.engines.engine",
    "predict": "effnet_quant.jobs.prediction",
    "ptq": "effnet_quant.quantization.recipe",
    "push": "effnet_quant.serving.hub",
    "quantize": "effnet_quant.quantization.placement.insertion",
    "save": "effnet_quant.saved_model",
    "simulate_target": "effnet_quant.quantization.placement.insertion",
    "summarize": "effnet_quant.quantization.placement.summary",
    "train": "effnet_quant.jobs.float_training",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)

"""BACKENDS and get_backend: the table of runtimes, one module each."""

from __future__ import annotations

import importlib
from types import ModuleType

from effnet_quant.errors import UserError

# name -> module; loaded on first use, and each loads its runtime where it compiles
_MODULES = {
    "integer": "effnet_quant.engines.integer",
    "onnxruntime": "effnet_quant.engines.onnxruntime",
    "openvino": "effnet_quant.engines.openvino",
    "tensorrt": "effnet_quant.engines.tensorrt.backend",
    "torch": "effnet_quant.engines.pytorch",
}
BACKENDS = tuple(_MODULES)


def get_backend(name: str) -> ModuleType:
    """The module of a backend. It has

    - ``DEVICES``: names of the devices that it can run on, the default first;
    - ``PRECISIONS``: its precisions for floating-point operations, the default first;
    - ``compile_file(path, settings)``: returns the ``Compiled`` of a file.

    Raises:
        UserError: there is none of this name.
    """
    if name not in _MODULES:
        raise UserError(f"there is no backend '{name}'; choose one of: {', '.join(BACKENDS)}.")
    return importlib.import_module(_MODULES[name])

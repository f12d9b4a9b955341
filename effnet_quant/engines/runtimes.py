"""The runtimes, one module each: what they take, and how they compile a file."""

from __future__ import annotations

import importlib
from types import ModuleType

from effnet_quant.errors import UserError

# name -> module; loaded on first use, and each loads its runtime where it compiles
_MODULES = {
    "onnxruntime": "effnet_quant.engines.onnxruntime",
    "openvino": "effnet_quant.engines.openvino",
    "tensorrt": "effnet_quant.engines.tensorrt.backend",
    "torch": "effnet_quant.engines.pytorch",
}
BACKENDS = tuple(_MODULES)


def get_backend(name: str) -> ModuleType:
    """The module of a backend. It has

    - ``DEVICES``: the names of the devices it can run on, its usual one first;
    - ``PRECISIONS``: how it can compute what a file leaves in floating point, its usual way first;
    - ``compile_file(path, settings)``: the ``Compiled`` of a file.

    Raises:
        UserError: there is none of this name.
    """
    if name not in _MODULES:
        raise UserError(f"there is no backend '{name}'; choose one of: {', '.join(BACKENDS)}.")
    return importlib.import_module(_MODULES[name])

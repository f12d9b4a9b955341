"""BACKENDS and get_backend: the table of runtimes, one module each."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from effnet_quant.errors import UserError

# name -> module; loaded on first use, and each loads its runtime where it compiles
_MODULES = {
    "onnxruntime": "effnet_quant.engines.onnxruntime",
    "openvino": "effnet_quant.engines.openvino",
    "executorch": "effnet_quant.engines.executorch",
    "tensorrt": "effnet_quant.engines.tensorrt.backend",
    "torch": "effnet_quant.engines.pytorch",
    "integer": "effnet_quant.engines.integer",
}
BACKENDS = tuple(_MODULES)
# the runtimes that files are exported for, and the package that each needs; extras of setup.py have their names
_PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "tensorrt": "tensorrt"}
RUNTIMES = tuple(_PACKAGES)


def installed(runtime: str) -> bool:
    """Whether the package of one of RUNTIMES is installed."""
    return importlib.util.find_spec(_PACKAGES[runtime]) is not None


def how_to_install(runtime: str) -> str:
    """The command that installs one of RUNTIMES."""
    return f"pip install {'onnxruntime' if runtime == 'onnxruntime' else f'effnet-quant[{runtime}]'}"


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

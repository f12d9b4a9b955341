"""ExecuTorch with XNNPACK, on the CPU. The library is read by ExecuTorch's Python runtime."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from effnet_quant.card import CARD_KEY, ModelCard
from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.signature import Signature
from effnet_quant.errors import UserError

DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
_DESCRIPTION = "effnet_quant"  # the method of export_executorch that returns card and signature
_MAGIC = b"ET12"  # at offset 4 of a program, by FlatBuffers' file identifier
_LARGEST_DESCRIPTION = 2**26  # bytes


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Load a .pte file.

    Raises:
        UserError: ExecuTorch is missing, or the file is damaged or of another program.
    """
    with path.open("rb") as file:
        if file.read(8)[4:] != _MAGIC:
            raise UserError(f"{path} is no program of ExecuTorch; export it with the target executorch.")
    runtime, threadpool = library()
    program = runtime.Runtime.get().load_program(path, verification=runtime.Verification.InternalConsistency)
    if _DESCRIPTION not in program.method_names or "forward" not in program.method_names:
        raise UserError(f"{path} does not describe its model; export it with export_executorch.")
    values = _described(program, path)
    try:
        signature = Signature.from_json(
            {
                "inputs": [
                    {**value, "smallest_batch": 1, "largest_batch": 1} for value in values["signature"]["inputs"]
                ],
                "outputs": [{**value, "shape": None} for value in values["signature"]["outputs"]],
                "structure": values["signature"]["structure"],
            }
        )
        size, quantized = int(values["image_size"]), bool(values["quantized"])
        said = values[CARD_KEY]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} describes its model in a way that can't be used; export it again.") from error
    card = ModelCard.from_json(said, str(path))
    run = _Run(program, threadpool, settings.threads)
    precision = "int8 + fp32" if quantized else "fp32"
    return Compiled(run, signature, precision, card, {**card.to_json(), "image_size": size})


def library() -> tuple[Any, Any]:
    """ExecuTorch's runtime, and the module that sets its threads.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its API calls itself experimental
            from executorch import runtime
            from executorch.extension.pybindings import portable_lib
            from executorch.kernels import quantized  # noqa: F401  # the kernels of what XNNPACK leaves out
    except ImportError as error:
        raise UserError("ExecuTorch is not installed; pip install effnet-quant[executorch].") from error
    return runtime, portable_lib


def _described(program: Any, path: Path) -> dict[str, Any]:
    """The values of the method ``_DESCRIPTION``."""
    (content,) = program.load_method(_DESCRIPTION).execute([])
    try:
        data = content.numpy().tobytes()
        values = json.loads(data.decode("utf-8")) if len(data) <= _LARGEST_DESCRIPTION else None
    except (AttributeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} describes its model in a way that can't be used; export it again.")
    return values


class _Run:
    """Runs the method, one call at a time: a loaded method has one memory for its values.

    ExecuTorch has one pool of threads per process, and a loaded method keeps the pool of its time. So runs take turns,
    across all engines. A run that needs another number of threads makes a new pool, and methods are loaded again.
    """

    _running = threading.Lock()
    _pools = 0  # how many there have been

    def __init__(self, program: Any, threadpool: Any, threads: int | None) -> None:
        self._program = program
        self._threadpool = threadpool
        self._threads = threads or threadpool._threadpool_get_thread_count()
        self._method: Any = None
        self._pool = -1  # the one of the method

    def __call__(self, arrays: Arrays) -> Arrays:
        import torch

        with _Run._running:
            if self._threadpool._threadpool_get_thread_count() != self._threads:
                self._threadpool._unsafe_reset_threadpool(self._threads)
                _Run._pools += 1
            if self._pool != _Run._pools:
                self._method = self._program.load_method("forward")
                self._pool = _Run._pools
            outputs = self._method.execute([torch.from_numpy(array) for array in arrays])
            return [np.array(output.numpy()) for output in outputs]

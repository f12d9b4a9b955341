"""ExecuTorch with XNNPACK, on the CPU: .pte files in ExecuTorch's Python runtime."""

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
    if CARD_KEY not in program.method_names or "forward" not in program.method_names:
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
    """What the method CARD_KEY returns: card and signature, as ``export_executorch`` writes them."""
    (content,) = program.load_method(CARD_KEY).execute([])
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

    ExecuTorch has one pool of threads per process, and loaded methods keep pointers to it. So runs take turns, across all
    engines, and the first engine of the process decides on the number of threads.

    Raises:
        UserError: another number of threads than that of earlier engines.
    """

    _running = threading.Lock()
    _pool_is_used = False

    def __init__(self, program: Any, threadpool: Any, threads: int | None) -> None:
        with _Run._running:
            own = threadpool._threadpool_get_thread_count()
            if threads not in (None, own):
                if _Run._pool_is_used:
                    raise UserError(
                        f"ExecuTorch's engines in this process have {own} threads already, so none can have {threads}; take "
                        f"{own}, or another process."
                    )
                threadpool._unsafe_reset_threadpool(threads)
            self._method = program.load_method("forward")
            self._program = program
            _Run._pool_is_used = True

    def __call__(self, arrays: Arrays) -> Arrays:
        import torch

        with _Run._running:
            outputs = self._method.execute([torch.from_numpy(array) for array in arrays])
            return [np.array(output.numpy()) for output in outputs]

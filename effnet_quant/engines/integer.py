"""Backend "integer": a file of ``export_integer`` on the fast executor, which gives the reference's bits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.onnx_file import load_onnx, read_onnx
from effnet_quant.errors import UserError
from effnet_quant.integer.fast import FastProgram
from effnet_quant.integer.storage import from_model

DEVICES = ("cpu",)
PRECISIONS = ("int32",)


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Read a file's program, check it against the rules, and make it ready to run.

    Raises:
        UserError: the file is missing, damaged, of another target, or breaks a rule of docs/integer.md.
    """
    program = from_model(load_onnx(path), str(path))
    file = read_onnx(path)
    (image,) = file.signature.inputs
    if image.shape != program.image or image.dtype != "uint8":
        raise UserError(f"{path} contradicts itself: its steps take other images than its signature; export it again.")
    return Compiled(_Run(FastProgram(program), settings.threads), file.signature, "int32", file.card, file.metadata)


class _Run:
    """Runs a program with ``threads`` threads if given. PyTorch has one number per process, so such runs take turns."""

    _setting_threads = threading.Lock()

    def __init__(self, program: FastProgram, threads: int | None) -> None:
        self._program = program
        self._threads = threads

    def __call__(self, arrays: Arrays) -> Arrays:
        (images,) = arrays
        if self._threads is None:
            return [np.asarray(self._program(images))]
        with self._setting_threads:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            try:
                return [np.asarray(self._program(images))]
            finally:
                torch.set_num_threads(before)

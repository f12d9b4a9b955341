"""OpenVINO, on the CPU."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.cpu import cpu_has_bf16, cpu_has_exact_int8
from effnet_quant.engines.onnx_file import OnnxFile, read_onnx
from effnet_quant.engines.signature import Signature
from effnet_quant.errors import UserError

DEVICES = ("cpu",)
PRECISIONS = ("fp32", "bf16")
Shapes = tuple[tuple[int, ...], ...]


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Compile an ONNX file. Networks for single shapes are compiled when the shapes first come.

    Raises:
        UserError: OpenVINO is missing, the CPU has no bfloat16, or the file is missing, damaged or of the target "integer".
    """
    file = read_onnx(path)
    if file.card.output_scale is not None:
        raise UserError(
            f"{path} needs 64-bit integers, which OpenVINO computes in 32 bits; take the backend integer or onnxruntime."
        )
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise UserError("OpenVINO is not installed; pip install effnet-quant[openvino].") from error
    if settings.precision == "bf16" and not cpu_has_bf16():
        raise UserError("this CPU does not compute in bfloat16 (AVX512-BF16, AMX); take the precision fp32.")
    core = shared_core()
    # where a network has fewer threads than the CPU has cores, further copies use the others
    copies = 1 if settings.threads is None else max(_cores() // settings.threads, 1)
    run = OpenvinoRunner(core, core.read_model(path), file.signature, compile_properties(file, settings), copies)
    precision = file.precision(settings.precision)
    return Compiled(run, file.signature, precision, file.card, file.metadata, run.prepare, run.forget)


def compile_properties(file: OnnxFile, settings: Settings) -> dict[str, Any]:
    """The OpenVINO properties for a file. They avoid kernels and precisions that change its results."""
    # by default the plugin computes floating point in bfloat16 on CPUs with AMX
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bf16" else "f32"}
    # by default the plugin rounds float inputs of linear layers with integer weights to 8 bits, in groups of 32
    properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if not (cpu_has_exact_int8() or file.fits_16_bits):
        properties["LP_TRANSFORMS_MODE"] = "NO"
    elif file.adds_integers:
        # By default Snippets, the compiler of elementwise operations, takes the additions. The convolutions then write
        # floats. Without Snippets the convolutions fuse the additions. Such a network has nothing else for Snippets.
        properties["SNIPPETS_MODE"] = "DISABLE"
    if settings.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    return properties


@cache
def shared_core() -> Any:
    """The process's only OpenVINO Core, which is never freed.

    Each Core gives the main thread a stack for signal handlers. If several Cores are freed in another order than they were
    made, a freed stack is left in place. The next SIGCHLD then ends the process (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OpenvinoRunner:
    """Runs a model on NumPy arrays, for several callers at a time.

    A network compiled for one shape runs up to a fifth faster than one with an open batch (int8 kernels, mobilenetv2_100).
    So each batch of 1, 2, 4, 8 … has a network of its own, as has each shape given to ``prepare``. All other shapes share a
    network with open shapes. The two kinds round differently. The shape alone decides which network runs, so the same arrays
    give the same results, in any order and from any thread.

    A compiled network runs one call at a time. If all copies are busy, another is compiled, up to ``copies``.
    """

    def __init__(
        self, core: Any, model: Any, signature: Signature, properties: dict[str, Any], copies: int = 1
    ) -> None:
        self._core = core
        self._model = model
        self._properties = properties
        self._copies = copies
        self._inputs = [_position(model.inputs, value.name) for value in signature.inputs]
        self._outputs = [_position(model.outputs, value.name) for value in signature.outputs]
        self._one_size = all(None not in value.shape for value in signature.inputs)
        self._compiling = threading.Lock()
        self.forget()

    def __call__(self, arrays: Arrays) -> Arrays:
        shapes = tuple([array.shape for array in arrays])
        network = self._networks.get(shapes) or self._network_for(shapes)
        return network.run(dict(zip(self._inputs, arrays, strict=True)), self._outputs)

    def prepare(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Compile for these shapes, unless that is done."""
        with self._compiling:
            self._compile_apart(tuple(shapes))

    def forget(self) -> None:
        """Drop all networks. Running calls keep theirs."""
        with self._compiling:
            self._networks: dict[Shapes, _Network] = {}
            self._any_shape: _Network | None = None

    def _network_for(self, shapes: Shapes) -> _Network:
        with self._compiling:  # one caller compiles, the others find it
            batch = shapes[0][0]
            if shapes in self._networks or (self._one_size and batch & (batch - 1) == 0):
                return self._compile_apart(shapes)
            if self._any_shape is None:
                self._any_shape = self._compile(self._model)
            return self._any_shape

    def _compile_apart(self, shapes: Shapes) -> _Network:
        if shapes not in self._networks:
            model = self._model.clone()
            model.reshape({index: list(shape) for index, shape in zip(self._inputs, shapes, strict=True)})
            self._networks[shapes] = self._compile(model)
        return self._networks[shapes]

    def _compile(self, model: Any) -> _Network:
        return _Network(partial(self._core.compile_model, model, "CPU", self._properties), self._copies)


class _Network:
    """A network, compiled up to ``copies`` times. Each running call has an infer request of its own."""

    def __init__(self, compile_copy: Callable[[], Any], copies: int) -> None:
        self._compile_copy = compile_copy
        self._copies = copies
        self._adding = threading.Lock()
        self.compiled: list[Any] = []
        self._free = deque([self._new_request()])  # whose append and pop are atomic

    def run(self, inputs: dict[int, Any], outputs: Sequence[int]) -> Arrays:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._new_request()
        try:
            results = request.infer(inputs, share_inputs=True)
            return [np.array(results[index]) for index in outputs]
        finally:
            self._free.append(request)

    def _new_request(self) -> Any:
        with self._adding:
            if len(self.compiled) < self._copies:
                self.compiled.append(self._compile_copy())
            else:
                self.compiled.append(self.compiled.pop(0))  # the next one's turn
            return self.compiled[-1].create_infer_request()


def _position(ports: Sequence[Any], name: str) -> int:
    return next(index for index, port in enumerate(ports) if name in port.get_names())

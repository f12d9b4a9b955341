"""TensorRT, on a CUDA card; PyTorch holds the memory, the stream and the captured CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effnet_quant.card import ModelCard
from effnet_quant.engines.compiled import Arrays, Compiled, Settings
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.engines.tensorrt import library
from effnet_quant.engines.tensorrt.library import LoadedPlan
from effnet_quant.engines.tensorrt.plans import compile_engine, find_plan
from effnet_quant.errors import UserError

DEVICES = ("cuda",)
PRECISIONS = ("explicit",)  # all of it is in the graph
GRAPHS_KEPT = 8
# TensorRT's names of PyTorch's types; NumPy has all but bfloat16
_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_COMPUTED = ("int8", "fp8", "fp16", "bf16", "fp32")
Shapes = tuple[tuple[int, ...], ...]


def compile_file(path: Path, settings: Settings) -> Compiled:
    """Load a plan. An ONNX file is first built with the default options, unless its plan is in the cache.

    Raises:
        UserError: TensorRT or a card is missing, the file is damaged, or the plan is for another card or version.
    """
    trt = library.import_tensorrt()
    library.this_machine(trt)
    plan = compile_engine(path) if path.suffix == ".onnx" else find_plan(path)
    content = plan.path.read_bytes() if plan is not None else path.read_bytes()
    try:
        loaded = library.load_plan(trt, content, plan is not None and plan.options.version_compatible)
    except UserError as error:
        raise UserError(
            f"{path} is no TensorRT plan for this card and TensorRT {trt.__version__}; build it here with model2trt.py. "
            f"TensorRT says: {error}"
        ) from error
    signature = plan.signature if plan is not None else _signature_of(trt, loaded.engine)
    run = _Run(trt, loaded, signature)
    types = {layer.computes_in for layer in plan.layers} if plan is not None else set()
    precision = " + ".join(name for name in _COMPUTED if name in types)
    card, metadata = (ModelCard(), {}) if plan is None else (plan.card, plan.metadata)
    return Compiled(run, signature, precision or "unknown", card, metadata, forget=run.forget)


@dataclass(frozen=True)
class _Graph:
    """The CUDA graph of one set of input shapes, with its buffers, context and memory.

    Each graph has its own context, because the context must stay as it was during the capture.
    """

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    captured: torch.cuda.CUDAGraph
    context: Any
    memory: torch.Tensor


class _Run:
    """Runs a plan on NumPy arrays. Each set of input shapes is captured as a CUDA graph once and then replayed.

    Graphs share memory, so calls take turns.
    """

    def __init__(self, trt: Any, plan: LoadedPlan, signature: Signature) -> None:
        self._trt = trt
        self._plan = plan
        self._inputs = [value.name for value in signature.inputs]
        self._outputs = [value.name for value in signature.outputs]
        self._stream = torch.cuda.Stream()
        self._running = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        with self._running:
            self._graphs: OrderedDict[Shapes, _Graph] = OrderedDict()
            self._memory = torch.empty(0, dtype=torch.uint8, device="cuda")

    def __call__(self, arrays: Arrays) -> Arrays:
        shapes = tuple([array.shape for array in arrays])
        with self._running, torch.cuda.stream(self._stream):
            graph = self._graphs.pop(shapes, None) or self._capture(shapes)
            self._graphs[shapes] = graph  # now the most recently used
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            for buffer, array in zip(graph.inputs, arrays, strict=True):
                buffer.copy_(torch.from_numpy(array))
            graph.captured.replay()
            return [_host_array(output) for output in graph.outputs]

    def _capture(self, shapes: Shapes) -> _Graph:
        context = library.create_context(self._trt, self._plan)
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(name, tuple(shape)):
                raise UserError(
                    f"the plan takes no '{name}' of shape {shape}; build it for such batches with model2trt.py."
                )
        # Graphs run one after another, so they share the memory for activations. If one needs more, it gets new memory;
        # earlier graphs keep the old one, because they hold its address.
        needed = context.update_device_memory_size_for_shapes()
        if needed > len(self._memory):
            self._memory = torch.empty(needed, dtype=torch.uint8, device="cuda")
        library.set_memory(context, self._memory.data_ptr(), len(self._memory))
        inputs = [self._buffer(name, shape) for name, shape in zip(self._inputs, shapes, strict=True)]
        outputs = [self._buffer(name, tuple(context.get_tensor_shape(name))) for name in self._outputs]
        for name, buffer in zip([*self._inputs, *self._outputs], [*inputs, *outputs], strict=True):
            context.set_tensor_address(name, buffer.data_ptr())
        # run once before the capture: the first run of a new shape does setup work that must not be captured
        self._enqueue(context)
        self._stream.synchronize()
        captured = torch.cuda.CUDAGraph()
        # thread_local: the capture ignores what other threads do with the card, e.g. other engines
        with torch.cuda.graph(captured, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue(context)
        return _Graph(inputs, outputs, captured, context, self._memory)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = _type(self._plan.engine, name)
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise UserError(f"TensorRT can't run the plan: {library.first_line(self._plan.logger.errors)}")


def _host_array(tensor: torch.Tensor) -> NDArray[Any]:
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu())


def _signature_of(trt: Any, engine: Any) -> Signature:
    """The signature of another tool's plan: inputs by the first optimization profile, and the first output."""
    inputs = tuple(_input_of(engine, name) for name in _names(engine, trt.TensorIOMode.INPUT))
    output = _names(engine, trt.TensorIOMode.OUTPUT)[0]
    return Signature(inputs, (ArrayOutput(output, _type(engine, output)),))


def _names(engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _input_of(engine: Any, name: str) -> ArrayInput:
    smallest, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    shape = tuple(low if low == high else None for low, high in zip(smallest[1:], largest[1:], strict=True))
    return ArrayInput(name, _type(engine, name), shape, smallest[0], largest[0])


def _type(engine: Any, name: str) -> str:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _TYPES:
        raise UserError(f"the plan has '{name}' in {kind}, which arrays can't hold; cast it to FLOAT in the ONNX file.")
    return _TYPES[kind]

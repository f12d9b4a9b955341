"""TensorRT, on a CUDA card; PyTorch holds the memory, the stream and the captured CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effnet_quant.card import ModelCard
from effnet_quant.engines.compiled import Compiled, ImageInput, Settings
from effnet_quant.engines.tensorrt import library
from effnet_quant.engines.tensorrt.library import LoadedPlan
from effnet_quant.engines.tensorrt.plans import compile_engine, find_plan
from effnet_quant.errors import UserError

DEVICES = ("cuda",)
PRECISIONS = ("explicit",)  # all of it is in the graph
GRAPHS_KEPT = 8
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "UINT8": torch.uint8}
_COMPUTED = ("int8", "fp8", "fp16", "bf16", "fp32")
_INPUT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8"}


def compile_file(path: Path, settings: Settings) -> Compiled:
    """A plan, or the plan of an ONNX file, built with the usual options unless it is in the cache.

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
    image_input = plan.input if plan is not None else _input_of(trt, loaded.engine)
    run = _Run(trt, loaded, image_input.name, _output_name(trt, loaded.engine))
    types = {layer.computes_in for layer in plan.layers} if plan is not None else set()
    precision = " + ".join(name for name in _COMPUTED if name in types)
    card, metadata = (ModelCard(), {}) if plan is None else (plan.card, plan.metadata)
    return Compiled(run, image_input, precision or "unknown", card, metadata, run.forget)


@dataclass(frozen=True)
class _Graph:
    """One batch size: its buffers and its captured work, with what the work uses.

    The context is its own because a captured graph must find it as it was when it was captured.
    """

    images: torch.Tensor
    logits: torch.Tensor
    captured: torch.cuda.CUDAGraph
    context: Any
    memory: torch.Tensor


class _Run:
    """Runs a plan on NumPy images; a batch size that comes up again is replayed as a CUDA graph."""

    def __init__(self, trt: Any, plan: LoadedPlan, input_name: str, output_name: str) -> None:
        self._trt = trt
        self._plan = plan
        self._input_name = input_name
        self._output_name = output_name
        self._stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphs: OrderedDict[int, _Graph] = OrderedDict()
        self._memory = torch.empty(0, dtype=torch.uint8, device="cuda")

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        with torch.cuda.stream(self._stream):
            graph = self._graphs.pop(len(images), None) or self._capture(images.shape)
            self._graphs[len(images)] = graph  # the last used are kept
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            graph.images.copy_(torch.from_numpy(images))
            graph.captured.replay()
            return np.asarray(graph.logits.float().cpu())

    def _capture(self, shape: tuple[int, ...]) -> _Graph:
        context = library.create_context(self._trt, self._plan)
        if not context.set_input_shape(self._input_name, tuple(shape)):
            raise UserError(f"the plan takes no images of shape {shape}; build it for such batches with model2trt.py.")
        # Graphs run one after another, so they share the memory for activations. Where it is too small for this one, those
        # that were captured with it keep it: they know its address.
        needed = context.update_device_memory_size_for_shapes()
        if needed > len(self._memory):
            self._memory = torch.empty(needed, dtype=torch.uint8, device="cuda")
        library.set_memory(context, self._memory.data_ptr(), len(self._memory))
        images = self._buffer(self._input_name, shape)
        logits = self._buffer(self._output_name, tuple(context.get_tensor_shape(self._output_name)))
        context.set_tensor_address(self._input_name, images.data_ptr())
        context.set_tensor_address(self._output_name, logits.data_ptr())
        # once before the capture: the first run after a new shape sets up what must not be captured
        self._enqueue(context)
        self._stream.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=self._stream):
            self._enqueue(context)
        return _Graph(images, logits, captured, context, self._memory)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        engine = self._plan.engine
        return torch.empty(shape, dtype=_DTYPES[engine.get_tensor_dtype(name).name], device="cuda")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise UserError(f"TensorRT can't run the plan: {library.first_line(self._plan.logger.errors)}")


def _names(trt: Any, engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _output_name(trt: Any, engine: Any) -> str:
    return _names(trt, engine, trt.TensorIOMode.OUTPUT)[0]


def _input_of(trt: Any, engine: Any) -> ImageInput:
    """What a plan of another tool takes, by its first optimization profile."""
    name = _names(trt, engine, trt.TensorIOMode.INPUT)[0]
    smallest, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    first, second, third = (low if low == high else None for low, high in zip(smallest[1:], largest[1:], strict=True))
    dtype = _INPUT_DTYPES[engine.get_tensor_dtype(name).name]
    return ImageInput(name, dtype, (first, second, third), smallest[0], largest[0])

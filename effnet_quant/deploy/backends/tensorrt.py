"""TensorRT, on a CUDA card; PyTorch holds the memory, the stream and the captured CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effnet_quant.deploy.backends.compiled import Compiled, ImageInput, Settings
from effnet_quant.deploy.tensorrt import library
from effnet_quant.deploy.tensorrt.plans import compile_engine, find_plan
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
    engine = library.load_plan(trt, content, plan is not None and plan.options.version_compatible)
    if engine is None:
        raise UserError(
            f"{path} is no TensorRT plan for this card and TensorRT {trt.__version__}; build it here with model2trt.py."
        )
    image_input = plan.input if plan is not None else _input_of(trt, engine)
    run = _Run(engine, image_input.name, _output_name(trt, engine))
    types = {layer.computes_in for layer in plan.layers} if plan is not None else set()
    precision = " + ".join(name for name in _COMPUTED if name in types)
    return Compiled(run, image_input, precision or "unknown", plan.metadata if plan is not None else {})


class _Run:
    """Runs a plan on NumPy images; a batch size that comes up again is replayed as a CUDA graph."""

    def __init__(self, engine: Any, input_name: str, output_name: str) -> None:
        self._engine = engine
        self._input_name = input_name
        self._output_name = output_name
        self._stream = torch.cuda.Stream()
        self._graphs: OrderedDict[int, _Graph] = OrderedDict()

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        graph = self._graphs.pop(len(images), None)
        if graph is None:
            graph = _Graph(self._engine, self._input_name, self._output_name, images.shape, self._stream)
        self._graphs[len(images)] = graph  # the last used are kept
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        with torch.cuda.stream(self._stream):
            graph.images.copy_(torch.from_numpy(images))
            graph.replay()
            return np.asarray(graph.logits.float().cpu())


class _Graph:
    """One batch size: buffers, an execution context of its own, and its captured work.

    A context of its own because a captured graph must find the context as it was when it was captured.
    """

    def __init__(
        self, engine: Any, input_name: str, output_name: str, shape: tuple[int, ...], stream: torch.cuda.Stream
    ) -> None:
        context = engine.create_execution_context()
        if not context.set_input_shape(input_name, tuple(shape)):
            raise UserError(f"the plan takes no images of shape {shape}; build it for such batches with model2trt.py.")
        self._context = context
        self.images = torch.empty(shape, dtype=_DTYPES[engine.get_tensor_dtype(input_name).name], device="cuda")
        self.logits = torch.empty(
            tuple(context.get_tensor_shape(output_name)),
            dtype=_DTYPES[engine.get_tensor_dtype(output_name).name],
            device="cuda",
        )
        context.set_tensor_address(input_name, self.images.data_ptr())
        context.set_tensor_address(output_name, self.logits.data_ptr())
        # once before the capture: the first run after a new shape sets up what must not be captured
        self._enqueue(stream)
        stream.synchronize()
        self._captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._captured, stream=stream):
            self._enqueue(stream)

    def replay(self) -> None:
        self._captured.replay()

    def _enqueue(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the plan")


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

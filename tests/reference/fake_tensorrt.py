"""A stand-in for TensorRT and for the card that it runs on, where neither can be had.

It has the names that NVIDIA's published bindings of a version have (tensorrt_api.json) and no others, and
the documented behaviour: None, False and a message to the logger where something fails, a TypeError where the library makes
no object. A plan is the ONNX model with what it was built for; ONNX Runtime computes, at the addresses that it is given.
"""

import contextlib
import ctypes
import enum
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

REFERENCE = Path(__file__).with_name("tensorrt_api.json")
ACTIVATIONS = 1024  # bytes an image
LAYERS = [{"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 9}}]


class OnCard(torch.Tensor):
    """A tensor that the host gets as a copy."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


class Card:
    """What the backend uses of ``torch``, with the host's memory as the card's. ``memory`` lists the live activations."""

    uint8, float32, bfloat16 = torch.uint8, torch.float32, torch.bfloat16
    from_numpy = staticmethod(torch.from_numpy)

    def __init__(self) -> None:
        self.memory: list[weakref.ref] = []
        self.recording: list[Callable[[], Any]] | None = None
        self.cuda = SimpleNamespace(
            Stream=lambda: SimpleNamespace(cuda_stream=7, synchronize=lambda: None),
            stream=lambda stream: contextlib.nullcontext(),
            CUDAGraph=Graph,
            graph=self.capture,
        )

    def empty(self, shape: int | tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        tensor = torch.empty(shape, dtype=dtype).as_subclass(OnCard)
        if dtype == torch.uint8:
            self.memory.append(weakref.ref(tensor))
        return tensor

    @contextlib.contextmanager
    def capture(self, graph: "Graph", stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads use the card meanwhile
        self.recording = graph.work
        yield
        self.recording = None

    def live_bytes(self) -> int:
        return sum(len(tensor) for reference in self.memory if (tensor := reference()) is not None)


class Graph:
    """torch.cuda.CUDAGraph: what was enqueued while it recorded."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for run in self.work:
            run()


def fake_tensorrt(version: str, card: Card, fails: tuple[str, ...] = ()) -> Any:
    """The module. ``fails`` names what does not work: "Builder", "Runtime", "build", "context" or "execute"."""
    known = {name: set(text.split()) for name, text in json.loads(REFERENCE.read_text())[version].items()}

    class Api:
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_") and name not in known[type(self).__name__]:
                raise AttributeError(f"TensorRT {version} has no {type(self).__name__}.{name}")
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in known[type(self).__name__]:
                raise AttributeError(f"TensorRT {version} has no {type(self).__name__}.{name}")
            super().__setattr__(name, value)

        def _failed(self, message: str) -> None:
            self._logger.log(ILogger.ERROR, f"{message}\nmore of it")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Builder(Api):
        def __init__(self, logger: Any) -> None:
            self._logger = logger
            if "Builder" in fails:
                self._failed("CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig(self._logger)

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            module.built = config
            name, shape = network._input
            if "build" in fails or (None in shape and name not in getattr(config._profile, "_shapes", {})):
                self._failed("Network has dynamic or shape inputs, but no optimization profile has been defined.")
                return None
            shapes = config._profile._shapes if config._profile else {name: [shape] * 3}
            about = {"version": version, "lean": config._flags == ["VERSION_COMPATIBLE"], "shapes": shapes}
            if config._cache is not None:
                config._cache._entries += b"+conv"
            return json.dumps(about).encode() + b"\0" + network._model

    class INetworkDefinition(Api):
        pass

    class IBuilderConfig(Api):
        def __init__(self, logger: Any) -> None:
            self._logger, self._limits, self._flags, self._profile, self._cache = logger, {}, [], None, None

        def set_memory_pool_limit(self, pool: enum.IntEnum, size: int) -> None:
            self._limits[pool.name] = size

        def set_flag(self, flag: enum.IntEnum) -> None:
            self._flags.append(flag.name)

        def add_optimization_profile(self, profile: Any) -> int:
            self._profile = profile
            return 0

        def create_timing_cache(self, serialized: bytes) -> Any:
            return None if serialized == b"damaged" else ITimingCache(serialized)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if not isinstance(cache, ITimingCache):
                raise TypeError("incompatible function arguments")
            if cache._entries.startswith(b"another card") and not ignore_mismatch:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class ITimingCache(Api):
        def __init__(self, entries: bytes) -> None:
            self._entries = entries

        def serialize(self) -> bytes:
            return self._entries

    class IOptimizationProfile(Api):
        def __init__(self) -> None:
            self._shapes: dict[str, list[tuple[int, ...]]] = {}

        def set_shape(self, name: str, smallest: tuple, usual: tuple, largest: tuple) -> None:
            assert all(low <= middle <= high for low, middle, high in zip(smallest, usual, largest, strict=True))
            self._shapes[name] = [smallest, usual, largest]

    class OnnxParser(Api):
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._reasons = network, []

        @property
        def num_errors(self) -> int:
            return len(self._reasons)

        def get_error(self, index: int) -> Any:
            error = ParserError()
            error._reason = self._reasons[index]
            return error

        def parse(self, model: bytes) -> bool:
            graph = onnx.load_from_string(model).graph
            self._reasons = [f"{node.op_type}: no importer" for node in graph.node if node.op_type == "NonZero"]
            (image,) = graph.input
            shape = tuple(size.dim_value or None for size in image.type.tensor_type.shape.dim)
            self._network._input, self._network._model = (image.name, shape), model
            return not self._reasons

    class ParserError(Api):
        def desc(self) -> str:
            return self._reason

    class Runtime(Api):
        def __init__(self, logger: Any) -> None:
            self._logger, self.engine_host_code_allowed = logger, False
            if "Runtime" in fails:
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            head, _, model = plan.partition(b"\0")
            about = json.loads(head) if head.startswith(b"{") else {"version": "another one"}
            if about["version"] != version:
                return self._failed(f"The engine plan file is not compatible with this version: {about['version']}.")
            if about["lean"] and not self.engine_host_code_allowed:
                return self._failed("Deserializing engines with host code is not allowed.")
            return ICudaEngine(self._logger, about["shapes"], model)

    class ICudaEngine(Api):
        def __init__(self, logger: Any, shapes: dict[str, list], model: bytes) -> None:
            self._logger, self._shapes = logger, shapes
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self._names = [self._session.get_inputs()[0].name, self._session.get_outputs()[0].name]
            self.num_io_tensors = 2

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> enum.IntEnum:
            return module.TensorIOMode.INPUT if name == self._names[0] else module.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> enum.IntEnum:
            return module.DataType.FLOAT

        def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
            return self._shapes[name]

        def create_execution_context(self, strategy: enum.IntEnum) -> Any:
            if "context" in fails:
                return self._failed("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
            return IExecutionContext(self, strategy)

        def create_engine_inspector(self) -> Any:
            return EngineInspector()

    class IExecutionContext(Api):
        def __init__(self, engine: Any, strategy: enum.IntEnum) -> None:
            self._engine, self._logger = engine, engine._logger
            self._shape, self._addresses, self._size = None, {}, 0
            self._managed = strategy == module.ExecutionContextAllocationStrategy.USER_MANAGED

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            smallest, _, largest = self._engine._shapes[name]
            fits = all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))
            self._shape = shape if fits else None
            return fits

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self._shape[0], *self._engine._session.get_outputs()[0].shape[1:])

        def update_device_memory_size_for_shapes(self) -> int:
            return ACTIVATIONS * self._shape[0]

        def set_device_memory(self, memory: int, size: int) -> None:
            self._size = size if memory else 0

        device_memory = property(None, lambda self, memory: self.__setattr__("_size", math.inf))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle == 7
            if "execute" in fails or (self._managed and self._size < self.update_device_memory_size_for_shapes()):
                self._failed("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)")
                return False
            if card.recording is not None:
                card.recording.append(self._compute)
            else:
                self._compute()
            return True

        def _compute(self) -> None:
            name, output = self._engine._names
            images, logits = self._at(name, self._shape), self._at(output, self.get_tensor_shape(output))
            logits[...] = self._engine._session.run(None, {name: images})[0]

        def _at(self, name: str, shape: tuple[int, ...]) -> Any:
            values = (ctypes.c_float * math.prod(shape)).from_address(self._addresses[name])
            return np.ctypeslib.as_array(values).reshape(shape)

    class EngineInspector(Api):
        def get_engine_information(self, form: enum.IntEnum) -> str:
            assert form == module.LayerInformationFormat.JSON
            assert self.execution_context._shape
            return json.dumps({"Layers": LAYERS})

    module = SimpleNamespace(__version__=version, ILogger=ILogger, built=None)
    for kind in (Builder, OnnxParser, Runtime):
        setattr(module, kind.__name__, kind)
    for name, members in known.items():
        if "value" in members:
            setattr(module, name, enum.IntEnum(name, sorted(members - {"name", "value", "itemsize"}), start=0))
    return module

"""Calls into TensorRT 10 and 11 that build, load and describe plans.

Python API: docs.nvidia.com/deeplearning/tensorrt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effnet_quant.engines.signature import ArrayInput
from effnet_quant.engines.tensorrt.build_options import BuildOptions, Machine
from effnet_quant.errors import UserError

OLDEST = 10


def import_tensorrt() -> Any:
    """The module ``tensorrt``.

    Raises:
        UserError: it is not installed, its libraries are missing, or it is older than 10.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: the package is there, its libraries are not
        raise UserError(
            "TensorRT is not installed; pip install effnet-quant[tensorrt], on a machine with a CUDA card."
        ) from error
    if int(tensorrt.__version__.split(".")[0]) < OLDEST:
        raise UserError(f"TensorRT {tensorrt.__version__} is too old; install version {OLDEST} or later.")
    return tensorrt


def this_machine(trt: Any) -> Machine:
    """The card and TensorRT version of this machine.

    Raises:
        UserError: there is no CUDA card.
    """
    if not torch.cuda.is_available():
        raise UserError("TensorRT needs a CUDA card, and PyTorch finds none.")
    major, minor = torch.cuda.get_device_capability()
    return Machine(torch.cuda.get_device_name(), f"{major}.{minor}", trt.__version__)


def make_logger(trt: Any) -> Any:
    """A logger that prints warnings and keeps errors in its list ``errors``."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                print(f"TensorRT: {message}", file=sys.stderr)

    return Logger()


def build_plan(
    trt: Any, model: bytes, inputs: Sequence[ArrayInput], options: BuildOptions, timings: bytes
) -> tuple[bytes, bytes]:
    """Build the plan of an ONNX model.

    Args:
        trt: the module ``tensorrt``.
        model: the ONNX file's bytes.
        inputs: of the ONNX file.
        options: what the plan is built for.
        timings: a timing cache of an earlier build, or empty.

    Returns:
        The plan, and the timing cache with this build's measurements added.

    Raises:
        UserError: TensorRT refuses the model or can't build it.
    """
    logger = make_logger(trt)
    builder = _created(trt.Builder, logger)
    # in TensorRT 11 every network is strongly typed, and the flag is accepted without effect
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise UserError(f"TensorRT can't read the ONNX file: {first_line(reasons + logger.errors)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = _hardware_compatibility(trt, options)
    if shapes := profile_shapes(inputs, options):
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    for known in (timings, b""):  # a cache of another card or version, or a damaged one, is refused
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, False):
            break
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"TensorRT can't build the plan: {first_line(logger.errors)}")
    measured = config.get_timing_cache()
    return bytes(memoryview(plan)), b"" if measured is None else bytes(memoryview(measured.serialize()))


def _hardware_compatibility(trt: Any, options: BuildOptions) -> Any:
    level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.replace("-", "_").upper(), None)
    if level is None:
        raise UserError(
            f"TensorRT {trt.__version__} has no hardware compatibility '{options.hardware_compatible}'; take another, or a "
            "later version."
        )
    return level


Shape = tuple[int, ...]


def profile_shapes(inputs: Sequence[ArrayInput], options: BuildOptions) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes (N, …) of the smallest, usual and largest batch, for each input with open sizes.

    Raises:
        UserError: sizes other than the batch are open, and the options name none.
    """
    return {value.name: shapes for value in inputs if (shapes := _shapes_of(value, options)) is not None}


def _shapes_of(value: ArrayInput, options: BuildOptions) -> tuple[Shape, Shape, Shape] | None:
    if None in value.shape and options.image_size is None:
        what = "images" if value.is_image else f"the input '{value.name}'"
        raise UserError(f"the ONNX file takes {what} of any size; say which with --image-size.")
    if value.largest_batch is not None and None not in value.shape:
        return None
    sizes = tuple(options.image_size if size is None else size for size in value.shape)
    batches = (options.smallest_batch, options.usual_batch, options.largest_batch)
    if value.largest_batch is not None:
        batches = (value.largest_batch,) * 3
    smallest, usual, largest = ((batch, *sizes) for batch in batches)
    return smallest, usual, largest  # type: ignore[return-value]  # image_size is no None here


@dataclass(frozen=True)
class LoadedPlan:
    """A plan that is ready to run.

    Attributes:
        engine: its ICudaEngine.
        logger: collects TensorRT's messages in ``errors``.
    """

    engine: Any
    logger: Any


def load_plan(trt: Any, plan: bytes, version_compatible: bool) -> LoadedPlan:
    """Load a plan. Code in the plan for the CPU is allowed only if it is ``version_compatible``.

    Raises:
        UserError: this card or this TensorRT can't load it. The message is TensorRT's own.
    """
    logger = make_logger(trt)
    runtime = _created(trt.Runtime, logger)
    runtime.engine_host_code_allowed = version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(first_line(logger.errors))
    return LoadedPlan(engine, logger)


def create_context(trt: Any, plan: LoadedPlan) -> Any:
    """An IExecutionContext without memory for activations; see ``set_memory``.

    By default TensorRT would reserve memory for the plan's largest batch in each context.

    Raises:
        UserError: TensorRT can't create it, e.g. because the card's memory is full.
    """
    return _context(plan, trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def set_memory(context: Any, address: int, size: int) -> None:
    """Give a context ``size`` bytes of the card's memory, aligned to 256, for its activations."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size)
    else:  # TensorRT 10.0
        context.device_memory = address


def inspect(trt: Any, plan: LoadedPlan, inputs: Sequence[ArrayInput], options: BuildOptions) -> str:
    """The engine inspector's report on every layer at the usual batch, as JSON text."""
    context = _context(plan, trt.ExecutionContextAllocationStrategy.STATIC)
    for name, (_, usual, _) in profile_shapes(inputs, options).items():
        context.set_input_shape(name, usual)
    engine = plan.engine
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _context(plan: LoadedPlan, strategy: Any) -> Any:
    engine = plan.engine
    context = engine.create_execution_context(strategy)
    if context is None:
        raise UserError(f"TensorRT can't run the plan: {first_line(plan.logger.errors)}")
    return context


def first_line(reasons: list[str]) -> str:
    """The first line of TensorRT's messages. TensorRT reports the innermost cause first."""
    return next((line for reason in reasons for line in reason.strip().splitlines()), "it gives no reason.")


def _created(kind: Any, logger: Any) -> Any:
    """A Builder or Runtime. The bindings raise a TypeError if the library fails to create one."""
    try:
        return kind(logger)
    except TypeError as error:
        raise UserError(f"TensorRT does not start: {first_line(logger.errors)}") from error

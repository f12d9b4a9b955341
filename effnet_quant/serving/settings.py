"""How Triton Inference Server serves a model."""

from __future__ import annotations

from dataclasses import dataclass

from effnet_quant.errors import UserError

# backend: name of its file in the folder of a version
FILE_NAMES = {"onnxruntime": "model.onnx", "openvino": "model.onnx", "tensorrt": "model.plan"}
MAX_BATCH = 32
QUEUE_DELAY_US = 100


@dataclass(frozen=True)
class Serving:
    """How Triton serves a model.

    Attributes:
        backend: "onnxruntime", "openvino" or "tensorrt".
        device: "cpu" or "cuda".
        instances: copies of the model that run beside each other, on each device.
        max_batch: most images that Triton joins to one batch; None for 32, or what a plan was built for.
        queue_delay_us: how long a request may wait for others to join it, in microseconds; None for 100.

    Raises:
        UserError: values that no server could use.
    """

    backend: str
    device: str = "cpu"
    instances: int = 1
    max_batch: int | None = None
    queue_delay_us: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in FILE_NAMES:
            raise UserError(f"Triton has no backend '{self.backend}'; choose one of: {', '.join(FILE_NAMES)}.")
        needed = {"openvino": "cpu", "tensorrt": "cuda"}.get(self.backend, self.device)
        if self.device != needed:
            raise UserError(f"{self.backend} serves on the device {needed}, not on {self.device}.")
        if self.instances < 1 or (self.queue_delay_us or 0) < 0 or (self.max_batch is not None and self.max_batch < 1):
            raise UserError("instances and the largest batch must be at least 1, and the delay must not be negative.")

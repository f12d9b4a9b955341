"""BuildOptions and Machine: what a plan is built for; plan_key: its key in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from effnet_quant.errors import UserError

HARDWARE_COMPATIBILITY = ("none", "ampere-plus", "same-compute-capability")


@dataclass(frozen=True)
class BuildOptions:
    """What a plan is built for. The ONNX file decides on precision, because networks are strongly typed.

    Attributes:
        smallest_batch, largest_batch: limits of images a run. Ignored if the ONNX file has a fixed batch.
        usual_batch: images a run for which the plan is tuned.
        image_size: height and width in pixels, if the ONNX file leaves them open. None for the size in its metadata.
        workspace_mib: MiB that a layer may use beside its activations; None for all of the card's memory.
        version_compatible: later versions of TensorRT can run the plan. It then contains code that runs on the CPU; load
        only
            plans that you trust.
        hardware_compatible: which cards can run the plan. "none": the same model of card; "same-compute-capability": cards
        of
            that compute capability; "ampere-plus": Ampere and later. Compatible plans can be slower.

    Raises:
        UserError: values that contradict each other.
    """

    smallest_batch: int = 1
    usual_batch: int = 32
    largest_batch: int = 256
    image_size: int | None = None
    workspace_mib: int | None = None
    version_compatible: bool = False
    hardware_compatible: str = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.smallest_batch <= self.usual_batch <= self.largest_batch:
            raise UserError(
                f"batches of {self.smallest_batch}, {self.usual_batch} and {self.largest_batch} images: the smallest, the "
                "usual and the largest must be at least 1 and not fall."
            )
        if self.hardware_compatible not in HARDWARE_COMPATIBILITY:
            raise UserError(
                f"there is no hardware compatibility '{self.hardware_compatible}'; choose one of: "
                f"{', '.join(HARDWARE_COMPATIBILITY)}."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError("the workspace must be at least 1 MiB.")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is built on: the CUDA card's name and compute capability, and TensorRT's version."""

    card: str
    compute_capability: str
    tensorrt: str


def plan_key(model: bytes, machine: Machine, options: BuildOptions) -> str:
    """SHA-256 of the ONNX file, the machine and the options."""
    described = json.dumps({**asdict(machine), **options.to_json()}, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(model).digest() + described).hexdigest()

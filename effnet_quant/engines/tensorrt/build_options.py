"""BuildOptions: what a plan is built for; the key under which it is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from effnet_quant.errors import UserError

HARDWARE_COMPATIBILITY = ("none", "ampere-plus", "same-compute-capability")


@dataclass(frozen=True)
class BuildOptions:
    """What a plan is built for. Precision is not among it: networks are strongly typed, the ONNX file decides.

    Attributes:
        smallest_batch, usual_batch, largest_batch: images a run; the plan takes any number from the smallest to the
            largest and is fastest at the usual. They bind only where the ONNX file leaves the batch open.
        image_size: height and width in pixels, where the ONNX file leaves them open; None for what it was made for.
        workspace_mib: memory that a layer may use beside its activations; None for as much as the card has.
        version_compatible: runs in later versions of TensorRT too (with code of the plan's own; load only what you trust).
        hardware_compatible: "none": the card that built it; "same-compute-capability": cards of its generation;
            "ampere-plus": Ampere and later. Compatible plans can be slower.

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
    """What a plan depends on beside its model: a card's name and compute capability, and TensorRT's version."""

    card: str
    compute_capability: str
    tensorrt: str


def plan_key(model: bytes, machine: Machine, options: BuildOptions) -> str:
    """SHA-256 of everything that a plan follows from."""
    described = json.dumps({**asdict(machine), **options.to_json()}, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(model).digest() + described).hexdigest()

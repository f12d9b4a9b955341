"""The small part of NVIDIA's reference values that the tests need, and the parameters they were made with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference.fill import fill

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "efficientnet.json").read_text(encoding="utf-8"))


def reference_images(count: int = 2) -> Tensor:
    """The input of the reference logits (for ``count`` 2)."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3, 64, 64)).astype(np.float32))


def fill_model(model: nn.Module) -> nn.Module:
    """Give every parameter and BatchNorm buffer its reference value; ranges of quantizers stay as they are."""
    values = {
        key: torch.from_numpy(np.asarray(fill(key, tuple(value.shape))))
        for key, value in model.state_dict().items()
        if not key.endswith("_amax")
    }
    model.load_state_dict(values, strict=False)
    return model

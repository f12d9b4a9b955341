"""Deterministic parameters for the reference values in efficientnet_reference.json.

fill(key, shape) gives the array stored under a state-dict key. The reference logits were produced with every parameter
and BatchNorm buffer filled this way, the model in eval mode, and the input numpy.random.default_rng(0)
.standard_normal((2, 3, 64, 64)) as float32. Squeeze-and-excitation weights are filled from their 2-D shape
(out, in) also where the definition stores them as 1x1 convolutions, so both forms hold the same numbers.

For the quantized architectures, every activation range is the maximum absolute value seen on that one input with all
quantizers off (so each quantizer records its float input), and every weight range the maximum absolute value per output
channel; then all quantizers are switched on. 'logits_quantizers_off' are the logits of the float pass, 'logits' of the
quantized one. Only the first 8 logits of each image are listed; 'logits_sum' covers all 1000.
"""

import zlib

import numpy as np


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith("running_mean"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if key.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if key.endswith("proj.bn.weight"):
        return rng.uniform(0.1, 0.3, shape).astype(np.float32)
    if ".bn." in key:
        values = rng.uniform(0.5, 1.5, shape) if key.endswith("weight") else 0.1 * rng.standard_normal(shape)
        return values.astype(np.float32)
    if key.endswith("bias"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if key.endswith(("squeeze.weight", "expand.weight")):
        flat = shape[:2]
        return (rng.standard_normal(flat) * np.sqrt(2.0 / flat[1])).astype(np.float32).reshape(shape)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)

"""The names that flags about training choose among. This file imports no library, so that parsers start fast."""

from __future__ import annotations

OPTIMIZERS = ("sgd", "rmsprop", "adamw")
SCHEDULES = ("step", "linear", "cosine")
AMP_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # name -> torch's dtype
AFFINITIES = (
    "none",
    "socket",
    "socket_single",
    "socket_single_unique",
    "socket_unique_interleaved",
    "socket_unique_contiguous",
)

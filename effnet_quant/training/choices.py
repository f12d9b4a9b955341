"""The names that the flags of training choose among. This file imports no library, so that a parser starts at once."""

from __future__ import annotations

OPTIMIZERS = ("sgd", "rmsprop")
SCHEDULES = ("step", "linear", "cosine")
AMP_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # name -> type of torch
AFFINITIES = (
    "none",
    "socket",
    "socket_single",
    "socket_single_unique",
    "socket_unique_interleaved",
    "socket_unique_contiguous",
)

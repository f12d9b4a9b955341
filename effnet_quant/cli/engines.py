"""The flags that choose an engine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.engines.runtimes import BACKENDS
from effnet_quant.errors import UserError

if TYPE_CHECKING:
    from effnet_quant.engines.engine import Engine

_BACKEND_OF = {".onnx": "onnxruntime", ".plan": "tensorrt"}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --engine-precision and --threads."""
    parser.add_argument(
        "--backend", choices=BACKENDS, help="runtime of the engine (default: onnxruntime for .onnx, tensorrt for .plan)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where it runs (default: the backend's usual one)")
    parser.add_argument(
        "--engine-precision",
        choices=("fp32", "bf16", "fp16"),
        help="what the backend computes in where the file says float (default: the backend's usual one)",
    )
    parser.add_argument("--threads", type=int, help="of the CPU, for the engine (default: the runtime's own choice)")


def is_engine(path: str) -> bool:
    """Whether the file is compiled, or to be compiled, rather than weights."""
    return Path(path).suffix in _BACKEND_OF


def usual_backend(path: str) -> str:
    """The backend that files of this kind are for."""
    return _BACKEND_OF.get(Path(path).suffix, "torch")


def chosen_engine(path: str, parsed: argparse.Namespace) -> Engine:
    """The engine of a file, as the flags say."""
    from effnet_quant.engines.engine import load_engine

    return load_engine(
        path,
        parsed.backend or usual_backend(path),
        device=parsed.device,
        precision=parsed.engine_precision,
        threads=parsed.threads,
    )


def refuse_unused(parsed: argparse.Namespace, flags: Mapping[str, str], why: str) -> None:
    """Say of flags that were given, by the name of their value, that they would do nothing.

    Raises:
        UserError: one was given.
    """
    given = [flag for name, flag in flags.items() if name in parsed.explicit]
    if given:
        raise UserError(f"{', '.join(given)}: {why}")

"""The flags that choose an engine, and the engine that they choose."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_quant.engines.deployment import is_deployment, read_deployment
from effnet_quant.engines.runtimes import BACKENDS
from effnet_quant.errors import UserError

if TYPE_CHECKING:
    from effnet_quant.engines.engine import Engine

_BACKEND_OF = {".onnx": "onnxruntime", ".plan": "tensorrt", ".pte": "executorch"}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --backend, --device, --engine-precision and --threads."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="runtime of the engine (default: by the file; onnxruntime for .onnx)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="device of the engine (default: the backend's usual one)"
    )
    parser.add_argument(
        "--engine-precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of float operations (default: the file's tuned one, else the backend's usual one)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: the runtime's own choice)")


def is_engine(path: str) -> bool:
    """Whether a file is an engine or a deploy.json, by its name."""
    return Path(path).suffix in _BACKEND_OF or is_deployment(path)


def usual_backend(path: str) -> str:
    """The default backend of a file: by its name, "torch" for weights; the one that a deploy.json names.

    Raises:
        UserError: the deploy.json can't be used.
    """
    if is_deployment(path):
        return read_deployment(path)[0].backend
    return _BACKEND_OF.get(Path(path).suffix, "torch")


def chosen_engine(path: str, parsed: argparse.Namespace) -> Engine:
    """Load a file's engine as the flags say."""
    from effnet_quant.engines.engine import load_engine

    return load_engine(
        path,
        parsed.backend or usual_backend(path),
        device=parsed.device,
        precision=parsed.engine_precision,
        threads=parsed.threads,
    )


def refuse_unused(parsed: argparse.Namespace, flags: Mapping[str, str], why: str) -> None:
    """Refuse flags that would do nothing.

    Args:
        parsed: the parsed arguments.
        flags: from the name of a value in ``parsed`` to its flag.
        why: the reason, for the message.

    Raises:
        UserError: one of the flags was given.
    """
    given = [flag for name, flag in flags.items() if name in parsed.explicit]
    if given:
        raise UserError(f"{', '.join(given)}: {why}")

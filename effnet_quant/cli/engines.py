"""The flags that choose an engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from effnet_quant.deploy.engine import BACKENDS, Engine, load_engine

_BACKEND_OF = {".onnx": "onnxruntime", ".plan": "tensorrt"}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--backend and --device."""
    parser.add_argument(
        "--backend", choices=BACKENDS, help="runtime of the engine (default: onnxruntime for .onnx, tensorrt for .plan)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where it runs (default: the backend's usual one)")


def is_engine(path: str) -> bool:
    """Whether the file is compiled, or to be compiled, rather than weights."""
    return Path(path).suffix in _BACKEND_OF


def usual_backend(path: str) -> str:
    """The backend that files of this kind are for."""
    return _BACKEND_OF.get(Path(path).suffix, "torch")


def chosen_engine(path: str, parsed: argparse.Namespace) -> Engine:
    """The engine of a file, as the flags say."""
    return load_engine(path, parsed.backend or usual_backend(path), device=parsed.device)

"""What the speed of engines was measured on: the machine, its CPU's features, and the versions of runtimes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from effnet_quant.engines.cpu import NOTABLE, cpu_flags
from effnet_quant.training.machine import describe_machine

_RUNTIMES = ("torch", "onnxruntime", "openvino", "tensorrt", "executorch")


def describe_engines_machine(threads: int | None) -> dict[str, Any]:
    """``describe_machine`` plus what decides the speed of engines: threads, CPU features, versions of runtimes."""
    flags = cpu_flags()
    return {
        **describe_machine(),
        "threads": threads,
        "cpu_flags": None if flags is None else [name for name in NOTABLE if name in flags],
        "runtimes": {name: version for name in _RUNTIMES if (version := _version(name))},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The result of ``describe_engines_machine`` on one line."""
    flags = ", ".join(machine["cpu_flags"] or ["features unknown"])
    count = machine["threads"]
    threads = "the runtimes' own threads" if count is None else f"{count} thread{'s' * (count != 1)}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["runtimes"].items())
    device = "" if machine["device"] == "CPU" else f"{machine['device']}; "
    return f"{device}{machine['processor']}, {machine['cores']} cores ({flags}), {threads}; {versions}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

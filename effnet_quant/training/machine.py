"""Describes the machine that a speed was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import effnet_quant


def describe_machine(processes: int = 1) -> dict[str, Any]:
    """Device, processor, library versions and commit as plain values. Unknown ones are None.

    Args:
        processes: number of processes of the job.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "devices": torch.cuda.device_count() if on_gpu else 0,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "effnet_quant": effnet_quant.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that holds this package, with "-dirty" if changed; None for an installed package."""
    git = ("git", "-C", str(Path(__file__).parent))
    if _output(*git, "ls-files", Path(__file__).name) is None:  # installed, perhaps inside another project's checkout
        return None
    return _output(*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if the command is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)

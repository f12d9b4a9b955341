"""Binds a process to the CPU cores next to its GPU, so that images don't cross between sockets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_CPUS = Path("/sys/devices/system/cpu")
_PCI = Path("/sys/bus/pci/devices")


def bind_to_gpu(mode: str, gpu: int) -> str:
    """Bind this process, and those it will start, to cores near its GPU.

    Args:
        mode: one of ``choices.AFFINITIES``, see ``choose_cores``.
        gpu: number of the GPU.

    Returns:
        What was done, for printing.
    """
    if not torch.cuda.is_available() or not hasattr(os, "sched_setaffinity"):
        return "no GPU with cores of its own here: the process may use all"
    allowed = os.sched_getaffinity(0)
    near = [_cores_near(index) & allowed or allowed for index in range(torch.cuda.device_count())]
    cores = choose_cores(mode, gpu, near, {core: _first_sibling(core) for core in allowed})
    os.sched_setaffinity(0, cores)
    return f"cores {', '.join(map(str, sorted(cores)))}"


def choose_cores(mode: str, gpu: int, near: Sequence[set[int]], first_sibling: dict[int, int]) -> set[int]:
    """Choose the cores for the process of one GPU.

    - "socket": all cores near the GPU.
    - "socket_single": the first of them.
    - "socket_single_unique": one core that no other GPU's process has.
    - "socket_unique_interleaved", "socket_unique_contiguous": an equal share of the socket's physical cores, in turn or in
      blocks, with all their hardware threads.

    Args:
        mode: one of ``choices.AFFINITIES`` but "none".
        gpu: number of the GPU.
        near: for each GPU, the cores of its socket.
        first_sibling: for each core, the first hardware thread of the same physical core.
    """
    socket = near[gpu]
    if mode == "socket":
        return set(socket)
    physical = sorted({first_sibling[core] for core in socket})
    if mode == "socket_single":
        return {core for core in socket if first_sibling[core] == physical[0]}
    neighbours = [index for index, cores in enumerate(near) if cores == socket]
    place, sharing = neighbours.index(gpu), len(neighbours)
    if mode == "socket_single_unique":
        return {core for core in socket if first_sibling[core] == physical[place % len(physical)]}
    if mode == "socket_unique_interleaved":
        mine = physical[place % len(physical) :: sharing]
    else:
        block = max(1, len(physical) // sharing)
        start = place * block % len(physical)
        mine = physical[start : start + block]
    return {core for core in socket if first_sibling[core] in mine}


def _cores_near(gpu: int) -> set[int]:
    properties: Any = torch.cuda.get_device_properties(gpu)
    if not hasattr(properties, "pci_bus_id"):  # older versions of torch do not give the address
        return set()
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return _read_list(_PCI / address / "local_cpulist")


def _first_sibling(core: int) -> int:
    return min(_read_list(_CPUS / f"cpu{core}" / "topology" / "thread_siblings_list") or {core})


def _read_list(path: Path) -> set[int]:
    """The numbers in a kernel list such as 0-3,8; empty if there is no such file."""
    if not path.is_file():
        return set()
    ranges = [part.partition("-") for part in path.read_text().strip().split(",") if part]
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}

"""The processes that train together: their numbers, and their communication."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from effnet_quant.errors import PeerLost, UserError

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
# names that many jobs have: that of a process without torchrun, torchrun's default, and multiproc.py's on several machines
SHARED_NAMES = ("", "none", "effnet_quant")


@dataclass(frozen=True)
class World:
    """The processes of a job, seen from one of them. The defaults describe a single process.

    Every method is collective: all processes call it, in the same order. In a single process, methods cost nothing.

    Attributes:
        rank: number of this process, 0 … size - 1.
        size: number of processes.
        local_rank: number of this process on its machine, and of its GPU.
        job: torchrun's name of the job, which stays the same over restarts; "" for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    job: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the job."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: int) -> int:
        """The maximum of ``flag`` over the processes, 0 if it is 0 everywhere. Does not wait for the GPU."""
        if self.size == 1:
            return flag
        largest = torch.tensor(flag)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of process 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One CPU tensor of equal shape from each process, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let process 0 run the block first, then the others, which find its downloads."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


ALONE = World()


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that torchrun or multiproc.py started together, for the duration of the block.

    GPU tensors use NCCL, CPU tensors Gloo. A process that was started alone gets ``ALONE``. If the process that started
    this one is killed, this one gets SIGTERM.

    Raises:
        UserError: there are more processes than GPUs.
        PeerLost: another process ended while this one waited for it, or did not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    world = World(
        int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]), os.environ.get("TORCHELASTIC_RUN_ID", "")
    )
    _get_sigterm_at_parents_end()
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there is no GPU for process {world.local_rank} of this machine, which has {torch.cuda.device_count()}; "
                "start as many with --nproc_per_node."
            )
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise PeerLost(f"process {world.rank} lost the others: {str(error).splitlines()[0]}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _get_sigterm_at_parents_end() -> None:
    """Have the kernel send SIGTERM when torchrun or multiproc.py is killed, which would leave this process behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

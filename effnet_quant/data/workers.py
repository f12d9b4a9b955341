"""Worker processes that read and transform images: start, end, and the file at which one died."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from effnet_quant.data.decoding import quiet_libjpeg
from effnet_quant.errors import UserError


def in_workers(dataset: Dataset[Any], workers: int, prefetch: int = 2, **options: Any) -> DataLoader[Any]:
    """A DataLoader over single items of a dataset. Its workers end only when the main process tells them."""
    # A worker that inherits an unreachable DALI pipeline would collect it, and wait for threads that it does not have
    gc.collect()
    return _AnyNumberOfWorkers(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_prepare_worker,
        # for the workers' base seed. Drawn from the global generator, it would change the dropout of a resumed epoch
        generator=torch.Generator(),
        **options,
    )


class _AnyNumberOfWorkers(DataLoader[Any]):
    """A DataLoader that does not warn of more workers than cores: their number is the user's choice, and harms nothing."""

    def check_worker_number_rationality(self) -> None:
        pass


class Whereabouts:
    """Notes in shared memory which image each worker is reading.

    Args:
        workers: number of worker processes.
        name: from an image's index to its name in messages.
    """

    def __init__(self, workers: int, name: Callable[[int], str]) -> None:
        self._at = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()  # process id and index
        self._name = name
        _whereabouts.add(self)

    def note(self, index: int) -> None:
        """Note the image that this worker reads next. Does nothing in the main process."""
        worker = get_worker_info()
        if worker is not None:
            self._at[worker.id].numpy()[:] = os.getpid(), index

    def of_a_dead_worker(self) -> str | None:
        """The name of the image that a worker was reading when it died; None if no worker died."""
        alive = {process.pid for process in multiprocessing.active_children()}
        return next((self._name(index) for process, index in self._at.tolist() if 0 <= process not in alive), None)


_whereabouts: weakref.WeakSet[Whereabouts] = weakref.WeakSet()  # of all loaders of this process


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Turn torch's error about a dead worker into a sentence that names the file.

    torch raises the error when the death's signal arrives. The main thread may then be waiting for a batch or in the
    middle of a training step.

    Raises:
        UserError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            for whereabouts in list(_whereabouts):
                if name := whereabouts.of_a_dead_worker():
                    raise UserError(
                        f"a data worker died while it was reading {name}; look at that file, and at the memory that is "
                        "left (fewer --workers need less)."
                    ) from error
        raise


def end_at_once() -> None:
    """Kill all workers without waiting for what they read. For a process that is about to end: its loaders stop working."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that dies
    # otherwise each loader waits up to five seconds for each of its workers
    torch.utils.data._utils.python_exit_status = True
    for child in multiprocessing.active_children():
        child.kill()


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group, but only the main process may end its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    quiet_libjpeg()


def _end_when_told(parent: int) -> None:
    """Wait for SIGTERM from the main process, which sends it at its own end; ignore SIGTERM from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

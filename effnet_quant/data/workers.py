"""The processes that read and transform images: how they start and end, and what one was reading when it died."""

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
    """The items of a dataset as they are, made in worker processes that end when the main process says so."""
    # a worker that inherits a dead DALI pipeline, and is the first to collect it, waits for threads it does not have
    gc.collect()
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_prepare_worker,
        # its workers' base seed; drawn from the global generator, it would shift the dropout of a resumed epoch
        generator=torch.Generator(),
        **options,
    )


class Whereabouts:
    """Which image each worker process is at.

    Args:
        workers: how many processes there are.
        name: what an image is called, by its index.
    """

    def __init__(self, workers: int, name: Callable[[int], str]) -> None:
        self._at = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()  # process id and index
        self._name = name
        _whereabouts.add(self)

    def note(self, index: int) -> None:
        """Say in a worker which image is next; in the main process nothing."""
        worker = get_worker_info()
        if worker is not None:
            self._at[worker.id].numpy()[:] = os.getpid(), index

    def of_a_dead_worker(self) -> str | None:
        """The image at which a worker ended, if one did."""
        alive = {process.pid for process in multiprocessing.active_children()}
        return next((self._name(index) for process, index in self._at.tolist() if 0 <= process not in alive), None)


_whereabouts: weakref.WeakSet[Whereabouts] = weakref.WeakSet()  # of all loaders of this process


@contextmanager
def explained_deaths() -> Iterator[None]:
    """In it, torch's error about a worker that died becomes a sentence that names the file.

    The error comes with the signal of the death, in the middle of whatever the main thread does: waiting for a batch, or
    a step of training.

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


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group; the main process decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    quiet_libjpeg()


def _end_when_told(parent: int) -> None:
    """Heed SIGTERM from the main process alone, which sends it when it ends, and then waits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

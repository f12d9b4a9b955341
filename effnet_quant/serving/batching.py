"""Batcher: requests that wait while an engine works become its next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class _Request:
    array: NDArray[Any]
    answers: asyncio.Future[list[Any]]


class Batcher:
    """Joins requests to batches, one batch at a time.

    A request that finds the engine idle waits ``delay`` for others. While a batch runs, requests gather for the next.

    Args:
        run: from an array (N, …) to N answers. It runs in a thread of its own.
        most: images in a batch, at most. A request is never split, so none may be larger.
        delay: seconds.
        observe: called with the number of images of each batch.
    """

    def __init__(
        self, run: Callable[[NDArray[Any]], list[Any]], most: int, delay: float, observe: Callable[[float], None]
    ) -> None:
        self._run, self._most, self._delay, self._observe = run, most, delay, observe
        self._waiting: asyncio.Queue[_Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, array: NDArray[Any]) -> list[Any]:
        """The answers for the images of a request.

        Raises:
            Exception: what ``run`` raised for its batch.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        request = _Request(array, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(request)
        return await request.answers

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        first = None
        while True:
            batch, first = await self._gather(first or await self._waiting.get())
            self._observe(sum(len(request.array) for request in batch))
            try:
                joined = np.concatenate([request.array for request in batch])
                answers = await loop.run_in_executor(self._thread, self._run, joined)
            except Exception as error:
                for request in batch:
                    if not request.answers.done():  # its client may have left
                        request.answers.set_exception(error)
                continue
            start = 0
            for request in batch:
                if not request.answers.done():
                    request.answers.set_result(answers[start : start + len(request.array)])
                start += len(request.array)

    async def _gather(self, first: _Request) -> tuple[list[_Request], _Request | None]:
        """A batch, and the request that did not fit: the batch is full, or its images have another size."""
        batch, count = [first], len(first.array)
        end = asyncio.get_running_loop().time() + self._delay
        while count < self._most:
            if self._waiting.empty():
                try:
                    left = end - asyncio.get_running_loop().time()
                    request = await asyncio.wait_for(self._waiting.get(), left)
                except asyncio.TimeoutError:
                    break
            else:
                request = self._waiting.get_nowait()
            if count + len(request.array) > self._most or request.array.shape[1:] != first.array.shape[1:]:
                return batch, request
            batch.append(request)
            count += len(request.array)
        return batch, None

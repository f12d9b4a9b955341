"""Requests that wait together run together; each gets its own answers."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from effnet_quant.serving.batching import Batcher


def answer(requests, *, most=4, run=None, cancel=()):
    """The answers to requests that come at once, and the batches that ran."""
    batches = []

    async def all_of_them():
        batcher = Batcher(run or (lambda array: [float(image.sum()) for image in array]), most, 0.02, batches.append)
        tasks = [asyncio.create_task(batcher(request)) for request in requests]
        await asyncio.sleep(0)
        for number in cancel:
            tasks[number].cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    return asyncio.run(all_of_them()), batches


def test_a_batch_is_as_full_as_it_may_be_and_no_request_is_split() -> None:
    requests = [np.full((count, 2), number) for number, count in enumerate([1, 2, 3, 1, 4])]
    answers, batches = answer(requests)
    assert answers == [[2.0 * number] * len(request) for number, request in enumerate(requests)]
    assert batches == [3, 4, 4]


def test_images_of_other_sizes_go_into_other_batches() -> None:
    answers, batches = answer([np.ones((1, 2)), np.ones((1, 3)), np.ones((1, 3))])
    assert (answers, batches) == ([[2.0], [3.0], [3.0]], [1, 2])


def test_a_failing_batch_and_a_client_that_leaves_stop_no_other_request() -> None:
    def run(array):
        if array.shape[1] == 3:
            raise ValueError("three")
        return list(array[:, 0])

    answers, _ = answer([np.ones((1, 3)), np.ones((1, 2)), np.full((1, 2), 5.0)], run=run, cancel=[1])
    assert isinstance(answers[0], ValueError)
    assert isinstance(answers[1], asyncio.CancelledError)
    assert answers[2] == [5.0]


@pytest.mark.parametrize("delay", [0, 0.0001])
def test_requests_gather_while_a_batch_runs(delay: float) -> None:
    started, go_on, batches = threading.Event(), threading.Event(), []

    def run(array):
        started.set()
        assert go_on.wait(10)
        return list(array[:, 0])

    async def one_then_three():
        batcher = Batcher(run, 8, delay, batches.append)
        first = asyncio.create_task(batcher(np.zeros((1, 1))))
        await asyncio.to_thread(started.wait, 10)
        others = [asyncio.create_task(batcher(np.full((1, 1), number))) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(one_then_three()) == [[0], [1], [2], [3]]
    assert batches == [1, 3]

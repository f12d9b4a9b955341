"""Which cores a process gets, on a made-up machine: two sockets of four cores with two threads each, four GPUs."""

from __future__ import annotations

import os

import pytest

from effnet_quant.training.affinity import bind_to_gpu, choose_cores
from effnet_quant.training.choices import AFFINITIES

# the second threads of cores 0-3 are 8-11, those of 4-7 are 12-15
FIRST, SECOND = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}
NEAR = [FIRST, FIRST, SECOND, SECOND]
FIRST_SIBLING = {core: core % 8 for core in range(16)}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("socket", [FIRST, FIRST, SECOND, SECOND]),
        ("socket_single", [{0, 8}, {0, 8}, {4, 12}, {4, 12}]),
        ("socket_single_unique", [{0, 8}, {1, 9}, {4, 12}, {5, 13}]),
        ("socket_unique_interleaved", [{0, 2, 8, 10}, {1, 3, 9, 11}, {4, 6, 12, 14}, {5, 7, 13, 15}]),
        ("socket_unique_contiguous", [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15}]),
    ],
)
def test_cores_of_each_gpu(mode, expected):
    assert [choose_cores(mode, gpu, NEAR, FIRST_SIBLING) for gpu in range(4)] == expected


@pytest.mark.parametrize("mode", AFFINITIES[1:])
def test_more_gpus_than_cores_still_get_one_each(mode):
    for gpu in range(4):
        assert choose_cores(mode, gpu, [{0, 1}] * 4, {0: 0, 1: 0})


@pytest.mark.parametrize("mode", AFFINITIES[1:])
def test_a_process_that_may_use_second_threads_only_stays_there(mode):
    assert choose_cores(mode, 0, [{8, 9, 10, 11}], FIRST_SIBLING) <= {8, 9, 10, 11}


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_nothing_is_bound():
    before = os.sched_getaffinity(0)
    assert "no GPU" in bind_to_gpu("socket_unique_contiguous", 0)
    assert os.sched_getaffinity(0) == before

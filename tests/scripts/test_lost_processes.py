"""A job that loses a process names it, or goes on from its checkpoint to the same bits."""

from __future__ import annotations

import random

import lost_processes
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The last checkpoint of a job that loses nothing."""
    return lost_processes.undisturbed(tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["epoch", "calibration", "checkpoint"])
def test_a_job_ends_and_names_the_process_that_was_killed(kind, rank, tmp_path):
    assert lost_processes.killed(tmp_path, kind, rank, random.Random(kind)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_may_restart_ends_with_the_same_bits(rank, straight, tmp_path):
    assert lost_processes.restarted(tmp_path, rank, random.Random(rank), straight) == []


@pytest.mark.parametrize("with_process", [False, True])
def test_a_machine_that_is_lost_and_comes_back_changes_no_bit(with_process, straight, tmp_path):
    assert lost_processes.agent_lost(tmp_path, with_process, random.Random(with_process), straight) == []

"""Which process sees which image."""

from __future__ import annotations

import pytest
import torch

from effnet_quant.data.order import Order
from effnet_quant.errors import UserError


def shares(count, batch_size, ranks, **options):
    """The indices of each process, by batch."""
    orders = [Order(torch.arange(count), batch_size, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
    batches = [[batch.tolist() for batch in order.batches(4)] for order in orders]
    assert [len(order) for order in orders] == [len(own) for own in batches]
    return batches


def test_without_shuffling_each_image_comes_once_however_many_processes_there_are():
    assert shares(11, 2, 3, shuffle=False, seed=0) == [
        [[0, 3], [6, 9]],
        [[1, 4], [7, 10]],
        [[2, 5], [8]],
    ]


def test_shuffled_processes_share_the_batches_that_one_would_have():
    three = shares(11, 1, 3, shuffle=True, seed=5)
    (one,) = shares(11, 3, 1, shuffle=True, seed=5)
    assert [len(own) for own in three] == [3, 3, 3]
    together = [[image for part in step for image in part] for step in zip(*three, strict=True)]
    assert together == one
    assert len({image for step in together for image in step}) == 9


def test_an_epoch_shorter_than_a_batch_is_shared_too():
    three = shares(11, 8, 3, shuffle=True, seed=5)
    assert [[len(batch) for batch in own] for own in three] == [[3], [3], [3]]
    assert len({image for own in three for batch in own for image in batch}) == 9
    with pytest.raises(UserError, match="11 training images are too few for 12 processes"):
        Order(torch.arange(11), 1, shuffle=True, seed=0, ranks=12)

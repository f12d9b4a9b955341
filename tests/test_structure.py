"""Nested inputs and outputs."""

from collections import OrderedDict

import torch

from effnet_quant.structure import in_float32, leaves, map_leaves

NESTED = {"boxes": [1, (2, 3)], "aux": {"scores": 4}}


def test_leaves_are_named_by_their_path() -> None:
    assert leaves(NESTED) == {"boxes.0": 1, "boxes.1.0": 2, "boxes.1.1": 3, "aux.scores": 4}
    assert leaves(5) == {"": 5}
    assert leaves(()) == {}


def test_a_mapped_structure_keeps_its_containers() -> None:
    assert map_leaves(lambda leaf: 10 * leaf, NESTED) == {"boxes": [10, (20, 30)], "aux": {"scores": 40}}
    assert map_leaves(str, OrderedDict(out=1)) == {"out": "1"}
    assert map_leaves(str, 5) == "5"


def test_integers_stay_integers_in_float32() -> None:
    half, labels = in_float32((torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)))
    assert (half.dtype, labels.dtype) == (torch.float32, torch.int64)

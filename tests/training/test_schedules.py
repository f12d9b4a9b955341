"""Learning rates against numbers worked out by hand from NVIDIA's formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effnet_quant.training.schedules import learning_rate

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "training.json").read_text())


def rates(schedule, epochs_asked, **options):
    return [learning_rate(schedule, epoch, **options) for epoch in epochs_asked]


def test_step_drops_tenfold_at_30_60_and_80():
    got = rates("step", [0, 29, 30, 59, 60, 79, 80, 89], base_lr=0.1, epochs=90)
    assert got == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_linear_goes_from_the_base_to_zero():
    got = rates("linear", [0, 1, 5, 9, 10], base_lr=0.4, epochs=10)
    assert got == pytest.approx([0.4, 0.36, 0.2, 0.04, 0.0])


def test_cosine_is_half_way_in_the_middle():
    # 0.5 (1 + cos(pi e / 8)): e = 2 gives (2 + sqrt 2) / 4, e = 4 gives 1/2, e = 6 gives (2 - sqrt 2) / 4
    got = rates("cosine", [0, 2, 4, 6, 8], base_lr=1.0, epochs=8)
    assert got == pytest.approx([1.0, 0.8535533906, 0.5, 0.1464466094, 0.0])


def test_warm_up_rises_linearly_to_the_base():
    for schedule in ("step", "linear", "cosine"):
        got = rates(schedule, range(4), base_lr=0.08, epochs=20, warmup=4)
        assert got == pytest.approx([0.02, 0.04, 0.06, 0.08])


def test_decay_counts_from_the_end_of_the_warm_up():
    assert rates("linear", [4, 8, 12, 19], base_lr=0.16, epochs=20, warmup=4) == pytest.approx([0.16, 0.12, 0.08, 0.01])
    assert rates("cosine", [4, 12], base_lr=0.16, epochs=20, warmup=4) == pytest.approx([0.16, 0.08])


def test_step_milestones_do_not_move_with_the_warm_up():
    assert rates("step", [29, 30], base_lr=0.1, epochs=90, warmup=5) == pytest.approx([0.1, 0.01])


def test_decay_ends_at_end_lr():
    assert rates("cosine", [0, 5, 10], base_lr=0.5, epochs=10, end_lr=0.1) == pytest.approx([0.5, 0.3, 0.1])
    assert rates("linear", [0, 5, 10], base_lr=0.5, epochs=10, end_lr=0.1) == pytest.approx([0.5, 0.3, 0.1])


def test_efficientnet_recipe_of_400_epochs():
    # NVIDIA's B0: lr 0.08, 16 epochs of warm-up, cosine; epoch 208 is half of the 384 that are left
    got = rates("cosine", [0, 15, 16, 208], base_lr=0.08, epochs=400, warmup=16)
    assert got == pytest.approx([0.005, 0.08, 0.08, 0.04])


def test_nothing_but_warm_up_is_no_division_by_zero():
    assert rates("cosine", [0, 1], base_lr=0.1, epochs=2, warmup=2) == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize("recorded", REFERENCE["schedules"])
def test_every_epoch_of_recorded_schedules(recorded):
    values = recorded["values"]
    options = {name: value for name, value in recorded.items() if name not in ("values", "schedule")}
    assert rates(recorded["schedule"], range(len(values)), **options) == pytest.approx(values, rel=1e-12)

"""Blends of batches against their formulas."""

from __future__ import annotations

import pytest
import torch

from effnet_quant.data.mixing import cutmix, mixup


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(6, 3, 16, 20, generator=generator), torch.eye(10)[[0, 9, 3, 3, 1, 7]]


def share_of_own(targets):
    return targets[0, 0].item()  # the first image has class 0, its neighbours have not


def test_mixup_blends_neighbours_and_targets_with_one_share():
    images, targets = batch()
    mixed, mixed_targets = mixup(images, targets, 0.4, torch.Generator().manual_seed(1))
    share = share_of_own(mixed_targets)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(mixed_targets, share * targets + (1 - share) * targets.roll(1, 0))


def test_cutmix_takes_a_box_of_the_neighbour_and_its_area_of_the_target():
    images, targets = batch()
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        mixed, mixed_targets = cutmix(images, targets, 1.0, generator)
        own = (mixed == images).all(1)
        assert torch.equal(torch.where(own[:, None], images, images.roll(1, 0)), mixed)
        rows, columns = (~own[0]).any(1).sum(), (~own[0]).any(0).sum()
        assert rows * columns == (~own[0]).sum()  # one box
        assert share_of_own(mixed_targets) == pytest.approx(own[0].float().mean().item(), abs=1e-6)
        torch.testing.assert_close(mixed_targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("mixing", [mixup, cutmix])
def test_shares_come_from_the_generator_alone(mixing):
    images, targets = batch()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, second = (mixing(images, targets, 0.2, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[1], second[1])
    again = mixing(images, targets, 0.2, torch.Generator().manual_seed(5))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_shares_have_the_beta_distributions_moments():
    images, targets = batch()
    generator = torch.Generator().manual_seed(5)
    shares = torch.tensor([share_of_own(mixup(images, targets, 0.2, generator)[1]) for _ in range(2000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=0.04)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.4), abs=0.02)

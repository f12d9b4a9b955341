"""Random erasing: where the boxes lie, how large they are, and what decides them."""

from __future__ import annotations

import torch

from effnet_quant.data.erasing import erase


def erased(probability, seed=0, *, count=2000, size=(20, 30)):
    """Which pixels of each image are erased: bool (N, H, W)."""
    images = erase(torch.ones(count, 3, *size), probability, seed)
    assert torch.equal(images, images[:, :1].expand_as(images))  # all channels together
    assert set(images.unique().tolist()) <= {0.0, 1.0}
    return images[:, 0] == 0


def test_boxes_are_the_papers():
    holes = erased(1.0)
    areas = holes.flatten(1).sum(1) / (20 * 30)
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(heights * widths, holes.flatten(1).sum(1))  # one box each, without gaps
    assert 0.01 < areas.min() < 0.03 and 0.3 < areas.max() < 0.37  # rounded sides
    assert abs(float(areas.mean()) - (0.02 + 1 / 3) / 2) < 0.01
    aspects = heights / widths
    assert aspects.log().mean().abs() < 0.1 and aspects.min() < 0.4 and aspects.max() > 2.5
    assert holes.any(0).all()  # every place is hit by some


def test_the_share_of_erased_images_is_the_probability():
    share = erased(0.3).flatten(1).any(1).float().mean()
    assert abs(float(share) - 0.3) < 0.03  # 3 standard deviations
    assert not erased(0.0).any()


def test_the_seed_decides():
    assert torch.equal(erased(0.5, 7, count=50), erased(0.5, 7, count=50))
    assert not torch.equal(erased(0.5, 7, count=50), erased(0.5, 8, count=50))

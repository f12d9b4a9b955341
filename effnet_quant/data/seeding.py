"""Random numbers that depend on given numbers alone, such as seed, epoch and image index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator in a ``with`` block. torchvision's transforms draw from no other generator."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def mix(*numbers: int) -> int:
    """Mix several numbers into one 63-bit seed (the finaliser of splitmix64, Steele et al. 2014, once per number)."""
    value = 0
    for number in numbers:
        value = (value + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1

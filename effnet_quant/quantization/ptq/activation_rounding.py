"""Rounding of activations while a block learns: cheap gradients, QDrop's dropping, ranges that learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.quantization.fake_quant import fake_quantize
from effnet_quant.quantization.quantizer import TensorQuantizer

_OFFSETS = 2**16


class Drops:
    """Random masks that keep a share of activations in float (QDrop, Wei et al. 2022).

    All masks are cut from one pool, at random places. New random numbers for every activation would take longer than the
    block itself.

    Args:
        share: of the values that stay in float.
        generator: draws the pool and the places.
    """

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self._share = share
        self._generator = generator
        self._pool = torch.empty(0)

    def mask(self, x: Tensor) -> Tensor | None:
        """1 where ``x`` is rounded and 0 where it stays in float, in the shape of ``x``; None if all of it is rounded."""
        if not self._share:
            return None
        if len(self._pool) < x.numel() + _OFFSETS:
            self._pool = torch.rand(x.numel() + _OFFSETS, generator=self._generator).ge_(self._share)
        offset = int(torch.randint(_OFFSETS, (), generator=self._generator))
        return self._pool[offset : offset + x.numel()].view(x.shape).to(x.device)

    def mixed(self, rounded: Tensor, exact: Tensor) -> Tensor:
        """``rounded``, with ``exact`` in the places that stay in float."""
        mask = self.mask(rounded) if rounded.is_floating_point() else None
        return rounded if mask is None else torch.addcmul(exact, rounded - exact, mask)


class _Rounded(torch.autograd.Function):
    """Fake quantization where ``mask`` is 1. The gradient passes unchanged, so nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: TensorQuantizer, mask: Tensor | None) -> Tensor:
        scale, zero_point = quantizer.scale, quantizer.zero_point
        low, high = quantizer.spec.bounds
        y = x.div(scale).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)
        return y if mask is None else torch.addcmul(x, y.sub_(x), mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class LearningActivation:
    """Takes the place of an activation quantizer's forward while a block learns.

    Args:
        quantizer: the quantizer; it has a range.
        drops: which activations stay in float.
        logs: logarithms of the factors of the range's ends, (lower, upper); None for new ones, which are 0. Quantizers that
            share them keep the same range.

    Attributes:
        logs: see above.
        learns: whether the range has a gradient. Then nothing is dropped.
    """

    def __init__(self, quantizer: TensorQuantizer, drops: Drops, logs: nn.Parameter | None = None) -> None:
        self.quantizer = quantizer
        self.learns = False
        self.logs = nn.Parameter(torch.zeros(2, device=quantizer.amax.device)) if logs is None else logs
        self._drops = drops
        self._lower = None if quantizer.amin is None else quantizer.amin.clone()
        self._upper = quantizer.amax.clone()

    def range(self) -> tuple[Tensor | None, Tensor]:
        """Both ends of the range, with gradients to ``logs``; the lower end of a symmetric grid is None."""
        factors = self.logs.exp()
        return None if self._lower is None else self._lower * factors[0], self._upper * factors[1]

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, rounded as the quantizer would."""
        if self.quantizer.observer is not None or not self.quantizer.rounds:
            return TensorQuantizer.forward(self.quantizer, x)
        if self.learns:
            lower, upper = self.range()
            return fake_quantize(x, upper, replace(self.quantizer.spec, learned=True), lower)
        rounded: Tensor = _Rounded.apply(x, self.quantizer, self._drops.mask(x))
        return rounded

    @torch.no_grad()
    def keep_range(self) -> None:
        """Give the quantizer the learned range."""
        lower, upper = self.range()
        self.quantizer.set_range(-upper if lower is None else lower, upper)


@contextmanager
def in_place_of(activations: Sequence[LearningActivation]) -> Iterator[None]:
    """Within the block each quantizer calls its LearningActivation."""
    try:
        for activation in activations:
            activation.quantizer.forward = activation  # type: ignore[method-assign]
        yield
    finally:
        for activation in activations:
            del activation.quantizer.forward

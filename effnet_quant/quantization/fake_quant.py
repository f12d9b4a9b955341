"""fake_quantize: rounds float values to an integer grid, with gradients for training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.spec import TensorSpec


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    spec: TensorSpec,
    amin: Tensor | None = None,
    *,
    batched: bool = True,
    halves_up: bool = False,
) -> Tensor:
    """Quantize and dequantize ``x``. The result lies on the grid to the last bit.

    A fixed range has the straight-through gradient (Bengio et al. 2013): the gradient of ``x`` passes unchanged, or is 0
    where ``x`` saturates, more than half a step beyond the grid. The range gets no gradient.

    A learned range has LSQ's gradients (Esser et al. 2020) or, on an affine grid, LSQ+'s (Bhalgat et al. 2020). See
    ``_LearnedScale`` and ``_LearnedRange``.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        amax: upper end of the range; on a symmetric grid the largest magnitude. Its shape broadcasts to that of ``x``.
        spec: the grid.
        amin: lower end of the range, for affine grids.
        batched: whether the first dimension is the batch, as in activations. LSQ scales the gradient of a learned range by
            the number of values per example.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    low: int | Tensor
    high: int | Tensor
    low, high = spec.bounds
    steps = high - low
    scale, zero_point = scale_and_zero_point(amax.detach(), spec, None if amin is None else amin.detach())
    if zero_point is not None:
        low, high = low - zero_point, high - zero_point
    if not spec.learned:
        function = _FusedStraightThrough if torch.compiler.is_compiling() else _StraightThrough
        result: Tensor = function.apply(x.float(), scale, low, high, halves_up)
        return result.to(x.dtype)
    # LSQ's N, the number of values that share a range: weights of the layer or channel, activations of one image
    features = max(1, x.numel() // amax.numel() // (x.shape[0] if batched else 1))
    if spec.symmetric:
        result = _LearnedScale.apply(x.float(), amax, scale, low, high, math.sqrt(spec.bounds[1] / features), halves_up)
    else:
        result = _LearnedRange.apply(
            x.float(), amin, amax, scale, low, high, steps, math.sqrt(steps / features), halves_up
        )
    return result.to(x.dtype)


def _rounded(ratio: Tensor, halves_up: bool) -> Tensor:
    """A new tensor of the nearest integers."""
    return torch.floor(ratio + 0.5) if halves_up else torch.round(ratio)


class _StraightThrough(torch.autograd.Function):
    """The form for eager mode, where each pass goes through memory: four passes forward, one backward, one tensor saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor, halves_up: bool) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.bounds = (low, high)
        return _rounded(ratio, halves_up).clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (ratio,) = ctx.saved_tensors
        low, high = ctx.bounds
        if isinstance(low, Tensor):
            return torch.where((ratio > low - 0.5) & (ratio < high + 0.5), gradient, 0), None, None, None, None
        return torch.ops.aten.hardtanh_backward(gradient, ratio, low - 0.5, high + 0.5), None, None, None, None


class _FusedStraightThrough(torch.autograd.Function):
    """The form for torch.compile, which recomputes the mask in the backward pass instead of keeping it.

    The mask compares x with its clamped self. Two comparisons joined by "and" would make slower loops: they go through
    integers and are kept in memory. Within one rounding error of a threshold the mask may differ from
    ``_StraightThrough``'s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor, halves_up: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = (low, high)
        return _rounded(x / scale, halves_up).clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        inside = x.clamp((low - 0.5) * scale, (high + 0.5) * scale) == x
        return torch.where(inside, gradient, 0), None, None, None, None


class _LearnedScale(torch.autograd.Function):
    """LSQ on a symmetric grid.

    LSQ's parameter is the step s. The parameter here is amax = Qp * s. Its gradient is scaled by sqrt(Qp / N) in all, which
    is Qp times LSQ's factor 1 / sqrt(N Qp). So a step of gradient descent on amax moves s as LSQ does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float, halves_up: bool
    ) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.constants = (low, high, gradient_scale, amax.shape)
        return _rounded(ratio, halves_up).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ratio,) = ctx.saved_tensors
        low, high, gradient_scale, shape = ctx.constants
        inside = (ratio > low) & (ratio < high)
        slope = torch.where(inside, torch.round(ratio) - ratio, torch.clamp(ratio, low, high))
        to_amax = (gradient * slope).sum_to_size(shape) * gradient_scale
        return torch.where(inside, gradient, 0), to_amax, None, None, None, None, None


class _LearnedRange(torch.autograd.Function):
    """LSQ+ on an affine grid of n steps. The parameters are the ends of the range instead of scale and offset.

    The step is s = (amax - amin) / n. Within the grid amax gets 1/n of the gradient of s, and amin gets the opposite. A
    saturated value equals the end, so the end gets the value's gradient. Both gradients are scaled as in ``_LearnedScale``,
    with n in the place of Qp: n**2 / sqrt(N n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amin: Tensor,
        amax: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
        steps: int,
        gradient_scale: float,
        halves_up: bool,
    ) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio, low, high, amin, amax)
        ctx.constants = (steps, steps * gradient_scale)
        return _rounded(ratio, halves_up).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ratio, low, high, amin, amax = ctx.saved_tensors
        steps, gradient_scale = ctx.constants
        # A value equal to an end counts as inside, so it does not move the end. After a ReLU half of the values are there.
        above, below = ratio > high, ratio < low
        inside = ~(above | below)
        slope = torch.where(inside, (torch.round(ratio) - ratio) / steps, 0)
        to_amin = (gradient * (below.float() - slope)).sum_to_size(amin.shape) * gradient_scale
        to_amax = (gradient * (above.float() + slope)).sum_to_size(amax.shape) * gradient_scale
        # The grid always holds zero, so an end on the wrong side of zero has no effect. It may only move back.
        to_amin = torch.where(amin > 0, to_amin.clamp(min=0), to_amin)
        to_amax = torch.where(amax < 0, to_amax.clamp(max=0), to_amax)
        return torch.where(inside, gradient, 0), to_amin, to_amax, None, None, None, None, None, None

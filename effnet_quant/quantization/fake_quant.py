"""fake_quantize: rounding to the integer grid inside of a float network, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.spec import TensorSpec


def fake_quantize(
    x: Tensor, amax: Tensor, spec: TensorSpec, amin: Tensor | None = None, *, batched: bool = True
) -> Tensor:
    """Quantize and dequantize ``x``. The result lies on the grid to the last bit.

    With a fixed range the gradient is straight-through (Bengio et al. 2013): it passes unchanged where rounding alone
    decides, is zero where ``x`` saturates (more than half a step beyond the grid), and the range gets none. With a learned
    range the gradients of ``x`` and of the range are those of LSQ (Esser et al. 2020) and, on an affine grid, LSQ+
    (Bhalgat et al. 2020); see ``_LearnedScale`` and ``_LearnedRange``.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        amax: upper end of the range, of shape () or one that broadcasts to ``x``; on a symmetric grid the largest magnitude.
        spec: the grid.
        amin: lower end of the range, for affine grids.
        batched: whether the first dimension counts images, as that of activations does; LSQ scales the gradient of a
            learned range by the number of values in one of them.

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
        result: Tensor = function.apply(x.float(), scale, low, high)
        return result.to(x.dtype)
    # how many values of a layer share a range, LSQ's N: weights of the layer or channel, activations of one image
    features = max(1, x.numel() // amax.numel() // (x.shape[0] if batched else 1))
    if spec.symmetric:
        result = _LearnedScale.apply(x.float(), amax, scale, low, high, math.sqrt(spec.bounds[1] / features))
    else:
        result = _LearnedRange.apply(x.float(), amin, amax, scale, low, high, steps, math.sqrt(steps / features))
    return result.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """One tensor saved, four passes forward and one backward, where every pass goes through memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.bounds = (low, high)
        return torch.round(ratio).clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        low, high = ctx.bounds
        if isinstance(low, Tensor):
            return torch.where((ratio > low - 0.5) & (ratio < high + 0.5), gradient, 0), None, None, None
        return torch.ops.aten.hardtanh_backward(gradient, ratio, low - 0.5, high + 0.5), None, None, None


class _FusedStraightThrough(torch.autograd.Function):
    """The same for torch.compile, which computes what the backward pass needs a second time instead of keeping it.

    The mask is in the form that becomes the best loops: x itself, not x / scale, is compared, and with its clamped self,
    because two comparisons joined by "and" go through integers and are kept in memory. Within one rounding of a threshold
    the two forms may disagree.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = (low, high)
        return torch.round(x / scale).clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        inside = x.clamp((low - 0.5) * scale, (high + 0.5) * scale) == x
        return torch.where(inside, gradient, 0), None, None, None


class _LearnedScale(torch.autograd.Function):
    """LSQ on a symmetric grid.

    The parameter is amax = Qp * s, where LSQ's is the step s. The gradient of amax is that of s times Qp, with LSQ's factor
    1 / sqrt(N Qp), so that a step of gradient descent on amax moves s as LSQ's would: in all, sqrt(Qp / N).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        ctx.constants = (low, high, gradient_scale, amax.shape)
        return torch.round(ratio).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ratio,) = ctx.saved_tensors
        low, high, gradient_scale, shape = ctx.constants
        inside = (ratio > low) & (ratio < high)
        slope = torch.where(inside, torch.round(ratio) - ratio, torch.clamp(ratio, low, high))
        to_amax = (gradient * slope).sum_to_size(shape) * gradient_scale
        return torch.where(inside, gradient, 0), to_amax, None, None, None, None


class _LearnedRange(torch.autograd.Function):
    """LSQ+ on an affine grid of n steps, by its ends instead of its scale and offset.

    s = (amax - amin) / n, so within the grid amax gets 1/n of the gradient of s and amin the opposite; a saturated value
    is the end itself. Both gradients are scaled as ``_LearnedScale`` does, with n in the place of Qp: n**2 / sqrt(N n).
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
    ) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio, low, high, amin, amax)
        ctx.constants = (steps, steps * gradient_scale)
        return torch.round(ratio).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ratio, low, high, amin, amax = ctx.saved_tensors
        steps, gradient_scale = ctx.constants
        # a value at the very end of the grid lies on it: behind a ReLU half of them do, and pull at nothing
        above, below = ratio > high, ratio < low
        inside = ~(above | below)
        slope = torch.where(inside, (torch.round(ratio) - ratio) / steps, 0)
        to_amin = (gradient * (below.float() - slope)).sum_to_size(amin.shape) * gradient_scale
        to_amax = (gradient * (above.float() + slope)).sum_to_size(amax.shape) * gradient_scale
        # the grid holds zero, whatever the range: an end beyond zero moves nothing, and may only come back
        to_amin = torch.where(amin > 0, to_amin.clamp(min=0), to_amin)
        to_amax = torch.where(amax < 0, to_amax.clamp(max=0), to_amax)
        return torch.where(inside, gradient, 0), to_amin, to_amax, None, None, None, None, None

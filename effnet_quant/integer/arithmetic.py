"""The rules of integer-only inference, on Python's unbounded integers. docs/integer.md states them in words.

The executors compute the same numbers on arrays. The only function that sees a float is ``multiplier_and_shift``. It runs
when a file is written; what it returns is stored.
"""

from __future__ import annotations

import math

SMALLEST_MULTIPLIER = 2**30
LARGEST_MULTIPLIER = 2**31 - 1
LARGEST_SHIFT = 62
LEFT_SHIFT = 20  # of 8-bit operands before they are aligned; eight operands fit 32 bits
SUM_LIMIT = 2**31  # every sum stays below, in magnitude
TABLE_LENGTH = 256


def multiplier_and_shift(ratio: float) -> tuple[int, int]:
    """The multiplier and shift of a positive ratio: multiplier / 2**shift is within one part in 2**31 of it.

    A ratio below 2**-32 takes every 32-bit sum to 0, and so does the smallest representable one, which replaces it. A ratio
    of 2**31 or more saturates every sum but 0, and so does the largest multiplier with the shift 0, which replaces it.

    Raises:
        ValueError: the ratio is not positive and finite.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"{ratio} is no ratio of two scales")
    fraction, exponent = math.frexp(ratio)
    multiplier = round(math.ldexp(fraction, 31))
    if multiplier > LARGEST_MULTIPLIER:
        multiplier, exponent = SMALLEST_MULTIPLIER, exponent + 1
    shift = 31 - exponent
    if shift < 0:
        return LARGEST_MULTIPLIER, 0
    return (multiplier, shift) if shift <= LARGEST_SHIFT else (SMALLEST_MULTIPLIER, LARGEST_SHIFT)


def shift_right(value: int, shift: int) -> int:
    """``value`` / 2**``shift``, rounded to the nearest integer. Halves round up, towards positive infinity.

    The sum is shifted arithmetically: the bits that fall off are dropped, which rounds towards negative infinity.
    """
    half = 1 << (shift - 1) if shift else 0
    return (value + half) >> shift  # Python's >> is arithmetic


def rescale(value: int, multiplier: int, shift: int) -> int:
    """``value`` times multiplier / 2**shift, rounded once."""
    return shift_right(value * multiplier, shift)


def saturate(value: int, low: int, high: int) -> int:
    """``value``, or the nearer end if it lies beyond."""
    return min(max(value, low), high)


def requantize(value: int, multiplier: int, shift: int, zero_point: int, low: int, high: int) -> int:
    """A sum on the grid of 8-bit integers: rescale, add the zero point, saturate."""
    return saturate(rescale(value, multiplier, shift) + zero_point, low, high)


def align(value: int, zero_point: int, left_shift: int, multiplier: int, shift: int) -> int:
    """An operand of an addition, in the common unit of all operands."""
    return rescale((value - zero_point) << left_shift, multiplier, shift)


def sum_bound(terms: int, largest_input: int, largest_weight: int, largest_bias: int) -> int:
    """An upper bound of a layer's sums, in magnitude: terms * max|x - z| * max|w| + max|b|.

    Args:
        terms: products in one sum.
        largest_input: of |x - zero point|, over all 8-bit integers.
        largest_weight, largest_bias: the largest magnitudes.
    """
    return terms * largest_input * largest_weight + largest_bias


def reach(zero_point: int) -> int:
    """The largest |x - zero point| of a uint8 x."""
    return max(zero_point, 255 - zero_point)

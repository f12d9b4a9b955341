"""The rules of integer inference on numbers."""

from __future__ import annotations

from fractions import Fraction
from math import floor, inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet_quant.integer import arithmetic, reference

MULTIPLIERS = st.integers(2**30, 2**31 - 1)
SHIFTS = st.integers(0, 62)
SUMS = st.integers(-(2**31) + 1, 2**31 - 1)


@given(SUMS, MULTIPLIERS, SHIFTS)
def test_a_rescale_rounds_once_and_halves_up(value: int, multiplier: int, shift: int) -> None:
    exact = floor(Fraction(value * multiplier, 2**shift) + Fraction(1, 2))
    assert arithmetic.rescale(value, multiplier, shift) == exact
    arrays = [np.array([number], np.int64) for number in (value, multiplier, shift)]
    assert reference.rescale(*arrays).tolist() == [exact], "64 bits are enough"


@pytest.mark.parametrize(("value", "rounded"), [(-3, -1), (-2, -1), (-1, 0), (1, 1), (2, 1), (3, 2)])
def test_halves(value: int, rounded: int) -> None:
    assert arithmetic.shift_right(value, 1) == rounded


@given(st.floats(2.0**-31, 2.0**30))
def test_a_ratio_is_kept_to_31_bits(ratio: float) -> None:
    multiplier, shift = arithmetic.multiplier_and_shift(ratio)
    assert 2**30 <= multiplier < 2**31
    assert 0 <= shift <= 62
    assert abs(Fraction(multiplier, 2**shift) / Fraction(ratio) - 1) <= Fraction(1, 2**31)


@given(SUMS, st.floats(1e-300, 2.0**-32, exclude_max=True))
def test_a_ratio_too_small_for_a_shift_gives_zero(value: int, ratio: float) -> None:
    assert arithmetic.rescale(value, *arithmetic.multiplier_and_shift(ratio)) == 0


@given(st.floats(2.0**31, 1e300), st.integers(0, 255))
def test_a_ratio_too_large_for_a_shift_saturates(ratio: float, zero_point: int) -> None:
    numbers = arithmetic.multiplier_and_shift(ratio)
    results = [arithmetic.requantize(value, *numbers, zero_point, 0, 255) for value in (-(2**30), -1, 0, 1, 2**30)]
    assert results == [0, 0, zero_point, 255, 255]


@pytest.mark.parametrize("ratio", [0.0, -1.0, inf, nan])
def test_what_is_no_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match="no ratio"):
        arithmetic.multiplier_and_shift(ratio)

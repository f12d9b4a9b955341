"""The claim of deploy/ranges.py: quantizing over the needed interval clips nothing that the next quantizer tells apart."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_quant.deploy.ranges import Interval, NeededRanges, affine_uint8

node = onnx.helper.make_node


def quantize(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, 255)


def chain(op: str) -> list[onnx.NodeProto]:
    """``x`` through an operation to a quantizer."""
    last = node("QuantizeLinear", ["y", "scale", "zero"], ["q"])
    if op == "silu":
        return [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"]), last]
    if op == "sigmoid":
        return [node("Sigmoid", ["x"], ["y"]), last]
    if op == "add":
        return [node("DequantizeLinear", ["i", "other_scale", "zero"], ["o"]), node("Add", ["x", "o"], ["y"]), last]
    return [node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 10.0), st.sampled_from(["silu", "sigmoid", "none"]))
def test_clipping_to_the_interval_changes_no_integer(scale: float, op: str) -> None:
    constants = {"scale": np.array(scale, np.float32), "zero": np.array(128, np.uint8)}
    interval = NeededRanges(chain(op), constants).of("x")
    assert interval is not None
    x = np.concatenate([np.linspace(-60, 60, 20001), np.linspace(-2000, 2000, 2001)])
    functions = {"silu": lambda v: v / (1 + np.exp(-v)), "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "none": lambda v: v}
    with np.errstate(over="ignore"):
        expected = quantize(functions[op](x), scale, 128)
        got = quantize(functions[op](np.clip(x, *interval)), scale, 128)
    assert np.abs(got - expected).max() <= (1 if op == "sigmoid" else 0)
    assert np.mean(got != expected) < 1e-3 or op == "sigmoid"


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_clipping_an_addend_changes_no_integer_whatever_the_other_is(scale: float, other_scale: float) -> None:
    constants = {name: np.array(v, np.float32) for name, v in (("scale", scale), ("other_scale", other_scale))}
    interval = NeededRanges(chain("add"), constants | {"zero": np.array(128, np.uint8)}).of("x")
    assert interval is not None
    rng = np.random.default_rng(0)
    x = rng.uniform(-600, 600, 20000)
    other = rng.integers(-128, 128, 20000) * other_scale
    expected = quantize(x + other, scale, 128)
    assert np.array_equal(quantize(np.clip(x, *interval) + other, scale, 128), expected)


def test_the_interval_is_tight_around_what_matters() -> None:
    constants = {"scale": np.array(8 / 127, np.float32), "zero": np.array(128, np.uint8)}
    interval = NeededRanges(chain("silu"), constants).of("x")
    assert interval is not None
    assert 8 < interval.high < 8.1
    assert -6 < interval.low < -4


def test_what_is_not_quantized_behind_has_no_interval() -> None:
    relu = [node("Relu", ["x"], ["y"])]
    assert NeededRanges(relu, {}).of("x") is None
    assert NeededRanges([], {}).of("x") is None
    float_consumer = [*chain("silu"), node("Neg", ["y"], ["z"])]
    constants = {"scale": np.array(1.0, np.float32), "zero": np.array(128, np.uint8)}
    assert NeededRanges(float_consumer, constants).of("x") is None


def test_two_consumers_need_both_of_their_intervals() -> None:
    wide = node("QuantizeLinear", ["x", "wide", "zero"], ["r"])
    constants = {
        "scale": np.array(1.0, np.float32),
        "wide": np.array(2.0, np.float32),
        "zero": np.array(128, np.uint8),
    }
    assert NeededRanges([*chain("none"), wide], constants).of("x") == (-257.0, 255.0)


@pytest.mark.parametrize(
    "interval", [Interval(-1.0, 3.0), Interval(0.5, 2.0), Interval(-4.0, -1.0), Interval(0.0, 1.0)]
)
def test_affine_grid_covers_the_interval_and_zero(interval: Interval) -> None:
    scale, zero_point = affine_uint8(interval)
    assert 0 <= zero_point <= 255
    assert (0 - zero_point) * scale <= interval.low + scale / 2 + 1e-6
    assert (255 - zero_point) * scale >= interval.high - scale / 2 - 1e-6

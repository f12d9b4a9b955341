"""NeededRanges's claim: quantizing over the needed interval clips nothing that the next quantizer tells apart."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_quant.export.needed_ranges import NeededRanges
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.quantizer import AFFINE_UINT8

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
    if op in ("HardSwish", "HardSigmoid"):
        return [node(op, ["x"], ["y"]), last]
    if op == "add":
        return [node("DequantizeLinear", ["i", "other_scale", "zero"], ["o"]), node("Add", ["x", "o"], ["y"]), last]
    return [node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 10.0), st.sampled_from(["silu", "sigmoid", "HardSwish", "HardSigmoid", "none"]))
def test_clipping_to_the_needed_changes_no_integer(scale: float, op: str) -> None:
    constants = {"scale": np.array(scale, np.float32), "zero": np.array(128, np.uint8)}
    needed = NeededRanges(chain(op), constants).of("x")
    assert needed is not None
    x = np.concatenate([np.linspace(-60, 60, 20001), np.linspace(-2000, 2000, 2001)])
    functions = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "HardSwish": lambda v: v * np.clip(v / 6 + 0.5, 0, 1),
        "HardSigmoid": lambda v: np.clip(v / 6 + 0.5, 0, 1),
        "none": lambda v: v,
    }
    with np.errstate(over="ignore"):
        expected = quantize(functions[op](x), scale, 128)
        got = quantize(functions[op](np.clip(x, needed.low, needed.high)), scale, 128)
    assert np.abs(got - expected).max() <= (1 if op == "sigmoid" else 0)
    assert np.mean(got != expected) < 1e-3 or op == "sigmoid"


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_clipping_an_addend_changes_no_integer_whatever_the_other_is(scale: float, other_scale: float) -> None:
    constants = {name: np.array(v, np.float32) for name, v in (("scale", scale), ("other_scale", other_scale))}
    needed = NeededRanges(chain("add"), constants | {"zero": np.array(128, np.uint8)}).of("x")
    assert needed is not None
    rng = np.random.default_rng(0)
    x = rng.uniform(-600, 600, 20000)
    other = rng.integers(-128, 128, 20000) * other_scale
    expected = quantize(x + other, scale, 128)
    assert np.array_equal(quantize(np.clip(x, needed.low, needed.high) + other, scale, 128), expected)


def test_the_needed_is_tight_around_what_matters() -> None:
    constants = {"scale": np.array(8 / 127, np.float32), "zero": np.array(128, np.uint8)}
    needed = NeededRanges(chain("silu"), constants).of("x")
    assert needed is not None
    assert 8 < needed.high < 8.1
    assert -6 < needed.low < -4


def test_what_is_not_quantized_behind_has_no_needed() -> None:
    relu = [node("Relu", ["x"], ["y"])]
    assert NeededRanges(relu, {}).of("x") is None
    assert NeededRanges([], {}).of("x") is None
    float_consumer = [*chain("silu"), node("Neg", ["y"], ["z"])]
    constants = {"scale": np.array(1.0, np.float32), "zero": np.array(128, np.uint8)}
    assert NeededRanges(float_consumer, constants).of("x") is None


def test_two_consumers_need_both_of_their_neededs() -> None:
    wide = node("QuantizeLinear", ["x", "wide", "zero"], ["r"])
    constants = {
        "scale": np.array(1.0, np.float32),
        "wide": np.array(2.0, np.float32),
        "zero": np.array(128, np.uint8),
    }
    assert NeededRanges([*chain("none"), wide], constants).of("x") == (-257.0, 255.0, 1.0)


def test_two_grids_behind_a_silu_both_keep_their_integers() -> None:
    coarse, fine = 100 / 127, 1 / 127
    constants = {
        "scale": np.array(coarse, np.float32),
        "fine": np.array(fine, np.float32),
        "zero": np.array(128, np.uint8),
    }
    nodes = [*chain("silu"), node("QuantizeLinear", ["y", "fine", "zero"], ["r"])]
    needed = NeededRanges(nodes, constants).of("x")
    assert needed is not None
    x = np.linspace(-120, 120, 40001)
    clipped = np.clip(x, needed.low, needed.high)
    for scale in (coarse, fine):
        expected = quantize(x / (1 + np.exp(-x)), scale, 128)
        assert np.array_equal(quantize(clipped / (1 + np.exp(-clipped)), scale, 128), expected)


def test_a_sigmoid_that_serves_more_than_its_product_is_no_silu() -> None:
    constants = {"scale": np.array(1.0, np.float32), "zero": np.array(128, np.uint8)}
    other_use = [*chain("silu"), node("Mul", ["s", "z"], ["w"])]
    assert NeededRanges(other_use, constants).of("x") is None
    other_product = [*chain("silu"), node("Mul", ["x", "z"], ["w"])]
    assert NeededRanges(other_product, constants).of("x") is None


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 1.0)])
def test_affine_grid_covers_the_interval_and_zero(low: float, high: float) -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor(high), AFFINE_UINT8, torch.tensor(low))
    assert 0 <= zero_point <= 255
    assert (0 - zero_point) * scale <= low + scale / 2 + 1e-6
    assert (255 - zero_point) * scale >= high - scale / 2 - 1e-6

"""Needed ranges: quantizing over them clips nothing that the next quantizer tells apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from effnet_quant.export.passes.gate_rounding import join_silu
from effnet_quant.export.passes.needed_ranges import Needed, needed_of
from effnet_quant.export.traced_graph import Grid, TracedGraph
from effnet_quant.quantization.grid import scale_and_zero_point
from effnet_quant.quantization.quantizer import AFFINE_UINT8

aten = torch.ops.aten


def quantize(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, 255)


class Chain:
    """``x`` through operations; every value is called by a name."""

    def __init__(self, op: str, **scales: float) -> None:
        graph = fx.Graph()
        self.nodes = {"x": graph.placeholder("x"), "i": graph.placeholder("i")}
        self.traced = TracedGraph(graph, [self.nodes["x"], self.nodes["i"]], {})
        for value in self.nodes.values():
            value.meta["val"] = torch.zeros(1)
        self.scales = scales
        x = "x"
        if op == "add":
            self.quantize("i", "other_scale", "o")
            x = self.call(aten.add.Tensor, "y", "x", "o")
        elif op != "none":
            x = self.call(getattr(aten, op).default, "y", "x")
        self.quantize(x, "scale", "q")

    def call(self, target: object, name: str, *inputs: str) -> str:
        self.nodes[name] = self.traced.graph.call_function(target, tuple(self.nodes[value] for value in inputs))
        self.nodes[name].meta["val"] = torch.zeros(1)
        return name

    def quantize(self, source: str, scale: str, name: str) -> None:
        grid = Grid(torch.tensor(self.scales[scale], dtype=torch.float32), 128, 0, 255)
        self.nodes[name] = self.traced.quantize(self.nodes[source], grid, name)

    def needed(self) -> Needed | None:
        return needed_of(self.traced, self.nodes["x"])


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 10.0), st.sampled_from(["silu", "sigmoid", "hardswish", "hardsigmoid", "none"]))
def test_clipping_to_the_needed_changes_no_integer(scale: float, op: str) -> None:
    needed = Chain(op, scale=scale).needed()
    assert needed is not None
    x = np.concatenate([np.linspace(-60, 60, 20001), np.linspace(-2000, 2000, 2001)])
    functions = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "hardswish": lambda v: v * np.clip(v / 6 + 0.5, 0, 1),
        "hardsigmoid": lambda v: np.clip(v / 6 + 0.5, 0, 1),
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
    needed = Chain("add", scale=scale, other_scale=other_scale).needed()
    assert needed is not None
    rng = np.random.default_rng(0)
    x = rng.uniform(-600, 600, 20000)
    other = rng.integers(-128, 128, 20000) * other_scale
    expected = quantize(x + other, scale, 128)
    assert np.array_equal(quantize(np.clip(x, needed.low, needed.high) + other, scale, 128), expected)


def test_the_needed_is_tight_around_what_matters() -> None:
    needed = Chain("silu", scale=8 / 127).needed()
    assert needed is not None
    assert 8 < needed.high < 8.1
    assert -6 < needed.low < -4


def test_what_is_not_quantized_behind_has_no_needed() -> None:
    chain = Chain("silu", scale=1.0)
    chain.call(aten.neg.default, "z", "y")
    assert chain.needed() is None
    relu = Chain("none", scale=1.0)
    relu.call(aten.relu.default, "z", "x")
    assert relu.needed() is None


def test_two_consumers_need_both_of_their_neededs() -> None:
    chain = Chain("none", scale=1.0, wide=2.0)
    chain.quantize("x", "wide", "r")
    assert chain.needed() == (-257.0, 255.0, 1.0)


def test_two_grids_behind_a_silu_both_keep_their_integers() -> None:
    coarse, fine = 100 / 127, 1 / 127
    chain = Chain("silu", scale=coarse, fine=fine)
    chain.quantize("y", "fine", "r")
    needed = chain.needed()
    assert needed is not None
    x = np.linspace(-120, 120, 40001)
    clipped = np.clip(x, needed.low, needed.high)
    for scale in (coarse, fine):
        expected = quantize(x / (1 + np.exp(-x)), scale, 128)
        assert np.array_equal(quantize(clipped / (1 + np.exp(-clipped)), scale, 128), expected)


@pytest.mark.parametrize("written", [("x", "s"), ("s", "x")])
def test_a_silu_that_is_written_out_becomes_one(written: tuple[str, str]) -> None:
    chain = Chain("none", scale=1.0)
    chain.call(aten.sigmoid.default, "s", "x")
    chain.call(aten.mul.Tensor, "y", *written)
    chain.quantize("y", "scale", "r")
    join_silu(chain.traced)
    assert chain.nodes["y"].target is aten.silu.default
    assert chain.nodes["y"].args == (chain.nodes["x"],)


@pytest.mark.parametrize("extra", [("s", "i"), ("x", "i")])
def test_a_sigmoid_that_serves_more_than_its_product_is_no_silu(extra: tuple[str, str]) -> None:
    chain = Chain("none", scale=1.0)
    chain.call(aten.sigmoid.default, "s", "x")
    chain.call(aten.mul.Tensor, "y", "x", "s" if extra[0] == "s" else "i")
    chain.call(aten.mul.Tensor, "w", *extra)
    join_silu(chain.traced)
    assert chain.nodes["y"].target is aten.mul.Tensor
    assert chain.needed() is None


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 1.0)])
def test_affine_grid_covers_the_interval_and_zero(low: float, high: float) -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor(high), AFFINE_UINT8, torch.tensor(low))
    assert 0 <= zero_point <= 255
    assert (0 - zero_point) * scale <= low + scale / 2 + 1e-6
    assert (255 - zero_point) * scale >= high - scale / 2 - 1e-6

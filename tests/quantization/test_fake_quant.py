"""The quantizer's arithmetic against float64 formulas and onnx's reference QuantizeLinear / DequantizeLinear."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx.reference import ReferenceEvaluator

from effnet_quant.quantization.fake_quant import dequantize, fake_quantize, quantize, scale_from_amax
from effnet_quant.quantization.spec import TensorSpec

INT8 = TensorSpec(bits=8)
finite = st.floats(-(2.0**60), 2.0**60, width=32)
ranges = st.floats(2.0**-100, 2.0**60, width=32)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, array_shapes(max_dims=2, max_side=8), elements=finite), ranges, st.sampled_from([2, 4, 8]))
def test_integers_are_the_float64_formulas_but_for_ties(x: np.ndarray, amax: float, bits: int) -> None:
    spec = TensorSpec(bits=bits)
    scale = scale_from_amax(torch.tensor(amax), spec)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    exact = np.clip(x.astype(np.float64) / float(scale), low, high)
    got = quantize(torch.from_numpy(x), scale, spec).numpy()
    # float32 division may land on the other side of a tie that float64 tells apart
    assert np.all(np.abs(got - exact) <= 0.5 + 1e-5)
    assert np.array_equal(got, np.rint(got))
    assert got.min() >= low
    assert got.max() <= high


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (4, 3), elements=st.floats(-1000, 1000, width=32)), arrays(np.float32, (4,), elements=ranges))
def test_fake_quantize_is_onnx_quantize_dequantize_to_the_last_bit(ratios: np.ndarray, amax: np.ndarray) -> None:
    spec = TensorSpec(bits=8, axis=0)
    columns = torch.from_numpy(amax)[:, None]
    scale = scale_from_amax(columns, spec).flatten().numpy()
    x = ratios * scale[:, None]
    expected = onnx_quantize_dequantize(x, scale)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), columns, spec).numpy(), expected)


def onnx_quantize_dequantize(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    helper = onnx.helper
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=0),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=0),
        ],
        "qdq",
        [info("x", 1, None), info("scale", 1, None), info("zero", 3, None)],
        [info("y", 1, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    feeds = {"x": x, "scale": scale, "zero": np.zeros(len(scale), np.int8)}
    with np.errstate(over="ignore"):
        return ReferenceEvaluator(model).run(None, feeds)[0]


def test_halves_round_to_even_and_the_ends_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1000.0, -128.4, -1000.0])
    integers = quantize(x, torch.tensor(1.0), INT8)
    assert integers.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128]


def test_nan_stays_nan_and_infinities_saturate() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    result = fake_quantize(x, torch.tensor(127.0), INT8)
    assert torch.isnan(result[0])
    assert result[1:].tolist() == [127.0, -128.0]


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-39])
def test_zero_and_denormal_ranges_give_finite_results(amax: float) -> None:
    x = torch.tensor([0.0, amax, -amax])
    result = fake_quantize(x, torch.tensor(amax), INT8)
    assert torch.isfinite(result).all()
    assert result[0] == 0
    assert scale_from_amax(torch.tensor(amax), INT8) > 0


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-300.0, -1.3, 0.0, 0.4, 126.9, 300.0], requires_grad=True)
    fake_quantize(x, torch.tensor(127.0), INT8).backward(torch.arange(1.0, 7.0))
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 5.0, 0.0]))


def test_result_keeps_the_dtype_but_is_computed_in_float32() -> None:
    x = torch.linspace(-3, 3, 1001).to(torch.bfloat16)
    result = fake_quantize(x, torch.tensor(3.0), INT8)
    assert result.dtype == torch.bfloat16
    expected = fake_quantize(x.float(), torch.tensor(3.0), INT8).to(torch.bfloat16)
    assert torch.equal(result, expected)


def test_dequantize_inverts_quantize_on_the_grid() -> None:
    integers = torch.arange(-128, 128).float()
    scale = torch.tensor(0.037)
    assert torch.equal(quantize(dequantize(integers, scale), scale, INT8), integers)

"""The quantizer's arithmetic against float64 formulas and onnx's reference QuantizeLinear / DequantizeLinear."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from effnet_quant.quantization.fake_quant import fake_quantize
from effnet_quant.quantization.grid import dequantize, quantize, scale_and_zero_point
from effnet_quant.quantization.spec import WIDTHS, TensorSpec

INT8 = TensorSpec(bits=8)
finite = st.floats(-(2.0**60), 2.0**60, width=32)
ranges = st.floats(2.0**-100, 2.0**60, width=32)
grids = [
    TensorSpec(bits=bits, symmetric=symmetric, signed=signed, narrow=narrow)
    for bits in WIDTHS
    for symmetric in (True, False)
    for signed, narrow in ((True, False), (True, True), (False, False))
]


def ends(amax: np.ndarray, lower_share: float, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Upper and lower end of a range in which ``lower_share`` says where the lower end is."""
    upper = torch.as_tensor(amax)
    return upper, None if spec.symmetric else -upper * lower_share


def float64_grid(spec: TensorSpec, amin: np.ndarray | None, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point by the textbook, in float64."""
    low = -(2 ** (spec.bits - 1)) + spec.narrow if spec.signed else 0
    high = 2 ** (spec.bits - 1) - 1 if spec.signed else 2**spec.bits - 1
    amax = np.asarray(amax, np.float64)
    if amin is None:
        return amax / high, np.zeros_like(amax)
    amin, amax = np.minimum(np.asarray(amin, np.float64), 0), np.maximum(amax, 0)
    scale = (amax - amin) / (high - low)
    return scale, np.clip(np.rint(low - amin / scale), low, high)


@pytest.mark.parametrize("spec", grids, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    x=arrays(np.float32, array_shapes(max_dims=2, max_side=8), elements=finite),
    amax=ranges,
    lower_share=st.floats(-0.5, 2, width=32),
)
def test_integers_are_the_float64_formulas_but_for_ties(
    spec: TensorSpec, x: np.ndarray, amax: float, lower_share: float
) -> None:
    upper, lower = ends(np.float32(amax), lower_share, spec)
    true_scale, true_zero = float64_grid(spec, None if lower is None else lower.numpy(), upper.numpy())
    scale, zero_point = scale_and_zero_point(upper, spec, lower)
    if zero_point is not None:
        assert abs(zero_point.item() - true_zero) <= 1  # a tie may fall the other way in float32
        assert zero_point.item() == round(zero_point.item())
    assert scale.item() == pytest.approx(true_scale, rel=1e-6)
    low, high = spec.bounds
    zero = 0.0 if zero_point is None else zero_point.item()
    assert low <= zero <= high
    exact = np.clip(x.astype(np.float64) / scale.item() + zero, low, high)
    got = quantize(torch.from_numpy(x), scale, spec, zero_point).numpy()
    # float32 division may land on the other side of a tie that float64 tells apart
    assert np.all(np.abs(got - exact) <= 0.5 + 2.0 ** (spec.bits - 22))
    assert np.array_equal(got, np.rint(got))
    assert got.min() >= low
    assert got.max() <= high


# The element types of ONNX's QuantizeLinear, as (bits, signed).
ONNX_TYPES = {
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}
onnx_grids = [
    TensorSpec(bits=bits, signed=signed, symmetric=symmetric, per_channel=per_channel)
    for bits, signed in ONNX_TYPES
    for symmetric in (True, False)
    for per_channel in (False, True)
]


@pytest.mark.parametrize("spec", onnx_grids, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    ratios=arrays(np.float32, (4, 3), elements=st.floats(-1000, 1000, width=32)),
    amax=arrays(np.float32, (4,), elements=ranges),
    lower_share=st.floats(0, 2, width=32),
)
def test_fake_quantize_is_onnx_quantize_dequantize_to_the_last_bit(
    spec: TensorSpec, ratios: np.ndarray, amax: np.ndarray, lower_share: float
) -> None:
    columns = amax[:, None] if spec.per_channel else amax[0]
    upper, lower = ends(columns, lower_share, spec)
    scale, zero_point = scale_and_zero_point(upper, spec, lower)
    zero_point = torch.zeros_like(upper) if zero_point is None else zero_point
    x = ratios * scale.numpy()
    expected = onnx_quantize_dequantize(x, scale.numpy().squeeze(), zero_point.numpy().squeeze(), spec)
    got = fake_quantize(torch.from_numpy(x), upper, spec, lower).numpy()
    assert np.array_equal(got, expected)
    integers = quantize(torch.from_numpy(x), scale, spec, zero_point)
    assert np.array_equal(dequantize(integers, scale, zero_point).numpy(), expected)


def onnx_quantize_dequantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: TensorSpec) -> np.ndarray:
    kind = ONNX_TYPES[spec.bits, spec.signed]
    info = helper.make_tensor_value_info
    axis = {"axis": 0} if spec.per_channel else {}
    zero = helper.make_tensor("zero", kind, list(zero_point.shape), zero_point.astype(int).flatten())
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **axis),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **axis),
        ],
        "qdq",
        [info("x", TensorProto.FLOAT, None), info("scale", TensorProto.FLOAT, None)],
        [info("y", TensorProto.FLOAT, None)],
        [zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    with np.errstate(over="ignore"):
        return ReferenceEvaluator(model).run(None, {"x": x, "scale": scale})[0]


def test_halves_round_to_even_and_the_ends_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1000.0, -128.4, -1000.0])
    integers = quantize(x, torch.tensor(1.0), INT8)
    assert integers.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128]


def test_nan_stays_nan_and_infinities_saturate() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    result = fake_quantize(x, torch.tensor(127.0), INT8)
    assert torch.isnan(result[0])
    assert result[1:].tolist() == [127.0, -128.0]


def test_the_scale_of_an_ordinary_range_is_its_quotient_to_the_bit() -> None:
    amax = np.exp(np.random.default_rng(0).uniform(np.log(1e-25), np.log(1e38), 10_000)).astype(np.float32)
    scale, _ = scale_and_zero_point(torch.from_numpy(amax), INT8)
    np.testing.assert_array_equal(scale.numpy(), amax / np.float32(127))


@pytest.mark.parametrize("spec", grids, ids=str)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-39, 1e38])
def test_zero_denormal_and_huge_ranges_give_finite_results(amax: float, spec: TensorSpec) -> None:
    upper, lower = ends(np.float32(amax), 1.0, spec)
    x = torch.tensor([0.0, amax, -amax])
    result = fake_quantize(x, upper, spec, lower)
    assert torch.isfinite(result).all()
    assert result[0] == 0
    scale, _ = scale_and_zero_point(upper, spec, lower)
    assert scale >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bits", [4, 8])
def test_an_affine_range_always_holds_zero(bits: int) -> None:
    spec = TensorSpec(bits=bits, symmetric=False, signed=False)
    for low, high in ((0.5, 2.0), (-2.0, -0.5)):
        scale, zero_point = scale_and_zero_point(torch.tensor(high), spec, torch.tensor(low))
        assert zero_point is not None
        assert zero_point.item() == (0 if low > 0 else 2**bits - 1)
        assert scale.item() == pytest.approx(2.0 / (2**bits - 1))


def test_affine_gradient_passes_between_the_ends_alone() -> None:
    spec = TensorSpec(symmetric=False, signed=False)
    x = torch.tensor([-300.0, -99.0, 0.0, 100.4, 154.9, 300.0], requires_grad=True)
    fake_quantize(x, torch.tensor(155.0), spec, torch.tensor(-100.0)).backward(torch.arange(1.0, 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


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

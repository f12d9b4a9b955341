"""Single operations, exported and run by ONNX Runtime, against PyTorch."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import UserError, calibrate, export_onnx, load_engine, quantize
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.export.onnx import build_onnx
from effnet_quant.quantization.placement.insertion import quantizers

SIZE = 8
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """``operation`` between a convolution, (N, 4, 8, 8), and a sum over whatever dimensions come out."""

    def __init__(self, operation: Callable[..., Tensor] | nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.conv(x))
        # every position counts differently, so that an exchange of two is seen
        flat = y.flatten(1)
        return torch.stack([flat[:, ::2].sum(1), flat[:, 1::2].sum(1), flat[:, :3].sum(1)], dim=1)


def evo_norm(x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 2, 2, SIZE, SIZE)
    deviation = groups.float().var(dim=(2, 3, 4), unbiased=False, keepdim=True).add(1e-5).sqrt().to(x.dtype)
    return x / deviation.expand(groups.shape).reshape(x.shape)


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens * 0.5, tokens + 1, attn_mask=torch.eye(SIZE * SIZE))


OPERATIONS: dict[str, Callable[..., Tensor] | nn.Module] = {
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) * x,
    "expand to the batch": lambda x: torch.ones(1, 4, 1, 1).expand(x.shape[0], -1, SIZE, SIZE) + x,
    "EvoNorm (var, to, expand)": evo_norm,
    "unbiased variance": lambda x: x.var(dim=(2, 3)),
    "variance of all": lambda x: x.var(1, keepdim=True, correction=0),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "stack": lambda x: torch.stack([x, x * 2], dim=2),
    "unbind": lambda x: x.unbind(1)[2] - x.unbind(1)[0],
    "positions": lambda x: x[:, torch.tensor([2, 0, 3])].index_select(2, torch.tensor([5, 1])),
    "roll": lambda x: torch.roll(x, (3, -2), (2, 3)),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(2),
    "nearest up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "nearest to an odd size": lambda x: F.interpolate(x, size=(5, 13), mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(12, 16), mode="bilinear"),
    "bilinear, aligned corners": lambda x: F.interpolate(x, size=(13, 5), mode="bilinear", align_corners=True),
    # 26 * float32(53 / 26) is less than 53
    "to a size that no float32 factor gives": lambda x: F.interpolate(
        F.interpolate(x, size=26), size=(53, 53), mode="bilinear"
    ),
    "global maximum": lambda x: F.adaptive_max_pool2d(x, 1),
    "maxima of equal windows": lambda x: F.adaptive_max_pool2d(x, (2, 4)),
    "addcmul": lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.5),
    "euclidean norm": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "attention": attention,
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "RMSNorm": nn.RMSNorm(SIZE),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LayerNorm": nn.LayerNorm([SIZE, SIZE]),
    "maximum": lambda x: torch.maximum(x, x * 0.5),
    "clamp_min": lambda x: x.clamp_min(0.2).clamp_max(0.9),
    "rsqrt": lambda x: (x.square() + 1).rsqrt(),
    "softplus": nn.Softplus(),
    "selu": nn.SELU(),
    "unequal windows": nn.AdaptiveAvgPool2d(3),
}


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_an_operation_computes_what_pytorch_does_at_any_batch(name: str, tmp_path: Path) -> None:
    model = Around(OPERATIONS[name]).eval()
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    engine = load_engine(tmp_path / "model.onnx")
    for batch in (1, 3):
        got = torch.from_numpy(engine(IMAGES[:batch].numpy()))
        torch.testing.assert_close(got, model(IMAGES[:batch]), rtol=1e-4, atol=1e-4)


class PerPixel(nn.Module):
    """A linear layer over the channels of every pixel, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.mlp = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


@torch.no_grad()
def test_a_linear_layer_over_pixels_runs_on_integers_and_lints(tmp_path: Path) -> None:
    model = calibrate(quantize(PerPixel().eval()), [IMAGES], method="max")
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    got = torch.from_numpy(load_engine(tmp_path / "model.onnx")(IMAGES.numpy()))
    assert ((got - model(IMAGES)).norm() / got.norm()).item() < 5e-3
    proto = build_onnx(model, SIZE, target="tensorrt")
    assert lint_tensorrt(proto) == []
    producers = {node.output[0]: node for node in proto.graph.node}
    product = next(node for node in proto.graph.node if node.op_type == "MatMul")
    assert [producers[name].op_type for name in product.input] == ["DequantizeLinear"] * 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "compiled.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    compiled = Counter(node.op_type for node in onnx.load(tmp_path / "compiled.onnx").graph.node)
    assert compiled["MatMulIntegerToFloat"] + compiled["QLinearMatMul"] == 1
    assert compiled["MatMul"] == 0


def test_a_convolution_with_computed_weights_is_refused() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = x.mean((0, 2, 3)).reshape(1, 3, 1, 1)
            return self.conv(x).mean((2, 3)) + F.conv2d(x, weight).mean((2, 3))

    with pytest.raises(UserError, match="weights are computed from the image"):
        build_onnx(Conditional().eval(), SIZE)


def test_a_network_that_transforms_its_images_first_gets_images_of_three_channels() -> None:
    class ToDepth(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pixel_unshuffle(x, 2)).mean((2, 3))

    proto = build_onnx(ToDepth(nn.Conv2d(12, 4, 1)).eval(), SIZE)
    assert [dimension.dim_value for dimension in proto.graph.input[0].type.tensor_type.shape.dim[1:]] == [3, SIZE, SIZE]


@torch.no_grad()
def test_standardised_convolutions_round_the_weights_that_they_use(tmp_path: Path) -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed: pip install 'effnet-quant[timm]'")
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(
        layers.ScaledStdConv2d(3, 8, 3, padding=1), nn.ReLU(), layers.StdConv2d(8, 8, 3), *head
    ).eval()
    scaled = model[0]
    standardised = F.batch_norm(
        scaled.weight.reshape(1, 8, -1),
        None,
        None,
        (scaled.gain * scaled.scale).view(-1),
        training=True,
        eps=scaled.eps,
    ).reshape_as(scaled.weight)
    calibrate(quantize(model), [IMAGES], method="max")
    for index in (0, 2):
        layer = model[index]
        seen: list[Tensor] = []
        layer._weight_quantizer.register_forward_hook(lambda _, args, output, seen=seen: seen.extend([args[0], output]))
        model(IMAGES)
        used, rounded = seen[:2]
        scale = used.abs().amax((1, 2, 3), keepdim=True) / 127  # of the weights in use, not of the parameter
        assert not torch.allclose(used, layer.weight)
        torch.testing.assert_close(layer._weight_quantizer.scale, scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(rounded, torch.round(used / scale) * scale, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model[0]._weight_quantizer.amax.flatten(), standardised.abs().amax((1, 2, 3)))
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    got = torch.from_numpy(load_engine(tmp_path / "model.onnx")(IMAGES.numpy()))
    assert ((got - model(IMAGES)).norm() / got.norm()).item() < 5e-3


@pytest.mark.slow
def test_a_standardised_convolution_compiles_whole() -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed: pip install 'effnet-quant[timm]'")
    model = nn.Sequential(layers.ScaledStdConv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    calibrate(quantize(model), [IMAGES], method="max")
    compiled = torch.compile(model, fullgraph=True)
    expected, got = model(IMAGES), compiled(IMAGES)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))

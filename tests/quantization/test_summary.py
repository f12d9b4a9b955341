"""What summarize says is what quantize and export do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import UserError, calibrate, export_onnx, load_engine, quantize, summarize
from effnet_quant.quantization.placement.summary import NOT_EXPORTED


class Mixed(nn.Module):
    """Layers of several kinds; one convolution and one product are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel))
        x = self.up(x + self.body(self.conv(x)))
        tokens = x.flatten(2)
        return self.head((tokens @ tokens.transpose(1, 2)).mean(-1))


def test_what_stays_in_float_is_named_with_its_reason() -> None:
    summary = summarize(quantize(Mixed(), {"overrides": {"body": "float"}}))
    assert summary.quantized == {"Conv2d": 1, "Linear": 1, "add": 1, "pool": 1}
    assert summary.weights == pytest.approx((4 * 4 * 9 + 8) / sum(p.numel() for p in Mixed().parameters()))
    found = {part.kind: part for part in summary.in_float}
    assert found["Conv2d"].names == ("body.0",)
    assert found["ConvTranspose2d"].names == ("up",)
    assert found["conv2d"].names == ("the model",)
    assert "no quantizer sees" in found["conv2d"].reason
    assert found["matmul"].reason == "a product of two activations"
    first, second, third = repr(summary).splitlines()
    assert first.startswith("quantized: 1 Conv2d, 1 Linear, 1 add, 1 pool; 4")
    assert "1 ConvTranspose2d (up): a kind of layer that has no 8-bit form here" in second
    assert third == "export: no layer is known to be in the way"


def test_what_a_runtime_leaves_in_float_is_named() -> None:
    summary = summarize(quantize(Mixed(), target="openvino"))
    assert {(part.kind, part.names) for part in summary.in_float if "runtime" in part.reason} == {
        ("pool", ("pooling_quantizer",))
    }


def test_a_module_that_calls_a_function_is_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(query, key, value)

    (part,) = summarize(quantize(nn.Sequential(nn.Linear(8, 8), Attention()))).in_float
    assert (part.kind, part.names) == ("scaled_dot_product_attention", ("1",))


def test_a_float_model_has_no_summary() -> None:
    with pytest.raises(UserError, match="call quantize"):
        summarize(Mixed())


class Around(nn.Module):
    def __init__(self, layer: nn.Module, inside: int, outside: int) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, inside), layer, nn.Linear(outside, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if isinstance(self.layer, nn.RNNBase):
            y = self.layer(y)[0]
        elif isinstance(self.layer, nn.MultiheadAttention):
            y = self.layer(y, y, y)[0]
        else:
            y = self.layer(y, y) if isinstance(self.layer, nn.Bilinear) else self.layer(y)
        return self.after(y)


TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "LSTM": (nn.LSTM(8, 5, batch_first=True), 8, 5),
    "GRU": (nn.GRU(8, 5, batch_first=True), 8, 5),
    "Bilinear": (nn.Bilinear(8, 8, 5), 8, 5),
    "Conv1d": (nn.Conv1d(4, 5, 3, padding=1), 8, 8),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 5, 2, 2, output_padding=1), 8, 17),
    "MultiheadAttention": (nn.MultiheadAttention(8, 2, batch_first=True), 8, 8),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8, 8),
}


@pytest.mark.parametrize(("layer", "inside", "outside"), LAYERS.values(), ids=LAYERS)
def test_export_refuses_what_quantize_said_and_writes_the_rest(
    layer: nn.Module, inside: int, outside: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Around(layer, inside, outside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize(model)
    calibrate(model, [TOKENS]).eval()
    path = tmp_path / "model.onnx"
    if isinstance(layer, NOT_EXPORTED):
        said = "".join(str(warning.message) for warning in caught)
        assert f"ONNX files can't hold layer ({type(layer).__name__})" in said
        assert f"ONNX has no form for layer ({type(layer).__name__})" in repr(summarize(model))
        with pytest.raises(UserError, match=r"^layer: "):
            export_onnx(model, path, inputs=(TOKENS,))
        return
    assert not caught
    export_onnx(model, path, inputs=(TOKENS,))
    with torch.no_grad():
        expected = model(TOKENS)
    got = torch.from_numpy(load_engine(path)(TOKENS.numpy()))
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_layers_of_volumes_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    volumes = torch.randn(2, 3, 4, 5, 6)
    layers = (
        nn.Conv3d(3, 6, 3, stride=(1, 2, 1), padding="valid"),
        nn.ReLU(),
        nn.ConvTranspose3d(6, 4, 2, 2, groups=2),
    )
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * 4 * 8, 2))
    calibrate(quantize(model), [volumes]).eval()
    export_onnx(model, tmp_path / "volumes.onnx", inputs=(volumes,))
    with torch.no_grad():
        expected = model(volumes)
    got = torch.from_numpy(load_engine(tmp_path / "volumes.onnx")(volumes.numpy()))
    assert (got - expected).norm() < 1e-5 * expected.norm()

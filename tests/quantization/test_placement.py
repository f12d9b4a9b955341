"""Automatic placement on networks without marks: what gets a quantizer, what must not, and what can't be traced."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import UserError, calibrate, quantize, simulate_target
from effnet_quant.quantization.placement.insertion import output_quantizers, quantizers
from effnet_quant.quantization.quantizer import TensorQuantizer


class Block(nn.Module):
    """A bottleneck with functional operations: squeeze-and-excitation, shortcut, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        out = F.relu(self.bn1(self.conv1(x)))
        gate = torch.sigmoid(self.expand(F.silu(self.squeeze(F.adaptive_avg_pool2d(out, 1)))))
        out = self.bn2(self.conv2(out * gate)) * self.scale
        out = F.relu(shortcut + out)
        return torch.cat([out, F.relu(self.side(out))], dim=1)


class Network(nn.Module):
    """Stem, one block, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = Block()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(F.relu6(self.stem(x))).mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def test_functional_operations_get_the_quantizers_that_engines_want() -> None:
    places = {name for name, _ in quantizers(quantize(network()))}
    layers = {"stem", "block.conv1", "block.squeeze", "block.expand", "block.conv2", "block.side", "fc"}
    expected = {f"{layer}._{role}_quantizer" for layer in layers for role in ("input", "weight")}
    expected |= {f"block.{name}" for name in ("residual_quantizer", "mul_a_quantizer", "mul_b_quantizer")}
    # the product with the learned scale is left alone; the concatenation shares one range
    expected |= {"block.concat_quantizer", "block.pooling_quantizer", "pooling_quantizer"}
    assert places == expected


def test_placing_changes_neither_results_nor_parameters(images: Tensor) -> None:
    model = network()
    before, entries = model(images), dict(model.state_dict())
    quantize(model)
    assert torch.equal(model(images), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in entries.items())
    assert isinstance(model, Network)
    copied = copy.deepcopy(model)
    calibrate(copied, [images], method="max")
    assert not any(quantizer.enabled for _, quantizer in quantizers(model))
    assert torch.equal(model(images), before)


def test_the_shortcut_is_rounded_and_the_convolution_beside_it_is_not(images: Tensor) -> None:
    model = calibrate(quantize(network(), target="tensorrt"), [images], method="max")
    seen: dict[str, Tensor] = {}
    model.block.residual_quantizer.register_forward_hook(lambda _, args, out: seen.update(into=args[0], out=out))
    stem: list[Tensor] = []
    model.stem.register_forward_hook(lambda _, args, out: stem.append(out))
    model(images)
    assert torch.equal(seen["into"], F.relu6(stem[0]))
    step = model.block.residual_quantizer.amax / 127
    torch.testing.assert_close(seen["out"], torch.round(seen["into"] / step) * step)


def test_nothing_sits_between_a_convolution_and_an_activation_that_only_clips() -> None:
    model = quantize(network())
    outputs = set(output_quantizers(model))
    rounded = {name for name, module in model.named_modules() if module in outputs}
    # behind conv1 and side there is ReLU and then quantizers of one value; before SiLU, sigmoid and a product an engine
    # whose convolutions write integers must round
    assert rounded == {"block.squeeze_output", "block.expand_output", "block.conv2_output"}


def test_output_rounding_belongs_to_the_target_and_to_eval_mode(images: Tensor) -> None:
    model = calibrate(quantize(network(), target="tensorrt"), [images], method="max")
    exact = model(images)
    simulate_target(model, "onnxruntime")
    rounded = model(images)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
    for quantizer in output_quantizers(model):
        low, high = quantizer.range
        x = torch.linspace(low * 1.2, high * 1.2, 1001)
        scale = (max(high, 0) - min(low, 0)) / 255
        quantizer.train()
        assert torch.equal(quantizer(x), x)
        inside = (x >= low) & (x <= high)
        quantizer.eval()
        assert (quantizer(x) - x)[inside].abs().max() <= scale * 0.51 + 1e-6
        assert len(quantizer(x).unique()) <= 256
    assert torch.equal(simulate_target(model, "tensorrt")(images), exact)


def test_ranges_of_outputs_travel_with_the_weights(images: Tensor) -> None:
    model = calibrate(quantize(network()), [images], method="max")
    loaded = quantize(network())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(images), model(images))


class Branching(nn.Module):
    """A module whose Python code looks at sizes and values: no tracer gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if x.sum() > 0 else self.conv(x)


def test_what_cannot_be_traced_is_named_and_its_layers_are_quantized(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), Branching()), nn.Conv2d(8, 2, 1)).eval()
    before = model(images)
    with pytest.warns(UserWarning, match=r"1\.1 can't be traced"):
        quantize(model)
    assert torch.equal(model(images), before)
    places = {name for name, _ in quantizers(model)}
    assert {"0._input_quantizer", "1.1.conv._input_quantizer", "2._weight_quantizer"} <= places
    assert not any("residual" in name for name in places)
    with pytest.warns(UserWarning, match="Branching can't be traced"):
        quantize(Branching())


def test_batch_norm_with_an_activation_inside_is_taken_apart(images: Tensor) -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed: pip install 'effnet-quant[timm]'")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, act_layer=nn.SiLU), nn.Conv2d(8, 2, 1)).eval()
    before, names = model(images), list(model.state_dict())
    quantize(model)
    assert torch.equal(model(images), before)
    assert set(names) <= set(model.state_dict())
    calibrate(model, [images], method="max")
    # rounded between BatchNorm and SiLU: SiLU's minimum, -0.278, is reached
    (rounding,) = output_quantizers(model)
    assert rounding.range[0] < -1.28


def test_first_and_last_layer_can_be_left_in_float_or_given_another_grid() -> None:
    spec = {"overrides": {"stem": None, "fc": {"activation": {"bits": 16}}}}
    model = quantize(network(), spec)
    places = dict(quantizers(model))
    assert not any(name.startswith("stem") for name in places)
    assert places["fc._input_quantizer"].spec.bits == 16
    assert isinstance(model.block.conv1._input_quantizer, TensorQuantizer)


def test_targets_decide_what_is_placed() -> None:
    with pytest.raises(UserError, match="there is no target 'tpu'"):
        quantize(network(), target="tpu")


def test_sums_and_products_of_sizes_are_left_alone() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.shift = nn.Parameter(torch.ones(4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            batch, channels, height, width = x.shape
            pixels = x.reshape(batch, channels, height * width) + self.shift
            return pixels[:, :, : x.size(2) + height].sum(-1)

    model = quantize(Sized().eval())
    assert [name for name, _ in quantizers(model)] == ["conv._input_quantizer", "conv._weight_quantizer"]
    images = torch.randn(2, 3, 8, 8)
    assert calibrate(model, [images])(images).shape == (2, 4)


def test_a_layer_that_two_modules_share_gets_one_twin() -> None:
    shared, block = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(shared, block), nn.Sequential(shared, block))
    quantize(model)
    assert model[1][0] is model[2][0]
    assert sum(name.endswith("_weight_quantizer") for name, _ in quantizers(model)) == 3
    images = torch.randn(2, 3, 8, 8)
    assert calibrate(model, [images])(images).shape == (2, 4, 8, 8)


class Scaled(nn.Module):
    """Its second argument is a number, by position, annotation or default; the third decides what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x, factor, mask=None):  # type: ignore[no-untyped-def]
        y = self.conv(x) * factor + self.other(x)
        if mask is not None:
            y = y * mask
        return y.mean((2, 3))


class Annotated(Scaled):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x, factor)


class Default(Scaled):
    def forward(self, x: Tensor, factor: int = 2) -> Tensor:
        return super().forward(x, factor)


@pytest.mark.parametrize("kind", [Scaled, Annotated, Default])
def test_a_number_that_the_model_takes_is_not_rounded(kind: type[Scaled], images: Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    expected = model(images, 0.3)
    quantize(model, target="tensorrt")
    assert torch.equal(model(images, 0.3), expected)
    calibrate(model, [(images, 0.3)], method="max")
    assert torch.allclose(model(images, 0.3), expected, atol=0.02)
    names = [name for name, _ in quantizers(model) if name.startswith("mul")]
    assert names == (["mul_a_quantizer", "mul_b_quantizer"] if kind is Scaled else [])


def test_an_argument_that_decides_what_runs_is_fixed_to_its_default(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    expected = model(images, 1.0)
    assert torch.equal(quantize(model, target="tensorrt")(images, factor=1.0, mask=None), expected)
    with pytest.raises(UserError, match="mask has been specialized to have value None"):
        calibrate(model, [(images, 1.0, images.mean())])


def test_attention_and_its_weights_stay_in_float() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    tokens = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(tokens)
        calibrate(quantize(model), [tokens])
        assert sorted({name.rpartition(".")[0] for name, _ in quantizers(model)}) == [
            f"layers.{layer}.linear{index}" for layer in (0, 1) for index in (1, 2)
        ]
        difference = (model(tokens) - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.05


def test_a_question_for_the_size_does_not_add_a_rounding(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """As in timm's vision transformers: two roundings in a row are one, on another grid, in ONNX Runtime."""
    from effnet_quant import export_onnx, load_engine

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.cls = nn.Parameter(torch.randn(1, 1, 8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1))

    torch.manual_seed(0)
    pictures = torch.randn(16, 3, 32, 32)
    model = calibrate(quantize(Tokens()), [pictures]).eval()
    assert not list(output_quantizers(model))
    export_onnx(model, tmp_path / "tokens.onnx", inputs=(pictures,))
    with torch.no_grad():
        expected = model(pictures)
    got = torch.from_numpy(load_engine(tmp_path / "tokens.onnx")(pictures.numpy()))
    assert (got - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        pytest.param("deit_tiny_patch16_224", marks=pytest.mark.slow),
        "swin_tiny_patch4_window7_224",
    ],
)
def test_engines_of_vision_transformers_do_what_the_simulation_says(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Untrained networks amplify every flipped rounding from block to block, so each layer is compared by itself."""
    timm = pytest.importorskip("timm")
    from effnet_quant import export_onnx, load_engine
    from effnet_quant.checks.layer_comparison import compare_layers

    torch.manual_seed(0)
    small = {"depths": (1, 1, 2, 1), "window_size": 4} if name.startswith("swin") else {"depth": 2}
    model = timm.create_model(name, num_classes=5, img_size=64, **small).eval()
    pictures = torch.randn(4, 3, 64, 64)
    calibrate(quantize(model), pictures.split(2), method="max").eval()
    export_onnx(model, tmp_path / "model.onnx", 64)
    engine = load_engine(tmp_path / "model.onnx")
    rows = compare_layers(engine, model, pictures)
    assert min(row.by_itself for row in rows) > 60
    with torch.no_grad():
        expected = model(pictures)
    got = torch.from_numpy(engine(pictures.numpy()))
    assert (got - expected).norm() < 0.05 * expected.norm()

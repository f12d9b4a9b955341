"""ExecuTorch files: the operations compute what the traced graph says, and XNNPACK computes what the simulation says."""

from __future__ import annotations

import json

import pytest
import torch
from model_sweep import NETWORKS
from random_weights import wake
from torch import Tensor, nn

from effnet_quant import UserError, calibrate, create_model, export_executorch, export_onnx, load_engine, quantize
from effnet_quant.engines.runtimes import installed
from effnet_quant.export.executorch_writer import ExecutorchWriter, decomposed
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes import run_passes
from effnet_quant.export.tracing import trace_image
from effnet_quant.quantization.placement.insertion import simulate_target
from effnet_quant.quantization.targets import get_target

needs_executorch = pytest.mark.skipif(
    not installed("executorch"), reason="ExecuTorch is not installed: pip install 'effnet-quant[executorch]'"
)
RULES = get_target("executorch")


class Network(nn.Module):
    """A residual addition, a concatenation, a product with a mean, uneven padding, and activations of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.pad = nn.ZeroPad2d((0, 2, 0, 2))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.SiLU())
        self.same = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.pad(x))
        z = self.same(x)
        z = z + x
        z = z * self.gate(z)
        return self.head(self.pool(torch.cat([y, z], 1)).flatten(1))


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = Network().eval(), torch.randn(16, 3, 32, 32)
    quantize(model, target="executorch")
    calibrate(model, [images], method="max")
    return model, images


def written(model: nn.Module, size: int):
    traced = run_passes(trace_image(model, RULES, size), RULES, ExportOptions())
    return traced, ExecutorchWriter(traced).run()


def test_the_operations_compute_what_the_graph_says():
    model, images = network()
    traced, module = written(model, 32)
    with torch.no_grad():
        (expected,), (got,) = traced.run(images[:2]), module(images[:2])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        simulated = simulate_target(model, "executorch")(images[:2])
    assert ((got - simulated).norm() / simulated.norm()).item() < 1e-2


def test_layers_have_the_forms_that_the_partitioner_takes():
    model, _ = network()
    _, module = written(model, 32)
    convolutions = [node for node in module.graph.nodes if "conv" in str(node.target)]
    assert len(convolutions) == 4
    names = (decomposed.quantize_per_tensor.default, torch.ops.aten.hardtanh.default, torch.ops.aten.relu.default)
    for node in convolutions:
        assert node.args[0].target is decomposed.dequantize_per_tensor.default
        assert len(node.args[0].users) == 1  # a partition of its own
        assert node.args[1].target is decomposed.dequantize_per_channel.default
        assert [user.target in names for user in node.users] == [True]
    assert {len(node.users) for node in module.graph.nodes if node.op == "get_attr"} == {
        1
    }  # the file holds what is used
    for node in module.graph.nodes:
        if node.target is decomposed.quantize_per_tensor.default:
            *_, low, high, dtype = node.args
            assert (low, high, dtype) == (-128, 127, torch.int8)  # XNNPACK takes no other bounds, and no uint8
            assert -128 <= node.args[2] <= 127


def test_the_formats_are_not_mixed_up(tmp_path):
    model, _ = network()
    with pytest.raises(UserError, match=r"executorch reads \.pte files, not ONNX; take export_executorch"):
        export_onnx(model, tmp_path / "m.onnx", 32, target="executorch")
    (tmp_path / "m.pte").write_bytes(b"no program at all")
    with pytest.raises(UserError, match="is no program of ExecuTorch"):
        load_engine(tmp_path / "m.pte", "executorch")
    if not installed("executorch"):
        with pytest.raises(UserError, match=r"ExecuTorch is not installed; pip install effnet-quant\[executorch\]"):
            export_executorch(model, tmp_path / "m.pte", 32)


@needs_executorch
def test_the_engine_computes_its_simulation(tmp_path):
    model, images = network()
    left_out = export_executorch(model, tmp_path / "m.pte", 32)
    assert set(left_out) <= {"dim_order_ops::_to_dim_order_copy"}  # a layer or an activation would be slow there
    engine = load_engine(tmp_path / "m.pte", "executorch", threads=1)
    assert engine.precision == "int8 + fp32"
    assert engine.card.target == "executorch"
    assert engine.image_spec.image_size == 32
    got = torch.from_numpy(engine(images[:3].numpy()))
    with torch.no_grad():
        expected = simulate_target(model, "executorch")(images[:3])
    assert ((got - expected).norm() / expected.norm()).item() < 2e-2
    other = load_engine(tmp_path / "m.pte", "executorch")
    torch.testing.assert_close(torch.from_numpy(other(images[:3].numpy())), got)
    with pytest.raises(UserError, match="have 1 threads already, so none can have 2"):
        load_engine(tmp_path / "m.pte", "executorch", threads=2)
    content = (tmp_path / "m.pte").read_bytes()
    (tmp_path / "half.pte").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        load_engine(tmp_path / "half.pte", "executorch")


@needs_executorch
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_of_the_sweep(name, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed: pip install 'effnet-quant[timm]'")
    torch.manual_seed(0)
    model, size = wake(create_model(name, num_classes=100)).eval(), NETWORKS[name]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    in_float = model(images)
    quantize(model, target="executorch")
    calibrate(model, [images], method="max")
    expected = model(images)
    export_executorch(model, tmp_path / "m.pte", size)
    got = torch.from_numpy(load_engine(tmp_path / "m.pte", "executorch")(images.numpy()))
    # random weights amplify: two roundings of one network part, but less than the network and its rounding
    quantization = ((expected - in_float).norm() / in_float.norm()).item()
    assert ((got - expected).norm() / expected.norm()).item() <= max(2e-2, quantization)


@needs_executorch
@pytest.mark.slow
def test_the_command_line(run_process, image_folder, tmp_path):
    torch.manual_seed(0)
    model = create_model("cifar-resnet20", 3).eval()
    quantize(model, target="executorch")
    calibrate(model, [torch.randn(8, 3, 32, 32)], method="max")
    from effnet_quant import save

    save(model, tmp_path / "int8.safetensors")
    flags = ["--pretrained-from-file", "int8.safetensors", "--target", "executorch"]
    result = run_process("model2onnx.py", *flags, "--output", "m.pte", "--verify", image_folder, cwd=tmp_path)
    assert result.code == 0, result.err + result.out
    assert "note: 4 x aten::slice_copy.Tensor runs outside of XNNPACK" in result.out
    assert "executorch, int8 + fp32" in result.out
    image = next((image_folder / "val" / "cat").iterdir())
    shown = run_process("classify.py", "--pretrained-from-file", "m.pte", "--image", image, "--json", cwd=tmp_path)
    assert len(json.loads(shown.out)["top"]) == 3
    wrong = run_process("model2onnx.py", *flags, "--opset", 19, cwd=tmp_path)
    assert wrong.code == 2
    assert "--opset: executorch reads no ONNX file" in wrong.err

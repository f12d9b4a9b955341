"""Quantizes networks of timm and torchvision, runs them in ONNX Runtime, and writes what came out to docs/models.md.

    python benchmarks/model_sweep.py                      all of NETWORKS, rewrites docs/models.md
    python benchmarks/model_sweep.py timm:resnet50 …      only these, prints the table

The weights are random (as the library initialises them) and the images noise: this is about mechanics, not accuracy. For
each network the float model is quantized, calibrated on 2 batches of 16 images, exported for ONNX Runtime and run on the
32 images. tests/deploy/test_sweep.py checks the rows.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.deploy.lint import lint_tensorrt
from effnet_quant.deploy.onnx import build_onnx
from effnet_quant.quantization.insertion import quantizers

NETWORKS = {
    **{
        f"timm:{name}": 64
        for name in (
            *("resnet50", "resnet101", "resnetv2_50", "resnetv2_101", "mobilenetv1_100", "mobilenetv2_100"),
            *("mobilenetv3_large_100", "efficientnet_b3", "efficientnet_lite0", "tf_efficientnetv2_s", "densenet121"),
            *("vgg16_bn", "regnety_008", "convnext_nano", "repvgg_a0", "ghostnet_100"),
            *("resnetv2_50x1_bit", "eca_nfnet_l0"),  # standardise their weights in the forward pass
        )
    },
    "torchvision:alexnet": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:shufflenet_v2_x1_0": 64,
    "torchvision:inception_v3": 128,  # its last stage needs more than 75 px
    "torchvision:googlenet": 64,
    "torchvision:mnasnet1_0": 64,
}
# Operations with numbers in them that ONNX Runtime computes in float, and why they are left to it.
WHY_FLOAT = {
    "Conv": "its output leads to the model's output only",
    "FusedConv": "its output leads to the model's output only",
    "Gemm": "its input is not quantized",
    "BatchNormalization": "no convolution in front to take it in",
    "LayerNormalization": "no integer kernel",
    "Relu": "behind a BatchNorm or addition in float",
    "Add": "its sum also goes where floats are wanted",
    "HardSwish": "no integer kernel",
    "HardSigmoid": "no integer kernel",
    "Sigmoid": "between integers of two grids",
    "QuickGelu": "SiLU; no integer kernel",
    "Gelu": "no integer kernel",
    "Erf": "GELU; no integer kernel",
    "Mul": "SiLU, or a learned scale",
    "AveragePool": "its sum is wanted in float",
    "MatMul": "unequal windows of adaptive pooling",
    "Concat": "its result goes where floats are wanted",
}


@dataclass
class Row:
    """What one network showed; sizes in MB of the ONNX files, errors as relative L2 of the logits."""

    name: str
    parameters: int
    quantizers: dict[str, int]
    float_size: float
    int8_size: float
    float_nodes: dict[str, int]
    quantization_error: float
    """Simulation against the float model."""
    engine_error: float
    """Engine against the simulation."""
    rounding_error: float
    """Simulation against itself with convolutions summed in float64: what float rounding alone can do."""
    agreement: float
    findings: list[str]
    """Against TensorRT's placement rules, of the graph exported for it."""
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def examine(name: str, image_size: int) -> Row:
    """Take one network through quantization and export, and compare."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=100).eval()
    images = torch.randn(32, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        float_path, int8_path, compiled = (Path(folder) / f"{kind}.onnx" for kind in ("float", "int8", "compiled"))
        export_onnx(model, float_path, image_size)
        expected = model(images)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        quantize(model)
        said = [str(warning.message) for warning in caught if "can't be traced" in str(warning.message)]
        calibrate(model, images.split(16), method="max")
        simulated = model(images)
        export_onnx(model, int8_path, image_size)
        computed = torch.from_numpy(load_engine(int8_path)(images.numpy()))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(compiled)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(int8_path), options, providers=["CPUExecutionProvider"])
        nodes = Counter(node.op_type for node in onnx.load(compiled).graph.node)
        return Row(
            name=name,
            parameters=parameters,
            quantizers=dict(Counter(_kind(path) for path, _ in quantizers(model))),
            float_size=float_path.stat().st_size / 1e6,
            int8_size=int8_path.stat().st_size / 1e6,
            float_nodes={operation: nodes[operation] for operation in WHY_FLOAT if nodes[operation]},
            quantization_error=relative_error(simulated, expected),
            engine_error=relative_error(computed, simulated),
            rounding_error=relative_error(_summed_in_float64(model)(images), simulated),
            agreement=float((computed.argmax(1) == simulated.argmax(1)).float().mean()),
            findings=lint_tensorrt(build_onnx(model, image_size, target="tensorrt")),
            warnings=said,
        )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((got - expected).norm() / expected.norm())


def _summed_in_float64(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__name__ == "QuantConv2d":
            module._conv_forward = _convolve_in_float64.__get__(module)
    return model


def _convolve_in_float64(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    result = F.conv2d(x.double(), weight.double(), bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return result.to(x.dtype)


def _kind(path: str) -> str:
    name = path.rsplit(".", 1)[-1]
    for kind in ("input", "weight", "residual", "mul", "concat", "pooling"):
        if name.removeprefix("_").startswith(kind):
            return kind
    return name


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| network | parameters, M | quantizers | float, MB | INT8, MB | simulation / float | engine / simulation "
        "| rounding alone | same argmax | left in float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        placed = ", ".join(f"{count} {kind}" for kind, count in row.quantizers.items())
        left = ", ".join(f"{count} {operation}" for operation, count in row.float_nodes.items()) or "nothing"
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.2f} | {placed} | {row.float_size:.1f} | {row.int8_size:.1f} "
            f"| {row.quantization_error:.4f} | {row.engine_error:.4f} | {row.rounding_error:.4f} "
            f"| {row.agreement:.1%} | {left} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    asked = sys.argv[1:]
    rows = []
    for name in asked or NETWORKS:
        rows.append(examine(name, NETWORKS.get(name, 64)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        for line in (*rows[-1].warnings, *rows[-1].findings):
            print(f"    {line}", flush=True)
    if asked:
        return
    used = sorted({operation for row in rows for operation in row.float_nodes})
    page = Path(__file__).parents[1] / "docs" / "models.md"
    reasons = "\n".join(f"- {operation}: {WHY_FLOAT[operation]}." for operation in used)
    notes = "\n".join(f"- {row.name}: {warning}" for row in rows for warning in row.warnings)
    text = page.read_text()
    text = text[: text.index(HEADING)] + HEADING + INTRODUCTION + table(rows)
    page.write_text(f"{text}\n\nLeft in float:\n\n{reasons}\n\nWarnings:\n\n{notes}\n")


HEADING = "## Networks of other libraries, quantized"
INTRODUCTION = """

`python benchmarks/model_sweep.py` writes this section. Random weights, 32 noise images of 64 px (inception_v3: 128 px),
calibration with `max`, ONNX Runtime on a CPU. Errors are relative L2 distances of the logits.

"rounding alone" compares the simulation with itself, convolutions summed in float64 instead of float32: where a network
with random weights amplifies such differences, engine and simulation can't agree better than that, because the engine's
integer sums are exact.

"""

if __name__ == "__main__":
    main()

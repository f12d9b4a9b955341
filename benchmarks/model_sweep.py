"""Quantizes networks of timm and torchvision, runs them in ONNX Runtime, and writes the results to docs/models.md.

    python benchmarks/model_sweep.py                      all of NETWORKS, rewrites docs/models.md
    python benchmarks/model_sweep.py timm:resnet50 …      only these, prints the table

The weights are random, as the library initialises them, and the images are noise, so the results say nothing of accuracy.
Scales that start at 0 are drawn from 0.1 … 0.3, because they would hide all errors in their branch. For each network the
float model is quantized, calibrated on 2 batches of 16 images, exported, and run on the 32 images.
tests/export/test_sweep.py checks the rows.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnxruntime
import torch
from random_weights import wake
from torch import Tensor, nn

from effnet_quant import calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.checks.layer_comparison import compare_layers
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.export.onnx import build_onnx
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target

NETWORKS = {
    **{
        f"timm:{name}": 64
        for name in (
            *("resnet50", "resnet101", "resnetv2_50", "resnetv2_101", "mobilenetv1_100", "mobilenetv2_100"),
            *("mobilenetv3_large_100", "efficientnet_b3", "efficientnet_lite0", "tf_efficientnetv2_s", "densenet121"),
            *("vgg16_bn", "regnety_008", "convnext_nano", "repvgg_a0", "ghostnet_100"),
            *("resnetv2_50x1_bit", "eca_nfnet_l0"),  # standardise their weights in the forward pass
            *("ghostnetv2_100", "mambaout_femto"),  # resize inside; linear layers over the channels of every pixel
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
    "Conv": "its output leads to the model's output only, or it runs over channels (one-dimensional)",
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
    """Results of one network: sizes of the ONNX files in MB, errors as relative L2 of the logits."""

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
    layer_error: float
    """The same for the layer where it is largest, by itself: the simulation gets the engine's values in front of it."""
    layer: str
    """That layer."""
    rounding_error: float
    """Simulation against itself with every bias as far off as rounding it to the engine's integers can put it."""
    openvino_error: float
    """OpenVINO against the simulation of its target."""
    agreement: float
    findings: list[str]
    """Against TensorRT's placement rules, of the graph exported for it."""
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def examine(name: str, image_size: int) -> Row:
    """Take one network through quantization and export, and compare."""
    torch.manual_seed(0)
    model = wake(create_model(name, num_classes=100)).eval()
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
        engine = load_engine(int8_path)
        computed = torch.from_numpy(engine(images.numpy()))
        layers = compare_layers(engine, model, images[:8])
        worst = min(layers, key=lambda row: row.by_itself)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(compiled)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(int8_path), options, providers=["CPUExecutionProvider"])
        written = onnx.load(compiled).graph.node
        sizes = {name for node in written if node.op_type == "Resize" for name in node.input[1:]}
        nodes = Counter(node.op_type for node in written if node.output[0] not in sizes)
        rounding_error = moved_by_biases(model, images, simulated)
        openvino_path = Path(folder) / "openvino.onnx"
        export_onnx(model, openvino_path, image_size, target="openvino")
        in_openvino = torch.from_numpy(load_engine(openvino_path, "openvino")(images.numpy()))
        openvino_error = relative_error(in_openvino, simulate_target(model, "openvino")(images))
        return Row(
            name=name,
            parameters=parameters,
            quantizers=dict(Counter(_kind(path) for path, _ in quantizers(model))),
            float_size=float_path.stat().st_size / 1e6,
            int8_size=int8_path.stat().st_size / 1e6,
            float_nodes={operation: nodes[operation] for operation in WHY_FLOAT if nodes[operation]},
            quantization_error=relative_error(simulated, expected),
            engine_error=relative_error(computed, simulated),
            layer_error=10 ** (-worst.by_itself / 20),
            layer=worst.name,
            rounding_error=rounding_error,
            openvino_error=openvino_error,
            agreement=float((computed.argmax(1) == simulated.argmax(1)).float().mean()),
            findings=lint_tensorrt(build_onnx(model, image_size, target="tensorrt")),
            warnings=said,
        )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((got - expected).norm() / expected.norm())


def moved_by_biases(model: nn.Module, images: Tensor, simulated: Tensor) -> float:
    """How far the logits move if every bias is off by up to half of the engine's step, s_input * s_weight."""
    generator = torch.Generator().manual_seed(3)

    def move(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        step = (layer._input_quantizer.scale * layer._weight_quantizer.scale).flatten()
        offset = step * (torch.rand(step.shape, generator=generator) - 0.5)
        return output + (offset.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else offset)

    layers = [module for module in model.modules() if hasattr(module, "_weight_quantizer")]
    hooks = [layer.register_forward_hook(move) for layer in layers]
    try:
        return relative_error(model(images), simulated)
    finally:
        for hook in hooks:
            hook.remove()


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
        "| worst layer by itself | biases alone | same argmax | OpenVINO / simulation | left in float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        placed = ", ".join(f"{count} {kind}" for kind, count in row.quantizers.items())
        left = ", ".join(f"{count} {operation}" for operation, count in row.float_nodes.items()) or "nothing"
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.2f} | {placed} | {row.float_size:.1f} | {row.int8_size:.1f} "
            f"| {row.quantization_error:.4f} | {row.engine_error:.4f} | {row.layer_error:.4f} "
            f"| {row.rounding_error:.4f} | {row.agreement:.1%} | {row.openvino_error:.4f} | {left} |"
        )
    return "\n".join(lines)


def shortfalls(rows: list[Row]) -> list[str]:
    """A line for each network whose engine and simulation are further apart than 2e-2, or alike on fewer than 90 %."""
    return [
        f"- {row.name}: {row.engine_error:.4f} and {row.agreement:.1%}. The network amplifies: no layer by itself is "
        f"further off than {row.layer_error:.4f} ({row.layer}), biases off by half a step move the simulation by "
        f"{row.rounding_error:.4f}, and quantization itself moves it by {row.quantization_error:.4f}."
        for row in rows
        if row.engine_error > 2e-2 or row.agreement < 0.9
    ]


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
    short = "\n".join(shortfalls(rows)) or "None."
    sections = {"Further apart than 0.02, or alike on fewer than 90 % of the images": short, "Left in float": reasons}
    sections["Warnings"] = notes
    page.write_text(text + "".join(f"\n\n{title}:\n\n{lines}" for title, lines in sections.items()) + "\n")


HEADING = "## Networks of other libraries, quantized"
INTRODUCTION = """

`python benchmarks/model_sweep.py` writes this section. Random weights, 32 noise images of 64 px (inception_v3: 128 px),
calibration with `max`, on a CPU. Scales that a network starts at 0 (the last one of a residual branch) are drawn from
0.1 … 0.3, or those branches would add nothing and hide what is wrong in them. Errors are relative L2 distances of the
logits; "engine" is ONNX Runtime.

Rounding is a step function. An engine that sums in another order moves a few values across the edge of a step, and the next
layer moves more. After many layers, engine and simulation may be as far apart as two roundings of one network, about
"simulation / float". Both still compute what the graph says. Two columns tell this from an
error. "Worst layer by itself" gives the simulation the engine's values behind every quantizer and compares the next one, so
nothing builds up. "Biases alone" is the simulation against itself, each bias off by up to half an integer of the engine's:
how far the network is moved by so little.

"""

if __name__ == "__main__":
    main()

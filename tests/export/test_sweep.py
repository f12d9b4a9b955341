"""Networks of timm and torchvision through quantization, export and ONNX Runtime (benchmarks/model_sweep.py)."""

import pytest
from model_sweep import NETWORKS, examine
from torch import nn

from effnet_quant import create_model

pytest.importorskip("timm", reason="timm is not installed: pip install 'effnet-quant[timm]'")

QUICK = ("torchvision:squeezenet1_1",)
# By the networks' papers: residual additions, two operands of each squeeze-and-excitation's product, concatenations.
PLACED = {
    "timm:resnet50": {"residual": 16},
    "timm:mobilenetv3_large_100": {"residual": 10, "mul": 16, "pooling": 8},
    "timm:regnety_008": {"residual": 14, "mul": 28, "pooling": 14},
    "timm:densenet121": {"concat": 62},
    "torchvision:squeezenet1_1": {"concat": 8},
    "torchvision:shufflenet_v2_x1_0": {"concat": 16, "pooling": 1},
}


def check(name: str) -> None:
    row = examine(name, NETWORKS[name])
    layers = [module for module in create_model(name).modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert row.quantizers["weight"] == len(layers)
    for kind, count in PLACED.get(name, {}).items():
        assert row.quantizers[kind] == count, kind
    assert row.layer_error <= 2e-2, row.layer
    # Random weights amplify: engine and simulation, two roundings of one network, drift apart by as much as half
    # an integer on every bias moves the simulation itself.
    assert row.engine_error <= max(2e-2, 2 * row.rounding_error)
    assert row.openvino_error <= max(2e-2, 2 * row.rounding_error)
    assert row.agreement >= 0.9 or row.rounding_error > 1e-2
    assert row.int8_size < 0.32 * row.float_size
    assert row.findings == []


@pytest.mark.parametrize("name", QUICK)
def test_engine_of_a_foreign_network_computes_its_simulation(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in QUICK])
def test_every_network_of_the_sweep(name: str) -> None:
    check(name)

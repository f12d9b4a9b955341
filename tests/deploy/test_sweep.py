"""Networks of timm and torchvision through quantization, export and ONNX Runtime (benchmarks/model_sweep.py)."""

import pytest
from model_sweep import NETWORKS, examine

pytest.importorskip("timm", reason="timm is not installed: pip install 'effnet-quant[timm]'")

QUICK = ("torchvision:squeezenet1_1", "timm:mobilenetv3_large_100")
# Counted in the networks' own definitions: convolutions and linear layers, residual additions, products of
# squeeze-and-excitation, concatenations (one shared quantizer each).
PLACED = {
    "timm:resnet50": {"weight": 54, "residual": 16},
    "timm:mobilenetv3_large_100": {"weight": 63, "residual": 10, "mul": 16, "pooling": 8},
    "timm:regnety_008": {"weight": 76, "residual": 14, "mul": 28, "pooling": 14},
    "timm:densenet121": {"weight": 121, "concat": 62},
    "torchvision:squeezenet1_1": {"weight": 26, "concat": 8},
    "torchvision:shufflenet_v2_x1_0": {"weight": 57, "concat": 16, "pooling": 1},
}


def check(name: str) -> None:
    row = examine(name, NETWORKS[name])
    for kind, count in PLACED.get(name, {}).items():
        assert row.quantizers[kind] == count, kind
    # Random weights amplify: where float sums in another order move the simulation itself, the engine, whose integer sums
    # are exact, can't be nearer to it than that.
    assert row.engine_error <= max(2e-2, 2 * row.rounding_error)
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

"""The graph behind the passes can be run, and computes the simulation, whatever a writer makes of it."""

import pytest
import torch
from torch import fx, nn

from effnet_quant import calibrate, quantize
from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes import run_passes
from effnet_quant.export.passes.functional_form import make_functional
from effnet_quant.export.traced_graph import TracedGraph
from effnet_quant.export.tracing import trace_image
from effnet_quant.quantization.placement.insertion import simulate_target
from effnet_quant.quantization.targets import TARGETS, get_target

aten = torch.ops.aten
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    first = [
        nn.ConstantPad2d((0, 1, 0, 1), 0.0),
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
    ]
    second = [
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 2, padding="same"),
        nn.SiLU(),
        nn.Conv2d(8, 8, 1),
        nn.Hardswish(inplace=True),
    ]
    gated = [
        nn.Conv2d(8, 8, 1),
        nn.Hardsigmoid(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ]
    model = nn.Sequential(*first, *second, *gated).eval()
    model[2].weight.data[::2] *= -1
    return calibrate(quantize(model, target="tensorrt"), [IMAGES], method="max")


@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_the_graph_behind_the_passes_computes_the_simulation(name: str) -> None:
    model, target = network(), get_target(name)
    traced = run_passes(trace_image(model, target, 16), target, ExportOptions())
    (got,) = traced.run(IMAGES)
    expected = simulate_target(model, target)(IMAGES)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-2
    left = {node.target for node in traced.operations()}
    assert not {aten.batch_norm.default, aten.relu_.default, aten.conv2d.padding} & left
    if name == "onnxruntime":
        assert not {aten.silu.default, aten.hardswish.default, aten.relu.default, aten.hardsigmoid.default} & left


def test_who_reads_a_tensor_that_was_written_into_gets_what_was_written() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.neg.default, (x,))
    graph.call_function(aten.relu_.default, (y,))
    graph.output((graph.call_function(aten.exp.default, (y,)),))
    traced = TracedGraph(graph, [x], {})
    make_functional(traced)
    given = torch.tensor([-1.0, 2.0])
    torch.testing.assert_close(traced.run(given)[0], torch.tensor([1.0, 0.0]).exp())

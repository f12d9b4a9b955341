"""The gates of SiLU and hard-swish: rounded in the simulation where an engine computes them with integers."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant import calibrate, export_onnx, load_engine, quantize, simulate_target
from effnet_quant.models.layers import ConvBNAct
from effnet_quant.quantization.quantized_layers import QuantGate

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two convolutions with an activation behind each: a function, or one module that both share."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.fc(x.mean((2, 3)))


ACTIVATIONS = [F.silu, F.hardswish, nn.SiLU(), nn.Hardswish(inplace=True)]
ACTIVATIONS += [lambda x: F.silu(x, inplace=True)]
NAMES = ["silu", "hardswish", "shared SiLU", "shared Hardswish", "silu in place"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
@torch.no_grad()
def test_the_file_rounds_the_gate_where_the_simulation_does(
    activation: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    float_network = Network(activation).eval()
    model = quantize(copy.deepcopy(float_network))
    assert torch.equal(model(IMAGES), float_network(IMAGES))
    assert set(float_network.state_dict()) <= set(model.state_dict())
    calibrate(model, [IMAGES], method="max")
    export_onnx(model, tmp_path / "model.onnx", 16)
    engine = torch.from_numpy(load_engine(tmp_path / "model.onnx")(IMAGES.numpy()))
    simulated = model(IMAGES)
    # gates in float are an error of some 1e-3; what remains is the order of sums in float32
    torch.testing.assert_close(engine, simulated, rtol=0, atol=1e-5)
    rounded = (simulate_target(model, "tensorrt")(IMAGES) - simulated).norm()
    assert rounded > 1e-3 * simulated.norm()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish()], ids=["SiLU", "hard-swish"])
@torch.no_grad()
def test_a_gate_is_a_multiple_of_a_255th_in_eval_mode_alone(activation: nn.Module) -> None:
    model = calibrate(quantize(nn.Sequential(nn.Conv2d(3, 4, 1), activation, nn.Conv2d(4, 2, 1)).eval()), [IMAGES])
    x = torch.linspace(-4, 4, 1001)
    x = x[x.abs() > 0.5]
    gates = model[1](x).double() / x.double() * 255
    assert (gates - gates.round()).abs().max() < 1e-4
    exact = (x.sigmoid() if isinstance(activation, nn.SiLU) else F.hardsigmoid(x)).double() * 255
    assert (gates - exact).abs().max() < 0.5001
    assert torch.equal(model.train()[1](x), activation(x))
    assert torch.equal(simulate_target(model, "openvino").eval()[1](x), activation(x))
    assert not any("gate" in name for name in model.state_dict())


def test_a_network_with_gates_compiles_to_one_graph() -> None:
    model = calibrate(quantize(Network(F.hardswish).eval()), [IMAGES])
    assert torch._dynamo.explain(model)(IMAGES).graph_break_count == 0
    assert torch._dynamo.explain(model.train())(IMAGES).graph_break_count == 0


def test_a_marked_definition_keeps_its_names_and_gets_gates() -> None:
    block = ConvBNAct(3, 8, 3, bn_momentum=0.1, bn_epsilon=1e-3)
    names = set(block.state_dict())
    model = calibrate(quantize(block), [IMAGES])
    assert isinstance(model.act, QuantGate)
    assert model.eval().act.rounds
    assert {name for name in model.state_dict() if "_quantizer" not in name} == names | {"output._low", "output._high"}

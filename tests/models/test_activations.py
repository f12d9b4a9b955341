"""Hard-swish in the place of SiLU."""

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import UserError, create_model
from effnet_quant.card import ModelCard
from effnet_quant.models.activations import replace_silu
from effnet_quant.models.weights import Weights


@torch.no_grad()
def test_every_silu_becomes_hard_swish_and_nothing_else_changes() -> None:
    x = torch.linspace(-8, 8, 1001)
    model = nn.Sequential(nn.Sequential(nn.SiLU(inplace=True)), nn.ReLU()).eval()
    assert replace_silu(model) == 1
    v = x.double().numpy()
    expected = v * np.minimum(np.maximum(v + 3, 0), 6) / 6
    np.testing.assert_allclose(model[0](x.clone()).numpy(), expected, atol=1e-6)
    assert np.abs(expected - v / (1 + np.exp(-v))).max() < 0.143  # what the docstring says of the two
    assert isinstance(model[1], nn.ReLU)
    assert not model[0][0].training
    assert replace_silu(model) == 0


@pytest.mark.parametrize("name", ["efficientnet-b0", "timm:efficientnet_b0"])
def test_weights_of_either_fit_the_other(name: str) -> None:
    silu, hard = create_model(name, 3), create_model(name, 3, hard_swish=True)
    assert sum(isinstance(module, nn.Hardswish) for module in hard.modules()) == 49
    assert not any(isinstance(module, nn.SiLU) for module in hard.modules())
    assert list(silu.state_dict()) == list(hard.state_dict())


def test_weights_say_which_activation_they_are_for() -> None:
    made = create_model("timm:efficientnet_lite0", 3)
    with pytest.raises(UserError, match="timm:efficientnet_lite0 has no SiLU"):
        create_model("timm:efficientnet_lite0", 3, hard_swish=True)
    with pytest.raises(UserError, match="has no SiLU"):
        create_model("timm:efficientnet_lite0", weights=Weights(made.state_dict(), ModelCard(activation="hard_swish")))
    weights = Weights(create_model("efficientnet-b0", 3).state_dict(), ModelCard(activation="hard_swish"))
    kinds = {type(module) for module in create_model("efficientnet-b0", weights=weights).modules()}
    assert nn.Hardswish in kinds
    assert nn.SiLU not in kinds
    kinds = {type(module) for module in create_model("efficientnet-b0", weights=weights, hard_swish=False).modules()}
    assert nn.SiLU in kinds

"""BatchNorm folding: the same network, with the factors in the weights."""

import torch
from torch import nn

from effnet_quant import calibrate, quantize
from effnet_quant.quantization.ptq.batch_norm_folding import BatchNormFolding, fold_batch_norms
from quantization.ptq.networks import images, randomized


def network():
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=True),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1),
            nn.BatchNorm2d(6),
        )
    )


@torch.no_grad()
def test_the_network_computes_the_same_and_batch_norm_only_adds():
    model, x = quantize(network()), images()
    weight, norm = model[0].weight.clone(), [value.clone() for value in model[1].state_dict().values()]
    names, before = list(model.state_dict()), model(x)
    BatchNormFolding()(model, [x])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    factor = norm[0].double() / (norm[3].double() + 1e-3).sqrt()
    torch.testing.assert_close(
        model[0].weight.double(), weight.double() * factor[:, None, None, None], rtol=1e-6, atol=0
    )
    y = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(model[1](y) - y, model[1].bias[:, None, None].expand_as(y), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_folding_twice_changes_nothing_more_and_ranges_follow_the_weights():
    model, x = quantize(network()), images()
    calibrate(model, [x], "max")
    assert fold_batch_norms(model) == ["1", "4"]
    torch.testing.assert_close(model[0]._weight_quantizer.amax.flatten(), model[0].weight.abs().amax((1, 2, 3)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold_batch_norms(model) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

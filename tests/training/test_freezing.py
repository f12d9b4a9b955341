"""Frozen parts stay as they are, to the bit."""

from __future__ import annotations

import pytest
import torch

from effnet_quant import UserError, create_model
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.freezing import freeze


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("0", {"0.weight"}),
        ("1.*", {"1.weight", "1.bias"}),
        ("*.weight", {"0.weight", "1.weight", "5.weight"}),
    ],
)
def test_patterns_freeze_modules_and_parameters(tiny_network, pattern, frozen):
    model = tiny_network()
    freeze(model, [pattern])
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize(
    ("patterns", "norms"), [(["1"], 1), (["1.*"], 1), (["0"], 0), (["*.weight"], 0), (["*.weight", "1.bias"], 1)]
)
def test_a_batch_norm_is_frozen_with_all_its_parameters(tiny_network, patterns, norms):
    model = tiny_network()
    assert freeze(model, patterns) == [model[1]][:norms]


def test_a_frozen_part_keeps_its_bits_and_the_optimizer_does_not_know_it(
    tiny_network, make_trainer, make_loaders, tmp_path
):
    model = tiny_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(model, tmp_path, freeze=("0", "1")).fit(*make_loaders())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"5.weight", "5.bias"}
    state = load_checkpoint(tmp_path / "checkpoint.pth.tar")["optimizer"]
    assert len(state["state"]) == 2
    with pytest.raises(UserError, match="resume with the --optimizer, --freeze and --layer-decay"):
        trainer = make_trainer(tiny_network(), tmp_path)
        trainer.resume(load_checkpoint(tmp_path / "checkpoint.pth.tar"), "checkpoint.pth.tar")


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["feature.*"], r"--freeze feature\.\* matches no module and no parameter; did you mean: features"),
        (["stem", "layer.0"], r"--freeze layer\.0 matches .* did you mean: layers\.0"),
        (["xyz"], "the network's parts are: stem, layers, features, classifier"),
        (["*"], "--freeze leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, says):
    with pytest.raises(UserError, match=says):
        freeze(create_model("efficientnet-b0", 10), patterns)

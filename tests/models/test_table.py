"""``effnet-quant models``."""

import pytest
import timm
from torch import Tensor, nn
from torchvision import models

from effnet_quant.cli.models import job
from effnet_quant.errors import UserError
from effnet_quant.models.complexity import measure_complexity
from effnet_quant.models.entry import InputSpec, ModelEntry

# The same networks in torchvision, whose weights carry their multiply-accumulates in 1e9
TWINS = {
    "efficientnet-b0": "efficientnet_b0",
    "efficientnet-b4": "efficientnet_b4",
    "efficientnet-quant-b0": "efficientnet_b0",
    "torchvision:resnet50": "resnet50",
    "torchvision:regnet_x_400mf": "regnet_x_400mf",
}


@pytest.mark.parametrize("name", TWINS)
def test_a_row_has_torchvisions_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job([name]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "parameters", "GMACs", "image", "size", "weights"]
    cells = row.split()
    weights = models.get_model_weights(TWINS[name]).DEFAULT
    assert cells[:2] == [name, f"{weights.meta['num_params']:,}"]
    assert float(cells[2]) == pytest.approx(weights.meta["_ops"], rel=0.01)
    assert cells[3] == str(weights.transforms().crop_size[0])
    assert cells[4].startswith("https://")


def test_weights_of_timm_and_none_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    job(["timm:resnet18"])
    job(["efficientnet-b1"])
    timms, ours = capsys.readouterr().out.splitlines()[1::2]
    assert timms.endswith(f"timm ({timm.get_pretrained_cfg('resnet18').hf_hub_id})")
    assert ours.endswith("240  -")


def test_a_pattern_without_models_is_one_sentence() -> None:
    sentence = r"^no model is called 'timm:nothing\*'; patterns take \* and \?, as in 'timm:resnet\*'\.$"
    with pytest.raises(UserError, match=sentence):
        job(["timm:nothing*"])


def test_a_network_that_needs_values_has_parameters_alone() -> None:
    class Counting(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.layer = nn.Linear(2, num_classes)

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(image.nonzero()[:, :2].float())  # values decide how many rows there are

    assert measure_complexity(ModelEntry("counting", Counting, InputSpec(8, 8), num_classes=3)) == (9, None)

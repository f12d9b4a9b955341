"""``effnet-quant models``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from torch import Tensor, nn
from torchvision import models

from effnet_quant.cli.models import job
from effnet_quant.errors import UserError
from effnet_quant.models.complexity import measure_complexity
from effnet_quant.models.entry import InputSpec, ModelEntry


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def listed(capsys: pytest.CaptureFixture[str], pattern: str) -> str:
    job([pattern])
    return capsys.readouterr().out


def test_rows_are_kept_for_the_versions_that_they_are_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = listed(capsys, "cifar-resnet2*")
    path = tmp_path / "effnet-quant" / "models.json"
    kept = json.loads(path.read_text())
    code = "import sys; from effnet_quant.cli.models import job; job(['cifar-resnet2*']); assert 'torch' not in sys.modules"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == first
    # a row of other versions, and files that can't be right, are not believed
    kept["rows"]["cifar-resnet20"][1] = "7"
    path.write_text(json.dumps(kept))
    assert " 7 " in listed(capsys, "cifar-resnet2*")
    for damaged in (
        json.dumps({**kept, "versions": {**kept["versions"], "timm": "0.0"}}),
        json.dumps({**kept, "rows": {"cifar-resnet20": [1]}}),
        json.dumps({**kept, "names": [1]}),
        "[" * 100_000,
        "{",
        "\0",
    ):
        path.write_text(damaged)
        assert listed(capsys, "cifar-resnet2*") == first
        assert json.loads(path.read_text())["rows"]["cifar-resnet20"][1] == "269,722"


def test_nothing_is_kept_where_nothing_can_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "effnet-quant").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cifar-resnet20" in listed(capsys, "cifar-resnet20")

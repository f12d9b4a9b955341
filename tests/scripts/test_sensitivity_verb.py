"""effnet-quant sensitivity, by its command line."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch

from effnet_quant import ModelCard, calibrate, create_model
from effnet_quant.api import choose_card
from effnet_quant.models.weights import write_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A calibrated network's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "int8.safetensors"
    model = create_model("cifar-resnet20", 3, quantized=True).eval()
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    card = choose_card("cifar-resnet20", num_classes=3, quantized=True)
    write_weights(path, model.state_dict(), card)
    return path


def test_the_table_its_json_and_its_plot(run_script, image_folder, weights, tmp_path):
    figures, plot = tmp_path / "layers.json", tmp_path / "layers.svg"
    command = ["sensitivity", image_folder, "--model", weights, "--images", 6, "-b", 3]
    result = run_script("effnet_quant/__main__.py", *command, "--json", figures, "--plot", plot)
    assert result.code == 0, result.err
    stored = json.loads(figures.read_text())
    assert stored["examples"] == 6
    assert len(stored["rows"]) == 20
    assert all(row["layer"] in result.out for row in stored["rows"])
    labels = [element.text for element in ElementTree.parse(plot).iter() if element.tag.endswith("text")]
    noisiest = min(stored["rows"], key=lambda row: row["sqnr"])
    assert labels[2:4] == [noisiest["layer"], f"{noisiest['sqnr']:.1f}"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--plot", "layers.png"], "expected a file named .svg"),
        (["--images", 0], "must be at least 1"),
        (["--json", "nowhere/layers.json"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_said_before_the_work(run_script, image_folder, weights, flags, sentence):
    result = run_script("effnet_quant/__main__.py", "sensitivity", image_folder, "--model", weights, *flags)
    assert result.code == 2
    assert sentence in result.err


def test_float_weights_are_refused(run_script, image_folder, tmp_path):
    path = tmp_path / "float.safetensors"
    write_weights(path, create_model("cifar-resnet20", 3).state_dict(), ModelCard("cifar-resnet20", num_classes=3))
    result = run_script("effnet_quant/__main__.py", "sensitivity", image_folder, "--model", path)
    assert result.code == 2
    assert len(result.error_lines) == 1

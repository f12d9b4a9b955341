"""The quantization report of a run, by the command line."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.models.weights import write_weights

NETWORK = shlex.split(
    "--arch cifar-resnet20 --num-classes 3 --image-size 32 -b 6 --data-backend pytorch -j 0 --seed 1 --calibration-images 6 "
    "--epochs 0"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A float network's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    write_weights(path, create_model("cifar-resnet20", 3).state_dict())
    return path


@pytest.mark.slow
def test_the_report_of_a_calibration(run_script, image_folder, weights, tmp_path):
    flags = ["--report", tmp_path / "report", "--target", "openvino", "--quant-override", "conv1=float"]
    command = [*NETWORK, "--pretrained-from-file", weights, "--workspace", tmp_path, *flags]
    result = run_script("quant_main.py", image_folder, *command)
    assert result.code == 0, result.err
    assert f"report: {tmp_path / 'report' / 'index.html'}" in result.out
    html = (tmp_path / "report" / "index.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    cells = {row[0]: row[1:] for row in (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows) if row}
    # the simulation's score is the one that the run itself measured
    lines = [json.loads(line) for line in (tmp_path / "experiment_raport.json").read_text().splitlines()]
    assert cells["simulation"][0] == f"{lines[0]['data']['calib.top1']:.2f}"
    assert cells["float, openvino"][1] == "100.00"
    assert float(cells["float, openvino"][3]) > 3 * float(cells["engine, openvino"][3])
    assert cells["conv1 (stem): weights and input"] == ["the quantization spec says float"]
    assert cells["pooling._input_quantizer"] == ["openvino computes &#x27;pool&#x27; in float"]
    assert html.count('<div class="card">') == 20
    assert html.count('<svg class="histogram"') == 2 * 19
    assert html.count('<svg class="bar"') == 19


def test_the_report_of_a_climb(run_script, image_folder, weights, tmp_path):
    report = tmp_path / "report"
    flags = ["--report", report, "--auto", "--target-drop", 100]
    command = [*NETWORK, "--pretrained-from-file", weights, "--workspace", tmp_path, *flags]
    result = run_script("quant_main.py", image_folder, *command)
    assert result.code == 0, result.err
    html = (report / "index.html").read_text()
    assert "What was tried" in html
    assert "the target is met" in html
    assert str(tmp_path / "autoquant.safetensors") in result.out
    assert (tmp_path / "autoquant.onnx").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--report page.html", "expected a file named .png, .pdf, .svg, or a folder"),
        ("--report ranges.png --auto --target-drop 1", "give --report a folder"),
        ("--report {0}/report --evaluate", "--evaluate writes no report"),
    ],
)
def test_reports_that_can_not_be_written(run_script, image_folder, weights, tmp_path, flags, sentence):
    words = shlex.split(flags.format(tmp_path))
    command = [*NETWORK, "--pretrained-from-file", weights, "--workspace", tmp_path, *words]
    result = run_script("quant_main.py", image_folder, *command)
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "report").exists()

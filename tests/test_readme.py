"""What the README shows works as it is printed."""

import re
from pathlib import Path

import pytest
import torch

from effnet_quant import load_engine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "efficientnet-b0" in printed
    assert int(re.search(r"simulation: (\d+)%", printed).group(1)) >= 75  # untrained: the classes are near ties
    assert (tmp_path / "model.onnx").exists()
    assert "calibrated on 128 images" in printed
    trained = torch.load(tmp_path / "runs/int8/checkpoint.pth.tar", weights_only=True)
    assert trained["metadata"]["num_classes"] == 10  # as many as the data has
    assert trained["metadata"]["quant_spec"]["weight"]["bits"] == 8
    assert load_engine(tmp_path / "digits.onnx").input.shape == (3, 32, 32)


def test_the_scripts_and_pages_that_it_names_exist() -> None:
    for path in {*re.findall(r"python (\w+\.py)", README), *re.findall(r"\]\(([\w./]+)\)", README)}:
        assert (ROOT / path).exists(), path

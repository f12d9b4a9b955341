"""TensorBoard and Weights & Biases get what the raport file gets."""

from __future__ import annotations

import sys

import pytest

from effnet_quant.training.metrics import Recorder
from effnet_quant.training.sinks import TensorBoard, WandB

METRICS = [{"train.loss": 2.5, "val.top1": 11.0}, {"train.loss": 1.25, "val.top1": 42.0}]


def test_tensorboard_has_every_metric_of_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path / "raport.json", sinks=[TensorBoard(tmp_path / "events")])
    for epoch, metrics in enumerate(METRICS):
        recorder.record(metrics, epoch)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "val/top1"]
    for name in ("train/loss", "val/top1"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (epoch, metrics[name.replace("/", ".")]) for epoch, metrics in enumerate(METRICS)
        ]
    assert len((tmp_path / "raport.json").read_text().splitlines()) == 2


def test_wandb_has_the_latest_metrics(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandB("test", tmp_path, {"lr": 0.5})
    for epoch, metrics in enumerate(METRICS):
        sink.write(metrics, epoch)
    assert dict(sink._run.summary)["val.top1"] == 42.0
    assert sink._run.config["lr"] == 0.5
    sink._run.finish()


@pytest.mark.parametrize(("flags", "package"), [(["--tensorboard"], "tensorboard"), (["--wandb", "project"], "wandb")])
def test_a_missing_package_is_named_with_its_extra(run_script, tmp_path, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = ["digits", "--arch", "efficientnet-b0", "--num-classes", 10, "--image-size", 32, "--workspace", tmp_path]
    result = run_script("main.py", *run, *flags)
    assert result.code == 2
    assert f"pip install 'effnet-quant[{package}]'" in result.error_lines[0]

"""Speeds and the raport file."""

from __future__ import annotations

import json
import time

import pytest

from effnet_quant.errors import UserError
from effnet_quant.training import metrics as metrics_module
from effnet_quant.training.metrics import Recorder, Stopwatch


def test_stopwatch_splits_waiting_and_computing(monkeypatch):
    clock = iter([0.0, 1.0, 1.5, 4.5, 5.0])  # start, data, done, data, done
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    for images in (8, 4):
        stopwatch.data_ready()
        stopwatch.batch_done(images)
    assert stopwatch.metrics("train") == pytest.approx(
        {"train.total_ips": 2.4, "train.compute_ips": 12.0, "train.data_time": 2.0, "train.compute_time": 0.5}
    )


def test_stopwatch_says_nothing_before_the_first_batch():
    assert Stopwatch().metrics("train") == {}


def test_recorder_appends_a_json_object_a_line(tmp_path):
    path = tmp_path / "raport.json"
    path.write_text('{"from": "an earlier run"}\n')
    recorder = Recorder(path)
    recorder.record({"calib.images": 512})
    recorder.record({"train.loss": 1.5, "val.top1": 98.25}, epoch=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"from": "an earlier run"}
    assert [(line["step"], line["data"]) for line in lines[1:]] == [
        ([], {"calib.images": 512}),
        ([3], {"train.loss": 1.5, "val.top1": 98.25}),
    ]
    assert all(abs(line["timestamp"] - time.time()) < 60 for line in lines[1:])


def test_recorder_without_a_file_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Recorder(None).record({"val.top1": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_raport_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/raport\.json.*--raport-file"):
        Recorder(tmp_path / "nowhere" / "raport.json")

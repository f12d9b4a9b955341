"""Latencies: the figures against NumPy's and the training loop's, and the command that prints them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import ModelCard
from effnet_quant.checks.latency import Latency, interleaved_seconds, measure_engines, median_seconds, rounds_for
from effnet_quant.cli import latency as command
from effnet_quant.models.weights import write_weights
from effnet_quant.training.metrics import Stopwatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latency")
    torch.manual_seed(0)
    model = create_model("cifar-resnet20").eval()
    export_onnx(model, folder / "float.onnx", 32)
    write_weights(folder / "float.safetensors", model.state_dict(), ModelCard(arch="cifar-resnet20"))
    quantize(model)
    calibrate(model, [torch.randn(4, 3, 32, 32)], method="max")
    export_onnx(model, folder / "int8.onnx", 32)
    return folder


def test_the_figures_are_those_of_the_times() -> None:
    seconds = np.random.default_rng(0).gamma(2, 1e-3, 101).tolist()
    figures = Latency.of(8, seconds)
    in_order = sorted(seconds)
    assert (figures.p50, figures.p95, figures.p99) == (in_order[50], in_order[95], in_order[99])
    assert figures.average == pytest.approx(sum(seconds) / 101)
    assert figures.throughput == pytest.approx(8 * 101 / sum(seconds))
    assert figures.runs == 101


def test_benchmark_inference_computes_the_same_figures() -> None:
    seconds = np.random.default_rng(1).gamma(2, 1e-3, 37).tolist()
    stopwatch = Stopwatch()
    stopwatch._compute = seconds
    theirs, ours = stopwatch.latencies("val"), Latency.of(1, seconds)
    assert theirs["val.compute_latency"] == pytest.approx(ours.average)
    assert theirs["val.compute_latency_at50"] == ours.p50
    assert theirs["val.compute_latency_at95"] == ours.p95
    assert theirs["val.compute_latency_at99"] == ours.p99


def test_functions_take_turns_and_each_turn_starts_untimed() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in "abc"]
    times = interleaved_seconds(runs, rounds=5, runs_a_turn=3)
    turns = ["".join(calls[start : start + 4]) for start in range(0, len(calls), 4)]
    rounds = [tuple(turns[start : start + 3]) for start in range(0, 15, 3)]
    assert all(sorted(round_) == ["aaaa", "bbbb", "cccc"] for round_ in rounds)
    assert len(set(rounds)) > 1, "the one that follows another is not always the same"
    assert [len(own) for own in times] == [15, 15, 15]
    assert len(median_seconds([lambda: None], rounds=1)) == 1


@pytest.mark.parametrize(
    ("seconds", "slowest", "expected"),
    [(6, 0.125, (8, 5)), (6, 1.0, (3, 2)), (5, 1e-5, (100, 5)), (2.25, 0.125, (3, 5))],
)
def test_slow_engines_run_less_often(seconds: float, slowest: float, expected: tuple[int, int]) -> None:
    assert rounds_for(seconds, slowest) == expected


def test_engines_are_measured_at_every_batch_size(folder: Path) -> None:
    engines = [load_engine(folder / "float.onnx", threads=1), load_engine(folder / "int8.onnx", "openvino", threads=1)]
    measured = list(measure_engines(engines, (1, 4), seconds=0.05))
    assert [[row.batch_size for row in rows] for rows in measured] == [[1, 1], [4, 4]]
    assert all(0 < row.p50 <= row.p95 <= row.p99 and row.runs >= 6 for rows in measured for row in rows)


def test_openvino_is_compiled_for_each_of_many_batch_sizes(folder: Path) -> None:
    engine = load_engine(folder / "float.onnx", "openvino", threads=1)
    sizes = range(1, 7)
    for size, _ in zip(sizes, measure_engines([engine], sizes, seconds=0.01), strict=True):
        ((shape,),) = engine._run._networks
        assert shape == (size, 3, 32, 32)
        assert engine._run._any_shape is None
    engine.forget_shapes()
    assert not engine._run._networks
    load_engine(folder / "float.onnx").forget_shapes()  # nothing to forget


def test_the_command_prints_a_table_and_writes_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = ["float.onnx", "int8.onnx", "int8.onnx@openvino", "float.safetensors"]
    arguments = [*(str(folder / name) for name in engines), "-b", "1", "2", "--threads", "1", "--seconds", "0.02"]
    assert command.job([*arguments, "--json", str(folder / "latency.json")]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    titles, rule, *rows = lines
    assert titles[:4] == ["engine", "backend", "precision", "batch"]
    assert set("".join(rule)) == {"-"}
    assert [row[1:4] for row in rows[:4]] == [
        ["onnxruntime", "fp32", "1"],
        ["onnxruntime", "int8 + fp32", "1"],
        ["openvino", "int8 + fp32", "1"],
        ["torch", "fp32", "1"],
    ]
    assert len(rows) == 8
    assert rows[0][-1] == rows[4][-1] == "1.00x"
    assert [command._times(ratio) for ratio in (12.345, 0.5, 0.1, 0.0312, 0.00047)] == [
        "12.35x", "0.50x", "0.10x", "0.031x", "0.00047x",
    ]  # fmt: skip
    assert ", 1 thread;" in out
    assert f"onnxruntime {__import__('onnxruntime').__version__}" in out
    stored = json.loads((folder / "latency.json").read_text())
    assert stored["machine"]["threads"] == 1
    assert stored["machine"]["processor"]
    for row, entry in zip(rows, stored["rows"], strict=True):
        assert float(row[5]) == pytest.approx(1e3 * entry["average"], abs=0.006)
        assert float(row[4]) == pytest.approx(entry["batch_size"] / entry["average"], abs=0.51)


def test_what_can_not_be_measured_is_said(folder: Path, tmp_path: Path) -> None:
    file = str(folder / "float.onnx")
    with pytest.raises(UserError, match="must be positive"):
        command.job([file, "-b", "0"])
    with pytest.raises(
        UserError, match=r"no file .*float\.onnx@tpu; a backend after the @ is one of: onnxruntime, openvino"
    ):
        command.job([f"{file}@tpu"])
    with pytest.raises(UserError, match="does not compute in 'fp8'"):
        command.job([f"{file}@openvino@fp8"])
    with pytest.raises(UserError, match="images of one size; leave --image-size out"):
        command.job([file, "--image-size", "64"])
    with pytest.raises(UserError, match="no folder"):
        command.job([file, "--json", str(tmp_path / "missing" / "latency.json")])


def test_a_file_may_have_an_at_in_its_name(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "me@openvino" / "b0@2.onnx"
    odd.parent.mkdir()
    odd.write_bytes((folder / "float.onnx").read_bytes())
    for text, backend in (
        (f"{odd}", "onnxruntime"),
        (f"{odd}@openvino", "openvino"),
        (f"{odd}@openvino@fp32", "openvino"),
    ):
        engine = command._load(text, None, None)
        assert (engine.path, engine.backend) == (odd, backend)


def test_threads_and_device_go_to_the_engines_that_have_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "effnet_quant.engines.engine.load_engine",
        lambda path, backend, **settings: asked.append((backend, settings)),
    )
    for text in ("a.onnx", "a.onnx@openvino", "a.plan"):
        command._load(text, "cuda", 2)
        command._load(text, None, 2)
    on_card, on_cpu = ({"device": "cuda", "threads": None}, {"device": None, "threads": 2})
    assert [(backend, {name: settings[name] for name in on_cpu}) for backend, settings in asked] == [
        ("onnxruntime", on_card),
        ("onnxruntime", on_cpu),
        ("openvino", on_cpu),  # has no other device
        ("openvino", on_cpu),
        ("tensorrt", {"device": None, "threads": None}),
        ("tensorrt", {"device": None, "threads": None}),
    ]

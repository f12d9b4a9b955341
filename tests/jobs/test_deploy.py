"""deploy: the engine in the folder is one that runs, and the table says what was measured."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from effnet_quant import InputSpec, ModelCard, UserError, create_model, deploy, load, load_engine, ptq
from effnet_quant.checks.latency import Latency
from effnet_quant.checks.verify import Comparison
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.jobs.engine_choice import Candidate, choose
from effnet_quant.models.weights import write_weights
from effnet_quant.quantization.targets import get_target
from effnet_quant.tasks.classification import CLASSIFICATION

CARD = ModelCard(num_classes=3, classes=("apple", "bear", "cat"), input=InputSpec(32, 36))


def network() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


def candidate(tmp_path, name, milliseconds, *, quantized, agreement=100.0, images=1000):
    score = {CLASSIFICATION.score.key: 90.0}
    compared = Comparison(images, score, score, CLASSIFICATION.score, agreement, 0.0, 0.0, 0.0, 0)
    rules = get_target("onnxruntime") if quantized else None
    single = Latency.of(1, [1e-3 * milliseconds] * 5)
    return Candidate(name, "onnxruntime", "fp32", rules, tmp_path / "none.onnx", comparison=compared, single=single)


def test_the_fastest_that_agrees_is_chosen(tmp_path):
    slow, fast = (candidate(tmp_path, name, ms, quantized=True) for name, ms in (("slow", 9), ("fast", 5)))
    wrong = candidate(tmp_path, "wrong", 1, quantized=True, agreement=90.0)
    floats = candidate(tmp_path, "float", 10, quantized=False)
    kept, speedup, sentence = choose([slow, fast, wrong, floats])
    assert kept is fast
    assert speedup == pytest.approx(2)
    assert sentence == "kept: fast, 2.00 times as fast as float."
    # five of 200 images apart is 97.5 %, whose 95 % interval ends at 98.9 %; one apart leaves room for 99.5 %
    few = replace(wrong, comparison=replace(wrong.comparison, images=200, agreement=99.5))
    assert few.usable


def test_float_stays_where_integers_do_not_pay(tmp_path):
    floats = candidate(tmp_path, "float", 10, quantized=False)
    kept, speedup, sentence = choose([floats, candidate(tmp_path, "int", 9.9, quantized=True)])
    assert kept is floats
    assert speedup == pytest.approx(10 / 9.9)
    assert sentence.startswith("no 8-bit engine is 1.02 times as fast as the best float engine here (int: 1.01 times)")
    kept, _, sentence = choose([floats, candidate(tmp_path, "int", 1, quantized=True, agreement=50.0)])
    assert kept is floats
    assert "no 8-bit engine agrees" in sentence
    assert choose([candidate(tmp_path, "int", 1, quantized=True, agreement=50.0)])[0] is None


def test_a_float_network_becomes_an_engine_that_runs(image_folder, tmp_path):
    said: list[str] = []
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = deploy(
        model, str(image_folder), tmp_path / "out", card=CARD, runtimes=["onnxruntime"], threads=1, time_budget=20,
        say=said.append,
    )  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {row.name for row in result.rows} >= {"float, onnxruntime", "INT8, onnxruntime"}
    for row in result.rows:
        assert None not in (row.score, row.average, row.p99, row.throughput, row.load_seconds), row
        assert row.agreement >= 90
        assert row.size_bytes > 1000
        assert 20e6 < row.peak_bytes < 4e9  # Python with ONNX Runtime, not the tests' own process
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    values = json.loads((tmp_path / "out" / "deploy.json").read_text())
    assert names == sorted(["deploy.html", "deploy.json", values["file"]])
    engine = load_engine(tmp_path / "out" / "deploy.json")
    assert engine.classes == CARD.classes
    assert engine.settings.threads == 1
    assert ("int8" in engine.precision) == result.quantized
    image = next((image_folder / "val" / "bear").iterdir())
    assert {entry["class"] for entry in engine.predict(str(image))["top"]} == set(CARD.classes)
    html = (tmp_path / "out" / "deploy.html").read_text()
    assert "float, onnxruntime" in html
    assert html.count('class="bar"') == 2 * len(result.rows)
    assert not re.search(r"(src|href)=", html)  # it loads nothing


@pytest.mark.slow
def test_a_quantized_network_is_compared_with_its_float_form(image_folder, tmp_path):
    model = network()
    ptq(model, [torch.randn(8, 3, 32, 32)], target="onnxruntime", recipe="minmax")
    result = deploy(
        model.eval(), str(image_folder), tmp_path, card=CARD, runtimes=["onnxruntime"], threads=1, time_budget=5
    )
    assert {"float, onnxruntime", "INT8, onnxruntime"} <= {row.name for row in result.rows}
    assert read_onnx(load_engine(tmp_path / "deploy.json").path).quantized == result.quantized
    sizes = {row.name: row.size_bytes for row in result.rows}
    assert sizes["float, onnxruntime"] > sizes["INT8, onnxruntime"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "digits"}, "digits has 10 classes, but the model has 3"),
        ({"data": "nowhere"}, "there is no data at nowhere"),
        ({"card": replace(CARD, classes=("apple", "bear", "dog"))}, "classes that the training data lacks: cat"),
        ({"card": ModelCard()}, "which images the model takes"),
        ({"runtimes": ["tensorrt"]}, r"tensorrt is not installed; pip install effnet-quant\[tensorrt\]"),
        ({"runtimes": ["tflite"]}, "there is no runtime 'tflite'"),
        ({"images": 0}, "must be above 0"),
    ],
)
def test_what_can_not_be_deployed_leaves_nothing(image_folder, tmp_path, changes, says):
    arguments = {"model": network(), "data": str(image_folder), "card": CARD, **changes}
    with pytest.raises(UserError, match=says):
        deploy(output=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    card = ModelCard("cifar-resnet20", num_classes=3, classes=CARD.classes, input=InputSpec(32, 36))
    write_weights(path, create_model("cifar-resnet20", 3).state_dict(), card)
    return path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("digits", "there are no weights; give them with --weights."),
        ("digits --weights missing.safetensors", "there is no file missing.safetensors"),
        ("digits --weights missing.safetensors --time-budget 5", "expected a number and a unit"),
        (
            "digits --weights missing.safetensors --runtimes tensorrt",
            "the runtime tensorrt is not installed; pip install",
        ),
    ],
)
def test_wrong_command_lines(run_script, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    result = run_script("effnet_quant/__main__.py", "deploy", *shlex.split(flags))
    assert result.code == 2
    assert len(result.error_lines) == 1
    assert says in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line(run_process, image_folder, weights, tmp_path):
    flags = shlex.split("--runtimes onnxruntime openvino --time-budget 60s --threads 1")
    result = run_process("effnet_quant/__main__.py", "deploy", image_folder, "--weights", weights, *flags, cwd=tmp_path)
    assert result.code in (0, 1), result.err
    assert "INT8, openvino" in result.out
    folder = weights.parent / "deploy"
    kept = load_engine(folder / "deploy.json")
    assert result.code == ("int8" not in kept.precision)
    image = next((image_folder / "val" / "cat").iterdir())
    shown = run_process(
        "classify.py", "--pretrained-from-file", folder / "deploy.json", "--image", image, "--json", cwd=tmp_path
    )
    assert shown.code == 0, shown.err
    assert {entry["class"] for entry in json.loads(shown.out)["top"]} == set(CARD.classes)
    served = run_process("effnet_quant/__main__.py", "serve", folder / "deploy.json", "repository", cwd=tmp_path)
    assert served.code == 0, served.err
    assert (tmp_path / "repository" / kept.path.stem / "1").is_dir()
    again = run_process("effnet_quant/__main__.py", "deploy", image_folder, "--weights", weights, *flags, cwd=tmp_path)
    assert again.code in (0, 1), again.err
    assert len(list(folder.glob("*.onnx"))) == 1


@pytest.mark.slow
def test_a_signal_keeps_what_was_measured(start_process, image_folder, weights, tmp_path):
    flags = [*shlex.split("--runtimes onnxruntime openvino --time-budget 10m --threads 1 --output"), tmp_path / "out"]
    process = start_process(
        "effnet_quant/__main__.py", "deploy", image_folder, "--weights", weights, *flags, cwd=tmp_path
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "INT8, onnxruntime: measured" in line:
            process.send_signal(signal.SIGINT)
            break
    since = time.monotonic()
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - since < 10
    assert process.returncode == 130
    assert "stopped before the end: " in rest
    assert load_engine(tmp_path / "out" / "deploy.json").backend == "onnxruntime"
    assert "INT8, onnxruntime" in (tmp_path / "out" / "deploy.html").read_text()


@pytest.mark.slow
def test_a_saved_quantized_model(run_process, image_folder, tmp_path):
    from effnet_quant import save

    torch.manual_seed(0)
    model = ptq(create_model("cifar-resnet20", 3).eval(), [torch.randn(8, 3, 32, 32)], recipe="minmax")
    save(model, tmp_path / "int8.safetensors")
    assert load(tmp_path / "int8.safetensors").training is False
    flags = shlex.split("--weights int8.safetensors --runtimes onnxruntime --time-budget 20s --threads 1")
    result = run_process("effnet_quant/__main__.py", "deploy", image_folder, *flags, cwd=tmp_path)
    assert result.code in (0, 1), result.err
    assert "quantizing by the recipe" not in result.err
    assert load_engine(tmp_path / "deploy" / "deploy.json").card.arch == "cifar-resnet20"

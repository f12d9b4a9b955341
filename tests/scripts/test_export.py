"""model2onnx.py's forms of a file, as a user types them, and the scripts that take such files."""

from __future__ import annotations

import re

import onnx
import pytest
import torch

from effnet_quant import UserError, calibrate, create_model
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.checks.tuning import Tuning
from effnet_quant.cli import verify
from effnet_quant.engines.engine import load_engine
from effnet_quant.jobs import inference
from effnet_quant.models.weights import write_weights
from effnet_quant.quantization.spec import resolve_spec
from effnet_quant.quantization.targets import get_target

CLASSES = ["apple", "bear", "cat"]


def succeeded(result):
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Calibrated weights of a small network that say what belongs to them."""
    torch.manual_seed(0)
    model = create_model("cifar-resnet20", 3, quantized=True).eval()
    calibrate(model, [torch.randn(8, 3, 32, 32)], method="max")
    path = tmp_path_factory.mktemp("weights") / "quantized.safetensors"
    card = ModelCard(classes=CLASSES, input=InputSpec(32, 36), quant_spec=resolve_spec("w8a8").to_json())
    write_weights(path, model.state_dict(), card)
    return path


def export(run_script, weights, output, *flags):
    model = ["--arch", "cifar-resnet20", "--pretrained-from-file", weights]
    return run_script("model2onnx.py", *model, "--output", output, *flags)


def test_a_file_with_preprocessing_classifies_and_verifies(run_script, weights, image_folder, tmp_path):
    plain, pixels = tmp_path / "plain.onnx", tmp_path / "pixels.onnx"
    succeeded(export(run_script, weights, plain))
    flags = ["--with-preprocessing", "--opset", 19, "--verify", image_folder, "--min-images", 18, "--layers"]
    verified = succeeded(export(run_script, weights, pixels, *flags)).out
    assert "the engine does what the simulation says" in verified
    assert "no layer departs" in verified
    images = ["--image", image_folder / "val/cat/00.jpg", "--json"]
    answers = [
        succeeded(run_script("classify.py", "--pretrained-from-file", path, *images)) for path in (plain, pixels)
    ]
    assert answers[0].out == answers[1].out


def test_the_file_says_what_it_is(run_script, weights, tmp_path):
    path = tmp_path / "model.onnx"
    succeeded(
        export(run_script, weights, path, "--target", "tensorrt", "--fp16", "--dynamic-size", "--weights", "float")
    )
    metadata = load_engine(path).metadata
    assert metadata["target"] == "tensorrt"
    assert metadata["classes"] == CLASSES
    assert metadata["input"] == {"name": "input", "type": "float32", "layout": "NCHW"}
    assert metadata["output"] == {"name": "logits", "type": "float32"}
    assert metadata["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert resolve_spec(metadata["quant_spec"]) == resolve_spec("w8a8")
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 19
    assert [size.dim_param for size in proto.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "height",
        "width",
    ]
    stored = {entry.data_type for entry in proto.graph.initializer if entry.name.endswith(".weight")}
    assert stored == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--opset", "12"], "opset 12 can't be written; choose one from 17 to 21"),
        (["--fp16"], "onnxruntime has no integer kernels between float16"),
        (["--fp16", "--target", "tensorrt", "--opset", "18"], "opset 18 has no float16 around quantized values"),
    ],
)
def test_what_can_not_be_written_is_said(run_script, weights, tmp_path, flags, says):
    result = export(run_script, weights, tmp_path / "model.onnx", *flags)
    assert result.code == 2
    assert says in result.error_lines[0]
    assert list(tmp_path.iterdir()) == []


def test_tuning_measures_keeps_and_says_what_it_chose(run_script, weights, image_folder, tmp_path):
    path = tmp_path / "tuned.onnx"
    flags = ["--tune", image_folder, "-b", 2, "--verify", image_folder, "--min-agreement", 90, "--min-images", 18]
    result = export(run_script, weights, path, *flags)
    lines = result.out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("placement"))
    rows = [re.fullmatch(r"(.+?) +\d+\.\d\d +\d+\.\d\dx( <- chosen)?", line) for line in lines[start + 1 :]]
    table = {row[1]: row[0] for row in rows if row}
    assert set(table) >= {"target's own", "float", "stem in float", "linear in float", "pool in float", "add in float"}
    (chosen,) = (name for name, line in table.items() if line.endswith("<- chosen"))
    left = sorted(name.removesuffix(" in float") for name in chosen.split(" + ")) if chosen != "target's own" else []
    metadata = load_engine(path).metadata
    assert metadata.get("float_operations", []) == left
    assert metadata["tuned_precision"] == "fp32"
    slower = float(table[chosen].split("x <-")[0].split()[-1]) < 1
    assert ("is slower than its float version on this machine" in result.err) is slower
    assert result.code == (1 if slower else 0)
    assert "the engine does what the simulation says" in result.out
    assert result.err.count("to go") == 6


@pytest.mark.parametrize(("seconds", "flags", "code"), [(2.0, [], 1), (2.0, ["--allow-slower"], 0), (0.5, [], 0)])
def test_a_network_that_is_slower_than_in_float_is_no_success(
    run_script, weights, image_folder, tmp_path, monkeypatch, seconds, flags, code
):
    rules = get_target("openvino")
    tuning = Tuning({"target's own": seconds, "float": 1.0}, "target's own", rules, "fp32", 1.0)
    monkeypatch.setattr(inference, "tune", lambda *arguments: tuning)
    path = tmp_path / "model.onnx"
    result = export(run_script, weights, path, "--target", "openvino", "--tune", image_folder, *flags)
    assert result.code == code
    assert path.is_file()
    assert ("slower than its float version on this machine (0.50 times its speed)" in result.err) == (code == 1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--allow-slower"], "--allow-slower: nothing is measured without --tune"),
        (["--layers"], "--layers: nothing is compared without --verify"),
        (["--min-agreement", "90", "-j", "2"], "--workers, --min-agreement: nothing is compared without --verify"),
        (["--tune", "digits", "-j", "2"], "--workers: this is of --verify; --tune reads a single batch"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(run_script, weights, tmp_path, flags, says):
    result = export(run_script, weights, tmp_path / "model.onnx", *flags)
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert says in result.error_lines[0]
    assert list(tmp_path.iterdir()) == []


def test_verify_says_what_would_do_nothing(weights, tmp_path, capsys, run_script, image_folder):
    path = tmp_path / "model.onnx"
    result = succeeded(export(run_script, weights, path, "-b", 4, "--target", "tensorrt"))
    assert "note: -b is of --verify and --tune" in result.out
    with pytest.raises(UserError, match="--min-agreement, --threads: nothing is run without DATA"):
        verify.job(["--lint", "tensorrt", "--engine", str(path), "--threads", "1", "--min-agreement", "90"])
    floats, engine = tmp_path / "float.safetensors", tmp_path / "float.onnx"
    write_weights(floats, create_model("cifar-resnet20", 3).state_dict(), ModelCard(classes=CLASSES))
    succeeded(export(run_script, floats, engine))
    flags = ["--model", str(floats), "--engine", str(engine), "--layers", "--min-images", "18", "--threads", "1"]
    assert verify.job([*flags, str(image_folder)]) == 0
    out = capsys.readouterr().out
    assert "there is no table of layers: the model is not quantized" in out
    assert "onnxruntime, fp32" in out
    with pytest.raises(UserError, match="onnxruntime does not compute in 'bf16'"):
        verify.job([*flags, "--engine-precision", "bf16", str(image_folder)])


def test_tuning_needs_an_engine_and_integers(run_script, weights, image_folder, tmp_path):
    refused = export(run_script, weights, tmp_path / "model.onnx", "--tune", image_folder, "--target", "tensorrt")
    assert refused.code == 2
    assert "--verify and --tune run the engine" in refused.error_lines[0]
    torch.manual_seed(0)
    floats = tmp_path / "float.safetensors"
    write_weights(floats, create_model("cifar-resnet20", 3).state_dict(), ModelCard(classes=CLASSES))
    refused = export(run_script, floats, tmp_path / "model.onnx", "--tune", image_folder)
    assert refused.code == 2
    assert "nothing to tune" in refused.error_lines[0]
    assert list(tmp_path.iterdir()) == [floats]

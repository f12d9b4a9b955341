"""The main job on a folder of images, script after script, as a user types them."""

from __future__ import annotations

import json
import shlex

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from effnet_quant import UserError, create_model, export_onnx
from effnet_quant.cli import verify

# batches of 6: at 32 pixels the last stages have one value an image and channel, and BatchNorm over 4 of them explodes
SMALL = shlex.split("--num-classes 3 --image-size 32 --prof 2 -b 6 --data-backend pytorch -j 1 --seed 1 -p 1")
FLOAT = ["--arch", "efficientnet-b0", "--bn-momentum", "0.1", "--lr", "0.01", *SMALL]
QUANTIZED = ["--arch", "efficientnet-quant-b0", "--lr", "0.001", *SMALL]
CLASSES = ["apple", "bear", "cat"]
TARGETS = ["onnxruntime", "openvino", "tensorrt"]
SPEEDS = ("total_ips", "compute_ips", "data_time", "compute_time")
LATENCIES = tuple(f"compute_latency{at}" for at in ("", "_at50", "_at95", "_at99", "_at100"))
TRAINING_METRICS = {f"train.{name}" for name in ("loss", "lr", *SPEEDS, *LATENCIES)}
VALIDATION_METRICS = {f"val.{name}" for name in ("loss", "top1", "top5", *SPEEDS, *LATENCIES)}


def succeeded(result):
    assert result.code == 0, result.err
    return result


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def raport(folder):
    return [json.loads(line) for line in (folder / "experiment_raport.json").read_text().splitlines()]


def state_of(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(run_script, image_folder, tmp_path_factory):
    """The workspace of one epoch of main.py."""
    workspace = tmp_path_factory.mktemp("float")
    succeeded(run_script("main.py", image_folder, *FLOAT, "--epochs", 1, "--workspace", workspace))
    return workspace


@pytest.fixture(scope="module")
def weights(run_script, trained):
    """The weights that checkpoint2model.py extracts, by extension."""
    paths = {suffix: trained.parent / f"{trained.name}_weights{suffix}" for suffix in (".safetensors", ".pth")}
    for path in paths.values():
        result = run_script(
            "checkpoint2model.py", "--checkpoint-path", trained / "model_best.pth.tar", "--weight-path", path
        )
        assert str(path) in succeeded(result).out
    return paths


@pytest.fixture(scope="module")
def calibrated(run_script, image_folder, weights, tmp_path_factory):
    """The workspace of quant_main.py --epochs 0."""
    workspace = tmp_path_factory.mktemp("ptq")
    start = ["--pretrained-from-file", weights[".safetensors"]]
    succeeded(run_script("quant_main.py", image_folder, *QUANTIZED, *start, "--epochs", 0, "--workspace", workspace))
    return workspace


@pytest.fixture(scope="module")
def tuned(run_script, image_folder, calibrated, tmp_path_factory):
    """The workspace of quant_main.py --epochs 1, from calibrated weights."""
    workspace = tmp_path_factory.mktemp("qat")
    start = ["--pretrained-from-file", calibrated / "checkpoint.pth.tar"]
    result = run_script("quant_main.py", image_folder, *QUANTIZED, *start, "--epochs", 1, "--workspace", workspace)
    assert "no calibration" in succeeded(result).out
    return workspace


@pytest.fixture(scope="module")
def exported(run_script, tuned, tmp_path_factory):
    """The ONNX file of each target; TensorRT's by NVIDIA's command line, which names no output."""
    folder = tmp_path_factory.mktemp("onnx")
    model = ["--arch", "efficientnet-quant-b0", "--pretrained-from-file", tuned / "model_best.pth.tar", "-b", 8]
    paths = {target: folder / f"{target}.onnx" for target in ("onnxruntime", "openvino")}
    for target, path in paths.items():
        succeeded(run_script("model2onnx.py", *model, "--target", target, "--output", path))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeeded(run_script("model2onnx.py", *model, "--trt", "True", "--target", "tensorrt"))
    return {**paths, "tensorrt": folder / "efficientnet-quant-b0.onnx"}


def test_main_writes_checkpoints_and_a_raport(trained):
    assert names(trained) == ["checkpoint.pth.tar", "experiment_raport.json", "model_best.pth.tar", "run.yml"]
    (line,) = raport(trained)[:1]
    assert line["step"] == [0]
    assert set(line["data"]) == TRAINING_METRICS | VALIDATION_METRICS


def test_checkpoint_says_what_it_holds(trained):
    state = state_of(trained / "checkpoint.pth.tar")
    assert (state["epoch"], state["arch"]) == (1, "efficientnet-b0")
    assert state["metadata"]["classes"] == CLASSES
    assert state["metadata"]["preprocessing"]["image_size"] == 32
    assert state["state_dict"]["classifier.fc.weight"].shape == (3, 1280)
    assert state["optimizer"]["state"]


def test_evaluate_gives_the_figures_of_the_training(run_script, image_folder, trained, tmp_path):
    checkpoint = trained / "checkpoint.pth.tar"
    result = succeeded(
        run_script("main.py", image_folder, *FLOAT, "--evaluate", "--resume", checkpoint, "--workspace", tmp_path)
    )
    (line,) = raport(tmp_path)
    assert set(line["data"]) == VALIDATION_METRICS
    assert f"val.top1 {line['data']['val.top1']:.4g}" in result.out
    before = raport(trained)[0]["data"]
    assert line["data"]["val.loss"] == pytest.approx(before["val.loss"], rel=1e-6)
    assert line["data"]["val.top1"] == before["val.top1"]
    assert names(tmp_path) == ["experiment_raport.json"]


def test_resumed_run_keeps_the_seed_that_it_chose_itself(run_script, image_folder, tmp_path):
    at = FLOAT.index("--seed")
    command = [image_folder, *FLOAT[:at], *FLOAT[at + 2 :], "--workspace", tmp_path]
    checkpoint = tmp_path / "checkpoint.pth.tar"
    succeeded(run_script("main.py", *command, "--epochs", 1))
    chosen = state_of(checkpoint)["config"]["seed"]
    succeeded(run_script("main.py", *command, "--epochs", 2, "--resume", checkpoint))
    assert state_of(checkpoint)["epoch"] == 2
    assert state_of(checkpoint)["config"]["seed"] == chosen  # or the rest of the run sees the images in another order


def test_extracted_weights_are_the_checkpoints(trained, weights):
    expected = state_of(trained / "model_best.pth.tar")["state_dict"]
    for tensors in (load_file(weights[".safetensors"]), state_of(weights[".pth"])):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_calibration_records_its_metrics_and_a_checkpoint(calibrated):
    assert names(calibrated) == ["checkpoint.pth.tar", "experiment_raport.json", "run.yml"]
    (line,) = raport(calibrated)
    assert line["step"] == []
    assert set(line["data"]) == {
        f"calib.{name}" for name in ("images", "ranges", "loss", "top1", "top5", *SPEEDS, *LATENCIES)
    }
    assert line["data"]["calib.images"] == 18


def test_calibration_sets_every_range_and_keeps_the_weights(calibrated, weights):
    state = state_of(calibrated / "checkpoint.pth.tar")["state_dict"]
    ranges = {name: tensor for name, tensor in state.items() if name.endswith("_amax")}
    assert set(ranges) == {name for name in create_model("efficientnet-quant-b0", 3).state_dict() if "_amax" in name}
    assert all(bool((tensor.isfinite() & (tensor >= 0)).all()) for tensor in ranges.values())
    for name, tensor in state_of(weights[".pth"]).items():
        assert torch.equal(state[name].reshape(tensor.shape), tensor), name


def test_fine_tuning_trains_the_weights_and_keeps_the_ranges(calibrated, tuned):
    assert names(tuned) == ["checkpoint.pth.tar", "experiment_raport.json", "model_best.pth.tar", "run.yml"]
    before, after = (state_of(folder / "checkpoint.pth.tar")["state_dict"] for folder in (calibrated, tuned))
    for name in before:
        if name.endswith("_amax"):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["stem.conv.weight"], after["stem.conv.weight"])
    assert set(raport(tuned)[0]["data"]) == TRAINING_METRICS | VALIDATION_METRICS


@pytest.mark.slow
def test_fine_tuning_resumes(run_script, image_folder, tuned, tmp_path):
    resume = ["--resume", tuned / "checkpoint.pth.tar", "--workspace", tmp_path]
    result = run_script("quant_main.py", image_folder, *QUANTIZED, "--epochs", 2, *resume)
    assert "epoch 2/2" in succeeded(result).out
    assert [line["step"] for line in raport(tmp_path)] == [[1]]


@pytest.mark.parametrize("target", TARGETS)
def test_export_is_valid_and_quantized_for_its_target(exported, target):
    model = onnx.load(exported[target])
    onnx.checker.check_model(model, full_check=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Conv") == 81  # of EfficientNet-B0, squeeze-and-excitation included
    assert operators.count("QuantizeLinear") > 50
    assert "BatchNormalization" not in operators
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zero_points = {
        (str(tensors[node.input[2]].dtype), int(np.unique(tensors[node.input[2]])[0]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    if target == "tensorrt":
        assert zero_points == {("int8", 0)}
    if target == "onnxruntime":
        assert {dtype for dtype, _ in zero_points} == {"uint8"}
        assert ("uint8", 128) in zero_points


def test_exported_batch_is_dynamic_whatever_b_says(exported):
    session = onnxruntime.InferenceSession(str(exported["onnxruntime"]), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(None, {"input": np.zeros((batch, 3, 32, 32), np.float32)})
        assert logits.shape == (batch, 3)


def test_default_output_is_named_after_the_model(exported):
    assert exported["tensorrt"].name == "efficientnet-quant-b0.onnx"
    assert names(exported["tensorrt"].parent) == ["efficientnet-quant-b0.onnx", "onnxruntime.onnx", "openvino.onnx"]


def top_of(output, image):
    """{class name: percent} as classify.py prints it."""
    first, *rest = output.splitlines()
    assert first == str(image)
    return {line.split("%")[1].strip(): float(line.split("%")[0]) for line in rest}


def test_classify_names_the_classes(run_script, image_folder, weights):
    image = image_folder / "val/bear/00.jpg"
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", weights[".safetensors"]]
    top = top_of(succeeded(run_script("classify.py", *model, "--image", image)).out, image)
    assert sorted(top) == CLASSES
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert sum(top.values()) == pytest.approx(100, abs=0.05)


def test_classify_numbers_the_classes_of_a_plain_state_dict(run_script, image_folder, weights):
    image = image_folder / "val/bear/00.jpg"
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", weights[".pth"], "--image-size", 32]
    top = top_of(succeeded(run_script("classify.py", *model, "--image", image)).out, image)
    assert sorted(top) == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "FP32"), ("openvino", "AMP")])
def test_classify_agrees_between_pytorch_and_engine(run_script, image_folder, tuned, exported, runtime, precision):
    image = image_folder / "val/cat/01.png"
    model = ["--arch", "efficientnet-quant-b0", "--pretrained-from-file", tuned / "model_best.pth.tar"]
    simulated = run_script("classify.py", *model, "--image", image, "--precision", precision)
    engine = ["--pretrained-from-file", exported[runtime], "--backend", runtime]
    run = run_script("classify.py", *engine, "--image", image)
    ours, theirs = (top_of(succeeded(result).out, image) for result in (simulated, run))
    assert ours.keys() == theirs.keys() == set(CLASSES)
    assert theirs == pytest.approx(ours, abs=1.0)  # percent, of a network that hardly prefers any class


def test_classify_takes_files_folders_and_standard_input(run_script, image_folder, weights, monkeypatch):
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", weights[".safetensors"]]
    folder, image = image_folder / "val/cat", image_folder / "val/bear/00.jpg"
    lines = succeeded(run_script("classify.py", *model, "--json", "--topk", 2, "-b", 3, "--image", folder, image)).out
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["image"] for row in rows] == [*map(str, sorted(folder.iterdir())), str(image)]
    assert all(len(row["top"]) == 2 for row in rows)
    with image.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        piped = json.loads(succeeded(run_script("classify.py", *model, "--json", "--image", "-")).out)
    assert piped["image"] == "-"
    assert piped["top"][0]["class"] == rows[-1]["top"][0]["class"]
    assert piped["top"][0]["probability"] == pytest.approx(rows[-1]["top"][0]["probability"], abs=1e-4)


def test_classify_names_what_it_could_not_read_and_goes_on(run_script, image_folder, weights, tmp_path):
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", weights[".safetensors"]]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    image = image_folder / "val/bear/00.jpg"
    result = run_script("classify.py", *model, "--image", broken, image)
    assert result.code == 2
    assert "broken.jpg is not an image or is damaged" in result.err
    assert result.out.splitlines()[0] == str(image)


@pytest.mark.parametrize("runtime", [pytest.param("onnxruntime", marks=pytest.mark.slow), "openvino"])
def test_verify_compares_engine_and_simulation(image_folder, tuned, exported, runtime, capsys):
    arguments = ["--model", str(tuned / "model_best.pth.tar"), "--engine", str(exported[runtime]), "--backend", runtime]
    gate = ["--min-agreement", "90", "--min-images", "18", "--layers", str(image_folder)]
    assert verify.job([*arguments, *gate]) == 0
    out = capsys.readouterr().out
    assert "images                     18" in out
    assert "the engine does what the simulation says on these 18 images, too few for 90 %; 35 images" in out
    assert "layers.6.block0.proj.conv._input_quantizer" in out
    assert verify.job([*arguments, "--min-agreement", "90", "--min-images", "1000", str(image_folder)]) == 1
    assert "18 images are fewer than 1000; give more" in capsys.readouterr().out


def test_verify_says_what_does_not_fit(weights, tuned, exported, image_folder, tmp_path):
    other = tmp_path / "other.onnx"
    export_onnx(create_model("cifar-resnet20", 7).eval(), other, 32)
    model = ["--arch", "efficientnet-b0", "--pretrained-from-file", str(weights[".safetensors"])]
    with pytest.raises(
        UserError, match=r"engine's outputs have the shape \(\d+, 7\) and the model's \(\d+, 3\); give the weights"
    ):
        verify.job([*model, "--engine", str(other), str(image_folder)])
    own = ["--model", str(tuned / "model_best.pth.tar"), "--engine", str(exported["onnxruntime"])]
    with pytest.raises(UserError, match="--batch-size must be at least 1"):
        verify.job([*own, "-b", "-3", str(image_folder)])


def test_verify_lints_graphs_for_tensorrt(exported, capsys):
    assert verify.job(["--lint", "tensorrt", "--engine", str(exported["tensorrt"])]) == 0
    assert "no findings" in capsys.readouterr().out
    assert verify.job(["--lint", "tensorrt", "--engine", str(exported["onnxruntime"])]) == 1
    assert "a zero point is not 0" in capsys.readouterr().out


def test_export_verifies_what_it_wrote(run_script, image_folder, tuned, tmp_path):
    model = ["--arch", "efficientnet-quant-b0", "--pretrained-from-file", tuned / "model_best.pth.tar"]
    output = ["--output", tmp_path / "model.onnx", "--verify", image_folder, "--min-agreement", 90, "--min-images", 18]
    assert "same class" in succeeded(run_script("model2onnx.py", *model, *output)).out
    refused = run_script("model2onnx.py", *model, *output, "--target", "tensorrt")
    assert refused.code == 2
    assert "--lint tensorrt" in refused.err

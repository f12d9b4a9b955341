"""How a network is quantized and fine-tuned, by the flags of the scripts."""

from __future__ import annotations

import json
import re
import shlex

import onnx
import pytest
import safetensors.torch
import torch

from effnet_quant import calibrate, create_model
from effnet_quant.engines.onnx_file import read_metadata
from effnet_quant.models.weights import write_weights
from effnet_quant.quantization.placement.insertion import quantizers

NETWORK = shlex.split(
    "--arch cifar-resnet20 --num-classes 3 --image-size 32 -b 6 --data-backend pytorch -j 0 --seed 1 --lr 0.01 --prof 1"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A float network's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    write_weights(path, create_model("cifar-resnet20", 3).state_dict())
    return path


def checkpoint_of(workspace):
    return torch.load(workspace / "checkpoint.pth.tar", weights_only=True)


def test_spec_overrides_and_training_flags_reach_the_checkpoint(run_script, image_folder, weights, tmp_path):
    page = tmp_path / "ranges.png"
    flags = shlex.split(
        f"--quant-spec w4a4-lsq --quant-override conv1=w8a8 --quant-override linear=float --distill {weights} "
        f"--gradual-start 1 --freeze-bn 1 --reestimate-bn --calibration-method mse --calibration-images 6 "
        f"--report {page.name}"
    )
    start = ["--pretrained-from-file", weights, "--epochs", 2, "--run-epochs", 1]
    result = run_script("quant_main.py", image_folder, *NETWORK, *flags, *start, "--workspace", tmp_path)
    assert result.code == 0, result.err
    spec = checkpoint_of(tmp_path)["metadata"]["quant_spec"]
    assert spec["weight"]["bits"] == spec["activation"]["bits"] == 4
    assert ["linear", None] in spec["overrides"]

    lines = [json.loads(line) for line in (tmp_path / "experiment_raport.json").read_text().splitlines()]
    ranges = {entry["name"]: entry for entry in lines[0]["data"]["calib.ranges"]}
    assert ranges["conv1._input_quantizer"]["grid"] == "int8, per tensor"
    assert ranges["layer1.0.conv1._input_quantizer"]["grid"] == "uint4, affine, per tensor, learned"
    assert "linear._input_quantizer" not in ranges
    assert all(0 <= entry["clipped"] < 0.5 and entry["sqnr"] > 5 for entry in ranges.values())
    assert page.read_bytes().startswith(b"\x89PNG")

    # the checkpoint knows the spec; the rest is the training's
    resumed = run_script(
        "quant_main.py", image_folder, *NETWORK, *flags[6:-4], "--resume", tmp_path / "checkpoint.pth.tar",
        "--epochs", 2, "--workspace", tmp_path
    )  # fmt: skip
    assert resumed.code == 0, resumed.err
    final = checkpoint_of(tmp_path)
    assert final["epoch"] == 2
    assert final["metadata"]["quant_spec"] == spec
    before = next(entry["chosen"][1] for entry in ranges.values() if entry["name"] == "layer1.0.conv1._input_quantizer")
    assert final["state_dict"]["layer1.0.conv1._input_quantizer._amax"].item() != before


def test_weights_carry_the_runtime_they_were_trained_for(run_script, image_folder, weights, tmp_path):
    def grid(path):
        model = create_model("cifar-resnet20", weights=path)
        return model.layer1[0].conv1._input_quantizer.spec.bounds

    def exported(path, target):
        model = ["--arch", "cifar-resnet20", "--pretrained-from-file", path]
        result = run_script("model2onnx.py", *model, "--target", target, "--output", tmp_path / "q.onnx")
        assert result.code == 0, result.err
        return result.out

    start = ["--pretrained-from-file", weights, "--epochs", 0, "--calibration-images", 6]
    for target, bounds in (("tensorrt", (-128, 127)), ("openvino", (0, 255))):
        result = run_script(
            "quant_main.py", image_folder, *NETWORK, *start, "--target", target, "--workspace", tmp_path / target
        )
        assert result.code == 0, result.err
        checkpoint = tmp_path / target / "checkpoint.pth.tar"
        assert checkpoint_of(tmp_path / target)["metadata"]["target"] == target
        assert grid(checkpoint) == bounds
        assert "note: these weights are for openvino" not in exported(checkpoint, "onnxruntime")
        assert ("note: these weights are for openvino" in exported(checkpoint, "tensorrt")) == (target == "openvino")
    resumed = ["--resume", checkpoint, "--target", "tensorrt", "--workspace", tmp_path / "openvino"]
    result = run_script("quant_main.py", image_folder, *NETWORK, *resumed)
    assert result.code == 2
    assert "goes on for openvino" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("hostile", ["tpu", ["x"], {"a": 1}, 7])
def test_a_target_that_means_nothing_is_refused(run_script, weights, tmp_path, hostile):
    model = calibrate(create_model("cifar-resnet20", 3, quantized=True).eval(), [torch.randn(2, 3, 32, 32)])
    said = {"effnet_quant": json.dumps({"quant_target": hostile})}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "q.safetensors", said)
    command = ["--arch", "cifar-resnet20", "--pretrained-from-file", tmp_path / "q.safetensors"]
    result = run_script("model2onnx.py", *command, "--output", tmp_path / "q.onnx")
    assert result.code == 2
    assert ("there is no target" if hostile == "tpu" else "target must be a name") in result.err


def test_weights_carry_their_spec_to_the_export(run_script, image_folder, weights, tmp_path):
    spec = tmp_path / "spec.yml"
    spec.write_text("preset: w8a8-affine\nweight: {axis: null}\noverrides:\n  layer3: w4a8\n")
    calibrate = ["--pretrained-from-file", weights, "--epochs", 0, "--quant-spec", spec, "--workspace", tmp_path]
    result = run_script("quant_main.py", image_folder, *NETWORK, *calibrate)
    assert result.code == 0, result.err
    stored = tmp_path / "quantized.safetensors"
    result = run_script(
        "checkpoint2model.py", "--checkpoint-path", tmp_path / "checkpoint.pth.tar", "--weight-path", stored
    )
    assert result.code == 0, result.err
    model = create_model("cifar-resnet20", weights=stored)
    grids = {name: quantizer.spec for name, quantizer in quantizers(model)}
    assert not grids["conv1._input_quantizer"].symmetric
    assert not grids["conv1._weight_quantizer"].per_channel
    assert grids["layer3.0.conv1._weight_quantizer"].bits == 4
    result = run_script(
        "model2onnx.py", "--arch", "cifar-resnet20", "--pretrained-from-file", stored, "--output", tmp_path / "q.onnx"
    )
    assert result.code == 0, result.err

    # ranges of other grids are not taken over
    other = ["--pretrained-from-file", stored, "--epochs", 0, "--quant-spec", "w4a4", "--workspace", tmp_path / "other"]
    result = run_script("quant_main.py", image_folder, *NETWORK, *other)
    assert result.code == 0, result.err
    assert "are for another quantization" in result.err
    assert "calibrated on" in result.out
    resumed = ["--resume", tmp_path / "other/checkpoint.pth.tar", "--quant-spec", "w8a8"]
    result = run_script("quant_main.py", image_folder, *NETWORK, *resumed, "--workspace", tmp_path / "other")
    assert result.code == 2
    assert "leave out --quant-spec" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quant-spec w1a1", "no quantization preset 'w1a1'"),
        ("--quant-spec missing.yml", "missing.yml can't be read"),
        ("--quant-override stem", "expected a pattern and a preset"),
        ("--quant-override stems=w8a8", "'stems' matches no quantizer"),
        ("--distill-weight 2", "between 0 and 1"),
        ("--distill-temperature 0", "above 0"),
        ("--freeze-bn -1", "0 or more"),
        ("--distill nowhere.pth", "no file nowhere.pth"),
        ("--report page.txt", "expected a file named"),
        ("--reestimate-bn --freeze conv1", "leave one of them out"),
    ],
)
def test_mistakes_end_with_a_sentence(run_script, image_folder, weights, tmp_path, flags, message):
    start = ["--pretrained-from-file", weights, "--epochs", 1, "--workspace", tmp_path / "new"]
    result = run_script("quant_main.py", image_folder, *NETWORK, *start, *shlex.split(flags))
    assert result.code == 2
    assert message in result.error_lines[0]
    assert not (tmp_path / "new" / "checkpoint.pth.tar").exists()


def test_a_loss_that_is_no_number_is_reported_with_the_quantizer_that_met_it(
    run_script, image_folder, weights, tmp_path
):
    start = ["--pretrained-from-file", weights, "--epochs", 1, "--training-only", "--workspace", tmp_path]
    flags = ["--prof", 2, "-b", 3, "--lr", 1e39, "--calibration-images", 6]
    result = run_script("quant_main.py", image_folder, *NETWORK, *start, *flags)
    assert result.code == 2
    (error,) = result.error_lines
    assert re.search(r"epoch 1, batch 2 \(NaN or infinity first met in conv1\._weight_quantizer\)", error)
    assert str(image_folder / "train") in error


TINY = shlex.split(
    "--arch timm:test_efficientnet --num-classes 3 --image-size 32 -b 6 --data-backend pytorch -j 0 --seed 1 --lr 0.01"
    " --prof 1"
)


@pytest.mark.slow
def test_hard_swish_is_known_to_all_that_follows(run_script, image_folder, tmp_path):
    arch = "timm:test_efficientnet"
    torch.manual_seed(0)
    given = tmp_path / "float.pth"  # says nothing of itself
    write_weights(given, create_model(arch, 3).state_dict())
    start = ["--pretrained-from-file", given, "--epochs", 1, "--calibration-images", 6, "--distill", given]
    result = run_script("quant_main.py", image_folder, *TINY, *start, "--hard-swish", "--workspace", tmp_path / "hard")
    assert result.code == 0, result.err
    checkpoint = tmp_path / "hard/checkpoint.pth.tar"
    assert checkpoint_of(tmp_path / "hard")["metadata"]["activation"] == "hard_swish"

    def operators(*flags, code=0):
        exported = run_script("model2onnx.py", "--arch", arch, *flags, "--output", tmp_path / "q.onnx")
        assert exported.code == code, exported.err
        model = onnx.load(tmp_path / "q.onnx")
        return {node.op_type for node in model.graph.node}, read_metadata(model)

    extracted = tmp_path / "hard.safetensors"
    assert run_script("checkpoint2model.py", "--checkpoint-path", checkpoint, "--weight-path", extracted).code == 0
    kinds, metadata = operators("--pretrained-from-file", extracted, "--target", "openvino")
    assert "HardSwish" in kinds
    assert metadata["activation"] == "hard_swish"
    verified = run_script(
        "model2onnx.py", "--arch", arch, "--pretrained-from-file", checkpoint, "--output", tmp_path / "v.onnx",
        "--verify", image_folder, "--min-images", 18, "--min-agreement", 90,
    )  # fmt: skip
    assert verified.code == 0, verified.out
    assert "HardSwish" in operators("--pretrained-from-file", given, "--hard-swish", "--num-classes", 3)[0]

    resume = ["--resume", checkpoint, "--epochs", 2, "--workspace", tmp_path / "hard"]
    assert run_script("quant_main.py", image_folder, *TINY, *resume).code == 0
    assert checkpoint_of(tmp_path / "hard")["metadata"]["activation"] == "hard_swish"


def test_ranges_of_another_activation_are_left_out(run_script, image_folder, tmp_path):
    torch.manual_seed(0)
    given = tmp_path / "float.pth"
    write_weights(given, create_model("timm:test_efficientnet", 3).state_dict())
    calibrated = ["--epochs", 0, "--calibration-images", 6, "--workspace", tmp_path]
    result = run_script("quant_main.py", image_folder, *TINY, "--pretrained-from-file", given, *calibrated)
    assert result.code == 0, result.err
    assert "activation" not in checkpoint_of(tmp_path)["metadata"]
    started = ["--pretrained-from-file", tmp_path / "checkpoint.pth.tar", "--hard-swish", *calibrated[:-1]]
    result = run_script("quant_main.py", image_folder, *TINY, *started, tmp_path / "hard")
    assert result.code == 0, result.err
    assert "are for another quantization" in result.err
    assert "calibrated on" in result.out

    resumed = run_script(
        "quant_main.py", image_folder, *TINY, "--resume", tmp_path / "checkpoint.pth.tar", "--hard-swish"
    )
    assert resumed.code == 2
    assert "leave out --hard-swish" in resumed.error_lines[0]
    without = run_script(
        "main.py", image_folder, *NETWORK, "--hard-swish", "--epochs", 1, "--workspace", tmp_path / "none"
    )
    assert without.code == 2
    assert without.error_lines == [
        "error: cifar-resnet20 has no SiLU that hard-swish could take the place of; leave it out."
    ]
    assert not (tmp_path / "none").exists()

"""What a weights file says of its model holds in every script, unless a flag says otherwise."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch

from effnet_quant import InputSpec, ModelCard, StartConfig, TrainConfig, create_model, train
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.jobs.config import DataConfig, PlaceConfig
from effnet_quant.jobs.run import open_run
from effnet_quant.models.weights import read_weights, write_weights

QUICK = shlex.split("-b 6 --data-backend pytorch -j 0 --seed 1 --lr 0.01 --prof 1")
CLASSES = ("apple", "bear", "cat")
INPUT = InputSpec(24, 30, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a float network for images of 24 px, with a card."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    card = ModelCard("cifar-resnet20", num_classes=3, classes=CLASSES, input=INPUT)
    write_weights(path, create_model("cifar-resnet20", 3).state_dict(), card)
    return path


@pytest.fixture(scope="module")
def calibrated(run_script, image_folder, weights, tmp_path_factory):
    """The result of quant_main.py that knows nothing but the file, and its checkpoint."""
    workspace = tmp_path_factory.mktemp("int8")
    flags = ["--pretrained-from-file", weights, "--epochs", 0, "--target", "openvino", "--workspace", workspace]
    return run_script("quant_main.py", image_folder, *QUICK, *flags), workspace / "checkpoint.pth.tar"


def succeeded(result):
    assert result.code == 0, result.err
    return result


def card_of(path):
    return read_weights(path).card


def test_evaluation_takes_arch_classes_and_images_from_the_file(run_script, image_folder, weights, tmp_path):
    def loss(*flags):
        start = ["--evaluate", "--pretrained-from-file", weights, "--workspace", tmp_path]
        result = succeeded(run_script("main.py", image_folder, *QUICK, *start, *flags))
        return re.search(r"val.loss ([\d.]+)", result.out).group(1), result.err

    by_file, said = loss()
    assert f"from {weights}: --arch cifar-resnet20, 3 classes, images of 24 px" in said
    same = ["--arch", "cifar-resnet20", "--num-classes", 3, "--image-size"]
    repeated, said = loss(*same, 24)
    assert repeated == by_file
    assert "from " not in said
    assert loss(*same, 32)[0] != by_file


def test_calibration_takes_arch_classes_and_images_from_the_file(calibrated):
    result, checkpoint = calibrated
    assert "--arch cifar-resnet20, 3 classes, images of 24 px" in succeeded(result).err
    card = card_of(checkpoint)
    assert (card.arch, card.num_classes, card.classes, card.input) == ("cifar-resnet20", 3, CLASSES, INPUT)


def test_export_and_classify_take_arch_and_target_from_the_file(run_script, image_folder, calibrated, tmp_path):
    _, checkpoint = calibrated
    output = tmp_path / "int8.onnx"
    exported = run_script("model2onnx.py", "--pretrained-from-file", checkpoint, "--output", output)
    assert "for openvino" in succeeded(exported).out
    card = read_onnx(output).card
    assert (card.arch, card.target, card.classes, card.input) == ("cifar-resnet20", "openvino", CLASSES, INPUT)
    image = next((image_folder / "val" / "bear").iterdir())
    result = run_script("classify.py", "--pretrained-from-file", checkpoint, "--image", image, "--json")
    assert {entry["class"] for entry in json.loads(succeeded(result).out)["top"]} == set(CLASSES)


def test_a_flag_wins_over_the_file(run_script, image_folder, weights, tmp_path):
    flags = ["--pretrained-from-file", weights, "--image-size", 32, "--epochs", 1, "--workspace", tmp_path]
    succeeded(run_script("main.py", image_folder, *QUICK, *flags))
    card = card_of(tmp_path / "checkpoint.pth.tar")
    assert card.input == INPUT.resized(32)


def test_a_float_efficientnet_stands_for_its_quantized_twin(run_script, image_folder, tmp_path):
    path = tmp_path / "b0.safetensors"
    card = ModelCard("efficientnet-b0", num_classes=3, classes=CLASSES, input=InputSpec(32, 40))
    write_weights(path, create_model("efficientnet-b0", 3).state_dict(), card)
    result = run_script(
        "quant_main.py", image_folder, *QUICK, "--epochs", 0, "--pretrained-from-file", path, "--workspace", tmp_path
    )
    assert "--arch efficientnet-quant-b0" in succeeded(result).err
    assert card_of(tmp_path / "checkpoint.pth.tar").input == InputSpec(32, 40)


def test_the_data_gives_the_number_of_classes(run_script, image_folder, tmp_path):
    flags = ["--arch", "cifar-resnet20", "--image-size", 24, "--epochs", 1, "--workspace", tmp_path]
    succeeded(run_script("main.py", image_folder, *QUICK, *flags))
    assert card_of(tmp_path / "checkpoint.pth.tar").classes == CLASSES


def test_training_on_other_classes_starts_a_new_classifier_with_a_note(run_script, image_folder, tmp_path):
    path = tmp_path / "ten.safetensors"
    write_weights(path, create_model("cifar-resnet20").state_dict(), ModelCard("cifar-resnet20", num_classes=10))
    start = ["--pretrained-from-file", path, "--workspace", tmp_path / "runs"]
    result = run_script("main.py", image_folder, *QUICK, *start, "--epochs", 1)
    assert "is for 10 classes; the classifier starts anew" in succeeded(result).err
    for script, flag in (("main.py", ["--evaluate"]), ("quant_main.py", ["--epochs", 0])):
        refused = run_script(script, image_folder, *QUICK, *start, *flag)
        assert refused.code == 2
        assert refused.error_lines[0].endswith(
            f"ten.safetensors has 10 classes, but {image_folder} has 3; give data of these classes, or train a new "
            "classifier with main.py."
        )


def test_labels_count_the_classes_of_the_weights(image_folder, weights, tmp_path):
    """A validation folder that lacks a class, and a file whose classes are in another order."""
    part = tmp_path / "part"
    shutil.copytree(image_folder / "val" / "bear", part / "val" / "bear")
    config = TrainConfig(batch_size=6, workers=0, seed=1)
    start = StartConfig(weights=str(weights))
    with open_run(ModelCard(), DataConfig(str(part)), config, PlaceConfig(str(tmp_path)), start, evaluate=True) as run:
        assert run.card.classes == CLASSES
        assert {int(label) for _, labels in run.val.epoch() for label in labels} == {CLASSES.index("bear")}
    turned = tmp_path / "turned.safetensors"
    card = ModelCard("cifar-resnet20", num_classes=3, classes=CLASSES[::-1], input=INPUT)
    write_weights(turned, read_weights(weights).tensors, card)
    data = DataConfig(str(image_folder))
    with open_run(ModelCard(), data, config, PlaceConfig(str(tmp_path)), StartConfig(weights=str(turned))) as run:
        assert run.card.classes == CLASSES[::-1]


def test_python_listens_to_the_card_too(image_folder, weights, tmp_path):
    config = TrainConfig(epochs=1, batch_size=6, workers=0, seed=1, prof=1)
    place = PlaceConfig(str(tmp_path))
    card = train(ModelCard(), str(image_folder), config, place, StartConfig(weights=str(weights)))
    assert (card.arch, card.input) == ("cifar-resnet20", INPUT)


def test_a_file_without_a_card_needs_the_arch(run_script, tmp_path):
    path = tmp_path / "plain.pth"
    write_weights(path, create_model("cifar-resnet20").state_dict())
    refused = run_script("model2onnx.py", "--pretrained-from-file", path)
    assert refused.error_lines == [f"error: which model is it? {path} does not say; give its name with --arch."]


def test_weights_of_another_arch_are_refused_with_the_right_one(run_script, image_folder, weights, tmp_path):
    flags = ["--arch", "cifar-resnet32", "--evaluate", "--pretrained-from-file", weights, "--workspace", tmp_path]
    refused = run_script("main.py", image_folder, *QUICK, *flags)
    assert refused.error_lines[0].endswith("; it is for cifar-resnet20, so check --arch.")

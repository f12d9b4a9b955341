"""Tensors that no network computes with are refused where they are read, by every script and before anything is written."""

from __future__ import annotations

import pytest
import torch

from effnet_quant import calibrate, create_model
from effnet_quant.card import ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.foreign_tensors import check_tensors
from effnet_quant.models.weights import Weights, load_weights, read_weights, write_weights

ARCH = "cifar-resnet20"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return create_model(ARCH, 3).state_dict()


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    model = create_model(ARCH, 3, quantized=True)
    return calibrate(model, [torch.randn(2, 3, 32, 32)], method="max").state_dict()


def with_first(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


HOSTILE = {
    "NaN": ("conv1.weight", lambda t: with_first(t, torch.nan), "conv1.weight holds NaN or infinity"),
    "infinity": ("conv1.weight", lambda t: with_first(t, torch.inf), "conv1.weight holds NaN or infinity"),
    "NaN statistics": ("bn1.running_mean", lambda t: with_first(t, torch.nan), "holds NaN"),
    "negative variance": ("bn1.running_var", lambda t: -t - 1, "bn1.running_var holds a negative variance"),
    "complex": ("conv1.weight", lambda t: t.to(torch.complex64), "conv1.weight holds complex numbers"),
    "no classes": ("linear.weight", lambda t: t[:0], "linear.weight holds no numbers"),
    "sparse": ("conv1.weight", lambda t: t.to_sparse(), "conv1.weight is sparse"),
    "without values": ("conv1.weight", lambda t: t.to("meta"), "conv1.weight is .*without values"),
    "a giant": ("conv1.weight", lambda t: torch.zeros(1).expand(10**6, 10**6), "conv1.weight repeats a few numbers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tensor_that_no_network_computes_with_is_named(tmp_path, state, name):
    entry, change, says = HOSTILE[name]
    path = tmp_path / "hostile.pth"
    torch.save({**state, entry: change(state[entry])}, path)
    with pytest.raises(UserError, match=rf"hostile\.pth can't be used: .*{says}"):
        read_weights(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_floating_point_types_are_taken(tmp_path, state, kind):
    path = tmp_path / "other.safetensors"
    write_weights(path, {name: t.to(kind) if t.is_floating_point() else t for name, t in state.items()})
    model = create_model(ARCH, 3)
    assert load_weights(model, read_weights(path))
    assert torch.equal(model.conv1.weight, state["conv1.weight"].to(kind).float())


@pytest.mark.parametrize("content", [None, [], {}, {"a": 1}, {"a": {"b": torch.ones(1)}}])
def test_what_is_no_state_dict_is_refused(content):
    with pytest.raises(UserError, match=r"w\.pth holds no weights"):
        check_tensors(content, "w.pth")


def test_names_that_are_no_text_are_refused():
    with pytest.raises(UserError, match="the name of a tensor is 3, which is no text"):
        check_tensors({3: torch.ones(1)}, "w.pth")


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_float_weights_stored_as_integers_are_refused(state, kind):
    model = create_model(ARCH, 3)
    with pytest.raises(UserError, match=r"1 stored as integers \(conv1\.weight\)"):
        load_weights(model, Weights({**state, "conv1.weight": state["conv1.weight"].to(kind)}))


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("conv1._input_quantizer._amax", lambda t: -t),
        ("conv1._weight_quantizer._amax", lambda t: with_first(t, -1)),
    ],
)
def test_negative_ranges_are_refused(calibrated, entry, change):
    with pytest.raises(UserError, match=rf"{entry} is no upper end of a range; calibrate"):
        load_weights(create_model(ARCH, 3, quantized=True), Weights({**calibrated, entry: change(calibrated[entry])}))


def test_swapped_ends_of_an_output_are_refused(calibrated):
    entry = next(name for name in calibrated if name.endswith("._low"))
    high = entry.replace("._low", "._high")
    swapped = {**calibrated, entry: calibrated[high] + 1}
    with pytest.raises(UserError, match="is no upper end of a range"):
        load_weights(create_model(ARCH, 3, quantized=True), Weights(swapped))


def test_learned_ranges_may_pass_zero_in_training(tmp_path):
    torch.manual_seed(0)
    model = create_model(ARCH, 3, quantized=True, quant_spec="w8a8-lsq")
    calibrate(model, [torch.randn(2, 3, 32, 32)], method="max")
    state = model.state_dict()
    entry = "conv1._weight_quantizer._amax"
    state[entry] = with_first(state[entry], -1e-3)
    assert load_weights(create_model(ARCH, 3, quantized=True, quant_spec="w8a8-lsq"), Weights(state))


def test_infinite_ranges_are_refused_and_missing_ones_are_not(tmp_path, calibrated):
    entry = "conv1._input_quantizer._amax"
    write_weights(tmp_path / "w.safetensors", {**calibrated, entry: torch.tensor(torch.nan)})
    assert read_weights(tmp_path / "w.safetensors").has_ranges
    write_weights(tmp_path / "w.safetensors", {**calibrated, entry: torch.tensor(torch.inf)})
    with pytest.raises(UserError, match=f"{entry} holds NaN or infinity"):
        read_weights(tmp_path / "w.safetensors")


def test_a_card_with_more_classes_than_the_weights_is_refused_before_a_network_is_built(tmp_path, state):
    write_weights(tmp_path / "w.safetensors", state, ModelCard(arch=ARCH, num_classes=10**7))
    with pytest.raises(UserError, match="it names 10000000 classes, and no layer has so many"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("script", ["classify.py", "model2onnx.py", "main.py", "quant_main.py"])
def test_every_script_refuses_nan_and_writes_nothing(run_script, tmp_path, image_folder, state, script):
    path, output = tmp_path / "nan.safetensors", tmp_path / "output"
    output.mkdir()
    write_weights(path, {**state, "conv1.weight": with_first(state["conv1.weight"], torch.nan)})
    arguments = {
        "classify.py": ["--image", image_folder / "val/cat/00.jpg"],
        "model2onnx.py": ["--output", output / "model.onnx"],
    }.get(script, [image_folder, "--data-backend", "pytorch", "-j", 0, "--workspace", output])
    result = run_script(script, "--arch", ARCH, "--num-classes", 3, "--pretrained-from-file", path, *arguments)
    assert (result.code, len(result.error_lines)) == (2, 1), result.err
    assert "conv1.weight holds NaN or infinity" in result.err
    assert list(output.iterdir()) == []


def test_a_range_of_zero_is_said(run_script, tmp_path, image_folder, calibrated):
    path, entry = tmp_path / "w.safetensors", "conv1._input_quantizer._amax"
    write_weights(path, {**calibrated, entry: torch.tensor(0.0)}, ModelCard(arch=ARCH, num_classes=3))
    image = image_folder / "val/cat/00.jpg"
    result = run_script("classify.py", "--arch", ARCH, "--pretrained-from-file", path, "--image", image)
    assert result.code == 0, result.err
    assert f"note: 1 ranges in {path} are 0, so all values there become 0 ({entry})" in result.err

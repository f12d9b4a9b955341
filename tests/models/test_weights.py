"""Weights files: names and shapes they come with, and what is refused."""

from __future__ import annotations

import os
import pickle
import re
import warnings

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.errors import UserError
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, load_weights, read_torch_file, read_weights, write_weights
from effnet_quant.quantization.placement.insertion import quantizers

CLASSES = 4
CARD = ModelCard(arch="efficientnet-b0", classes=("a", "b", "c", "d"), input=InputSpec(32, 36))


@pytest.fixture(scope="module")
def published():
    """The float model's state dict, filled with other values than any new model has."""
    torch.manual_seed(11)
    state = create_model("efficientnet-b0", CLASSES).state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}


@pytest.fixture(scope="module")
def published_quantized(published):
    """The quantized model's, with ranges."""
    model = create_model("efficientnet-quant-b0", CLASSES)
    load_weights(model, Weights(published))
    return {name: torch.full_like(t, 2.0) if name.endswith("_amax") else t for name, t in model.state_dict().items()}


@pytest.fixture
def model():
    return create_model("efficientnet-b0", CLASSES)


@pytest.fixture
def quantized():
    return create_model("efficientnet-quant-b0", CLASSES)


def assert_holds(model, tensors):
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.reshape(state[name].shape)), name


def test_own_names_load(model, published):
    assert load_weights(model, Weights(published)) is True
    assert_holds(model, published)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(model, published, prefix):
    assert load_weights(model, Weights({prefix + name: tensor for name, tensor in published.items()})) is True
    assert_holds(model, published)


def test_stages_may_be_called_layer1_to_layer7(model, published):
    renamed = {
        re.sub(r"^layers\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", name): tensor
        for name, tensor in published.items()
    }
    assert "layer1.block0.depsep.conv.weight" in renamed
    assert "layer7.block0.proj.bn.bias" in renamed
    assert not any(name.startswith("layers.") for name in renamed)
    assert load_weights(model, Weights(renamed)) is True
    assert_holds(model, published)


def test_squeeze_and_excitation_is_accepted_as_linear_layers_and_as_convolutions(published):
    linear = create_model("efficientnet-b0", CLASSES)
    convolution = create_model("efficientnet-b0", CLASSES, se_as_conv=True)
    name = "layers.1.block0.se.squeeze.weight"
    assert published[name].shape == (4, 96)
    load_weights(convolution, Weights(published))
    assert convolution.state_dict()[name].shape == (4, 96, 1, 1)
    assert_holds(convolution, published)
    load_weights(linear, Weights(convolution.state_dict()))
    assert_holds(linear, published)


def test_both_forms_compute_the_same(published):
    linear = create_model("efficientnet-b0", CLASSES).eval()
    convolution = create_model("efficientnet-b0", CLASSES, se_as_conv=True).eval()
    state = {**linear.state_dict()}
    load_weights(convolution, Weights(state))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(convolution(images), linear(images), rtol=1e-4, atol=1e-5)


def test_float_weights_leave_a_quantized_model_without_ranges(quantized, published):
    assert load_weights(quantized, Weights(published)) is False
    assert_holds(quantized, published)
    ranges = [tensor for name, tensor in quantized.state_dict().items() if name.endswith("_amax")]
    assert len(ranges) > 200
    assert all(tensor.isnan().all() for tensor in ranges)


def test_quantized_weights_bring_their_ranges(quantized, published_quantized):
    assert load_weights(quantized, Weights(published_quantized)) is True
    assert_holds(quantized, published_quantized)


def test_quantized_weights_drop_their_ranges_in_a_float_model(model, published, published_quantized):
    assert load_weights(model, Weights(published_quantized)) is True
    assert_holds(model, published)


def test_uncalibrated_ranges_are_none(quantized, published_quantized):
    unset = {
        name: torch.full_like(tensor, torch.nan) if name.endswith("_amax") else tensor
        for name, tensor in published_quantized.items()
    }
    assert load_weights(quantized, Weights(unset)) is False


def test_half_a_set_of_ranges_is_refused(quantized, published_quantized):
    left_out = "layers.2.block1.residual_quantizer._amax"
    some = {name: tensor for name, tensor in published_quantized.items() if name != left_out}
    with pytest.raises(UserError, match=f"1 missing .{re.escape(left_out)}"):
        load_weights(quantized, Weights(some))


def test_missing_unexpected_and_reshaped_entries_are_named_and_nothing_is_loaded(model, published):
    wrong = dict(published)
    del wrong["stem.bn.bias"]
    wrong["stem.extra"] = torch.zeros(1)
    wrong["features.conv.weight"] = torch.zeros(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as refusal:
        load_weights(model, Weights(wrong, source="odd.pth"))
    sentence = str(refusal.value)
    assert sentence.startswith("odd.pth does not fit the model")
    assert "1 missing (stem.bn.bias)" in sentence
    assert "1 unexpected (stem.extra)" in sentence
    assert "1 of another shape (features.conv.weight)" in sentence
    assert_holds(model, before)


def test_long_lists_of_names_are_cut_short(model):
    with pytest.raises(UserError, match=r"311 missing \(stem\.conv\.weight, [^,]+, [^,]+, …\)"):
        load_weights(model, Weights({"nothing.of.this": torch.zeros(1)}))


@pytest.mark.parametrize("arch", ["efficientnet-b0", "efficientnet-quant-b0"])
def test_another_class_count_names_both_and_the_way_out(published, arch):
    with pytest.raises(UserError, match=r"four\.pth has 4 classes, but the model has 7; pass --num-classes 4"):
        load_weights(create_model(arch, 7), Weights(published, source="four.pth"))


@pytest.mark.parametrize(
    "arch", ["efficientnet-quant-b0", "cifar-resnet20", "timm:vgg11_bn", "torchvision:squeezenet1_0"]
)
def test_the_class_count_is_the_classifiers_whatever_its_name(arch):
    with torch.device("meta"):
        state = get_entry(arch).create(7).state_dict()
    assert get_entry(arch).class_count(Weights(state)) == 7
    assert get_entry(arch).class_count(Weights({}, ModelCard(num_classes=5))) == 5
    assert get_entry(arch).class_count(Weights({"nothing.of.this": torch.zeros(3)})) == get_entry(arch).num_classes


def test_a_new_classifier_is_made_only_when_asked(published_quantized):
    other = create_model("efficientnet-quant-b0", 7)
    before = other.classifier.fc.weight.clone()
    assert load_weights(other, Weights(published_quantized), new_classifier=True) is False
    assert torch.equal(other.classifier.fc.weight, before)
    assert torch.equal(other.stem.conv.weight, published_quantized["stem.conv.weight"])
    assert not any(quantizer.calibrated for _, quantizer in quantizers(other))


def test_a_new_classifier_excuses_nothing_else(published):
    wrong = {name: tensor for name, tensor in published.items() if name != "stem.bn.bias"}
    with pytest.raises(UserError, match=r"1 missing \(stem\.bn\.bias\)"):
        load_weights(create_model("efficientnet-b0", 7), Weights(wrong), new_classifier=True)
    wrong = {**published, "features.conv.weight": torch.zeros(7, 320, 1, 1)}
    with pytest.raises(UserError, match=r"3 of another shape"):
        load_weights(create_model("efficientnet-b0", 7), Weights(wrong), new_classifier=True)


def test_quantizers_of_linear_squeeze_excitation_take_the_ranges_of_convolutions(published_quantized):
    linear = create_model("efficientnet-quant-b0", CLASSES, se_as_conv=False)
    assert linear.state_dict()["layers.1.block0.se.squeeze._weight_quantizer._amax"].shape == (4, 1)
    assert load_weights(linear, Weights(published_quantized)) is True
    assert_holds(linear, published_quantized)


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_a_checkpoints_moving_average_is_read_when_asked_for(tmp_path, key):
    checkpoint = {"epoch": 1, "state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    weights = read_weights(tmp_path / "c.pth.tar", ema=key == "state_dict_ema")
    assert weights.tensors == checkpoint[key]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_without_a_moving_average_is_named(tmp_path, suffix):
    write_weights(tmp_path / f"w{suffix}", {"a": torch.ones(2)})
    with pytest.raises(UserError, match=rf"w\{suffix} holds no moving average.*--ema"):
        read_weights(tmp_path / f"w{suffix}", ema=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip_keeps_every_bit(tmp_path, published, suffix):
    path = tmp_path / f"weights{suffix}"
    write_weights(path, published, CARD)
    weights = read_weights(path)
    assert weights.tensors.keys() == published.keys()
    for name, tensor in published.items():
        assert weights.tensors[name].dtype == tensor.dtype
        assert torch.equal(weights.tensors[name], tensor)
    assert weights.source == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_safetensors_carry_the_metadata(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)}, CARD)
    assert read_weights(tmp_path / "w.safetensors").card == CARD


def test_safetensors_of_other_tools_have_no_metadata(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").card == ModelCard()


def test_pth_is_a_plain_state_dict_for_other_tools(tmp_path):
    write_weights(tmp_path / "w.pth", {"a": torch.ones(2)}, CARD)
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(loaded) == ["a"]
    assert torch.equal(loaded["a"], torch.ones(2))


def test_transposed_tensors_are_written(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3)
    for suffix in (".safetensors", ".pth"):
        write_weights(tmp_path / f"w{suffix}", {"a": matrix.T})
        assert torch.equal(read_weights(tmp_path / f"w{suffix}").tensors["a"], matrix.T)


def test_unknown_extension_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"w\.bin.*\.safetensors or \.pth"):
        write_weights(tmp_path / "w.bin", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_nvidias_scripts_holds_weights(tmp_path, model, published):
    path = tmp_path / "nvidia.pth.tar"
    optimizer = torch.optim.SGD(create_model("efficientnet-b0", CLASSES).parameters(), lr=0.1)
    state = {f"module.{name}": tensor for name, tensor in published.items()}
    torch.save(
        {"epoch": 400, "best_prec1": 77.1, "state_dict": state, "optimizer": optimizer.state_dict()},
        path,
    )
    weights = read_weights(path)
    assert weights.card == ModelCard()
    assert load_weights(model, weights) is True
    assert_holds(model, published)


def test_checkpoint_of_ours_brings_its_metadata(tmp_path):
    torch.save({"epoch": 1, "state_dict": {"a": torch.ones(2)}, "metadata": CARD.to_json()}, tmp_path / "c.pth.tar")
    weights = read_weights(tmp_path / "c.pth.tar")
    assert weights.card == CARD


def test_files_of_the_old_pytorch_format_load(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth").tensors["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1, 2], {"state_dict": {"a": "text"}}, {"epoch": 3}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth holds no weights"):
        read_weights(tmp_path / "odd.pth")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_hostile_object_is_hostile(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_not_executed(tmp_path, zipped):
    path = tmp_path / "evil.pth"
    content = {"state_dict": {"a": torch.ones(2)}, "epoch": 1, "x": Hostile(tmp_path / "marker")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pth is refused: .*mkdir.*\.safetensors"):
        read_weights(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_hostile_bare_pickle_is_refused_and_not_executed(tmp_path, protocol):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "marker"), protocol))
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"evil\.pth"):
        warnings.simplefilter("ignore")  # torch's, that other pickle protocols may not load
        read_weights(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", [Hostile("marker"), {"a": 1}, [1, 2]])
def test_a_bare_pickle_is_refused_without_words_of_torchs(tmp_path, protocol, content):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(content, protocol))
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError, match=r"bare\.pth"):
        warnings.simplefilter("always")
        read_weights(tmp_path / "bare.pth")
    assert said == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_named(tmp_path, published, suffix, share):
    path = tmp_path / f"short{suffix}"
    write_weights(path, {name: published[name] for name in list(published)[:40]}, CARD)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=rf"short\{suffix} is .*damaged.*get it again"):
        read_weights(path)


def test_file_of_the_old_pytorch_format_cut_anywhere_is_named(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings(), pytest.raises(UserError, match=r"old\.pth"):
            warnings.simplefilter("ignore")
            read_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pth.tar"])
@pytest.mark.parametrize(
    "content",
    [b"<html>not found</html>\n", b"PK\x03\x04 no archive", b"\x80\x05."],
    ids=["web page", "broken archive", "empty pickle"],
)
def test_another_kind_of_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(UserError, match=rf"page\{suffix} is .*get it again"):
        warnings.simplefilter("ignore")
        read_weights(path)


def test_missing_file_is_named(tmp_path):
    for read in (read_weights, read_torch_file):
        with pytest.raises(UserError, match=r"no file .*nowhere\.pth"):
            read(tmp_path / "nowhere.pth")

"""ONNX files whose parts contradict each other, or point elsewhere, are refused before a runtime sees them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from effnet_quant import export_onnx, load_engine
from effnet_quant.card import CARD_KEY, EXTRA_KEY, InputSpec, ModelCard
from effnet_quant.engines.onnx_file import load_onnx, read_onnx
from effnet_quant.errors import UserError

SIZE = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "good.onnx"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    export_onnx(model, path, SIZE, card=ModelCard(input=InputSpec(SIZE, SIZE)))
    return path


@pytest.fixture
def changed(exported, tmp_path):
    """Writes the good file with a change: change(model) -> path."""

    def write(change):
        model = onnx.load(exported)
        change(model)
        (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "changed.onnx"

    return write


def largest(model):
    return max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))


def with_dims(*dims):
    def change(model):
        del largest(model).dims[:]
        largest(model).dims.extend(dims)

    return change


@pytest.mark.parametrize("dims", [(2**40,), (-4, 3, 3, 3), (4, 3, 3), (0,), (2**62, 4), (1,) * 300])
def test_dimensions_that_promise_other_numbers_are_refused(changed, dims):
    with pytest.raises(UserError, match=r"changed\.onnx is truncated, damaged"):
        read_onnx(changed(with_dims(*dims)))


def test_dimensions_in_nodes_and_inner_graphs_are_looked_at(changed):
    def change(model):
        lying = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[7], raw_data=b"1234")
        inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=lying)], "inner", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))

    with pytest.raises(UserError, match="damaged"):
        read_onnx(changed(change))


def outside(location, offset=0, length=16):
    def change(model):
        tensor = largest(model)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)

    return change


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "gone.bin", ".", "link.bin"])
def test_weights_outside_the_files_folder_are_not_read(changed, tmp_path, location):
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path.parent / "secret.bin").write_bytes(b"0" * 10_000)
    with pytest.raises(UserError, match=r"has its numbers in .*, which is no file beside the ONNX file"):
        load_onnx(changed(outside(location)))


@pytest.mark.parametrize(("offset", "length"), [(0, 2**50), (-8, 16), ("x", 16), (10_000, 1), (0, 17)])
def test_weights_beyond_the_end_of_their_file_are_refused(changed, tmp_path, offset, length):
    (tmp_path / "weights.bin").write_bytes(b"0" * 10_000)
    with pytest.raises(UserError, match="damaged"):
        load_onnx(changed(outside("weights.bin", offset, length)))


def test_weights_in_a_file_beside_are_read(exported, tmp_path):
    onnx.save(onnx.load(exported), tmp_path / "split.onnx", save_as_external_data=True, size_threshold=0)
    assert len(list(tmp_path.iterdir())) == 2
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(exported).graph.initializer}
    read = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in load_onnx(tmp_path / "split.onnx").graph.initializer
    }
    assert all(np.array_equal(read[name], values) for name, values in expected.items())
    images = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), np.float32)
    np.testing.assert_array_equal(load_engine(tmp_path / "split.onnx")(images), load_engine(exported)(images))


def test_lint_does_not_read_weights_outside_the_folder_either(run_script, changed):
    result = run_script(
        "effnet_quant/__main__.py", "verify", "--engine", changed(outside("../secret")), "--lint", "tensorrt"
    )
    assert (result.code, len(result.error_lines)) == (2, 1), result.err


@pytest.mark.parametrize("size", ['"abc"', "-1", "0", "1e999", "NaN", "[1]", "{}", "true", "1.5", "10000000000"])
def test_an_image_size_that_is_none_is_refused(changed, size):
    def change(model):
        onnx.helper.set_model_props(model, {EXTRA_KEY: f'{{"image_size": {size}}}'})

    with pytest.raises(UserError, match="damaged"):
        load_engine(changed(change))


def test_a_card_of_other_channels_than_the_graph_is_refused(changed):
    def change(model):
        card = ModelCard(input=InputSpec(SIZE, SIZE, mean=(0.5,) * 4, std=(0.5,) * 4)).to_json()
        onnx.helper.set_model_props(model, {CARD_KEY: json.dumps(card)})

    with pytest.raises(UserError, match="takes images of 3 channels, and its card has mean and std of 4"):
        load_engine(changed(change))


@pytest.mark.parametrize("field", ["input", "output", "attribute"])
@pytest.mark.parametrize("operator", ["QuantizeLinear", "Conv", "Constant"])
def test_a_node_without_its_parts_is_refused(changed, operator, field):
    value = onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [1.0])
    parts = {"input": ["x", "s"], "output": ["y"], "attribute": [onnx.helper.make_attribute("value", value)]}
    if operator == "Constant":
        parts["input"] = []
    node = onnx.NodeProto(op_type=operator, **{**parts, field: []})
    needed = field in ("output", "attribute" if operator == "Constant" else "input")

    path = changed(lambda model: model.graph.node.append(node))
    if needed:
        with pytest.raises(UserError, match="damaged"):
            load_onnx(path)
    else:
        assert load_onnx(path).graph.node[-1] == node

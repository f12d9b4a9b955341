"""Models with several inputs and outputs: the engine takes the model's arguments and returns what the model returns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effnet_quant import UserError, load_engine
from effnet_quant.card import CARD_KEY, SIGNATURE_KEY
from effnet_quant.checks.latency import measure_engines
from effnet_quant.engines.onnx_file import read_onnx

BACKENDS = ("onnxruntime", "openvino")
STRUCTURE = {"dict": {"scores": 1, "both": {"tuple": [0, {"list": [2]}]}}}


def write_scorer(
    path: Path, batch: int | None = None, structure: Any = STRUCTURE, **changes: Any
) -> tuple[Path, dict[str, Any]]:
    """A model of images and tokens: (sum of embedded tokens, mean of the image times a weight, tokens + 1).

    The graph lists its inputs and outputs in another order than the model's arguments. ``changes`` replace parts of what
    the file says of itself.
    """
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    size: int | str = batch or "batch"
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, [size, 5]),
        helper.make_tensor_value_info("weight", TensorProto.FLOAT16, [size]),
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [size, 2, 4, 6]),
    ]
    outputs = [
        helper.make_tensor_value_info("next", TensorProto.INT64, [size, 5]),
        helper.make_tensor_value_info("means", TensorProto.FLOAT, [size]),
        helper.make_tensor_value_info("sums", TensorProto.FLOAT, [size, 3]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("ReduceSum", ["embedded", "axis"], ["sums"], keepdims=0),
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Cast", ["weight"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["mean", "factor"], ["means"]),
        helper.make_node("Add", ["tokens", "one"], ["next"]),
    ]
    constants = {"table": table, "axis": np.array([1], np.int64), "one": np.array(1, np.int64)}
    graph = helper.make_graph(
        nodes, "scorer", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    said = {
        "inputs": [
            {"name": "image", "dtype": "float32", "shape": [batch, 2, 4, 6]},
            {"name": "tokens", "dtype": "int64", "shape": [batch, 5]},
            {"name": "weight", "dtype": "float16", "shape": [batch]},
        ],
        "outputs": [
            {"name": "sums", "dtype": "float32"},
            {"name": "means", "dtype": "float32"},
            {"name": "next", "dtype": "int64"},
        ],
        "structure": structure,
        **changes,
    }
    helper.set_model_props(model, {SIGNATURE_KEY: json.dumps(said)})
    onnx.save(model, path)
    return path, said


def arguments(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(count)
    return [
        generator.standard_normal((count, 2, 4, 6)).astype(np.float32),
        generator.integers(0, 4, (count, 5)),
        generator.standard_normal(count).astype(np.float16),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [None, 4])
def test_an_engine_returns_the_models_own_structure(backend: str, batch: int | None, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    engine = load_engine(write_scorer(tmp_path / "scorer.onnx", batch)[0], backend)
    assert [(value.name, value.dtype, value.shape) for value in engine.inputs] == [
        ("image", "float32", (2, 4, 6)),
        ("tokens", "int64", (5,)),
        ("weight", "float16", ()),
    ]
    assert {(value.smallest_batch, value.largest_batch) for value in engine.inputs} == {(batch or 1, batch)}
    for count in (1, 4, 6, 9):
        image, tokens, weight = arguments(count)
        result = engine(image, tokens, weight)
        assert list(result) == ["scores", "both"]
        assert isinstance(result["both"], tuple)
        sums, (following,) = result["both"]
        # row t of the table is 3t, 3t + 1, 3t + 2
        expected = 3.0 * tokens.sum(1)[:, None] + 5 * np.arange(3)
        assert np.array_equal(sums, expected)
        np.testing.assert_allclose(result["scores"], image.mean((1, 2, 3)) * weight, rtol=1e-5, atol=1e-7)
        assert following.dtype == np.int64
        assert np.array_equal(following, tokens + 1)


@pytest.mark.parametrize(("structure", "kind"), [(1, np.ndarray), ({"list": [0, 2]}, list), ({"tuple": [2]}, tuple)])
def test_arrays_lists_and_tuples(structure: Any, kind: type, tmp_path: Path) -> None:
    engine = load_engine(write_scorer(tmp_path / "scorer.onnx", structure=structure)[0])
    assert type(engine(*arguments(3))) is kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_inputs_are_warmed_up_and_timed(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    engine = load_engine(write_scorer(tmp_path / "scorer.onnx")[0], backend)
    engine.warm_up(3)
    example = engine.example_inputs(2)
    assert [(array.dtype.name, array.shape) for array in example] == [
        ("float32", (2, 2, 4, 6)),
        ("int64", (2, 5)),
        ("float16", (2,)),
    ]
    assert set(np.unique(example[1])) <= {0, 1}
    ((latency,),) = measure_engines([engine], [2], seconds=0.01)
    assert latency.p50 > 0


def test_wrong_arguments_are_one_sentence(tmp_path: Path) -> None:
    engine = load_engine(write_scorer(tmp_path / "scorer.onnx")[0])
    image, tokens, weight = arguments(3)
    with pytest.raises(UserError, match=r"takes 3 arrays \(image, tokens, weight\), not 1"):
        engine(image)
    with pytest.raises(UserError, match=r"the input 'tokens' of shape \(N, 5\), not \(3, 4\)"):
        engine(image, tokens[:, :4], weight)
    with pytest.raises(UserError, match="the input 'tokens' as int64, not float64"):
        engine(image, tokens * 1.0, weight)
    with pytest.raises(UserError, match="batches of 3, 2, 3; give all inputs the same batch"):
        engine(image, tokens[:2], weight)
    with pytest.raises(UserError, match=r"onnxruntime can't run .*scorer\.onnx: .*; check the arrays"):
        engine(image, tokens + 1000, weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": 3},
        {"structure": -1},
        {"structure": True},
        {"structure": {"tuple": 0}},
        {"structure": {"set": [0]}},
        {"structure": {"tuple": [0], "list": [1]}},
        {"structure": "logits"},
        {"inputs": []},
        {"inputs": "image"},
        {"outputs": [{"name": "sums", "dtype": "float32"}]},
        {"inputs": None},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path, _ = write_scorer(tmp_path / "scorer.onnx", **changes)
    with pytest.raises(UserError, match="damaged"):
        read_onnx(path)


def test_what_the_file_says_must_be_what_the_graph_takes(tmp_path: Path) -> None:
    path, said = write_scorer(tmp_path / "scorer.onnx")
    for key, value in (("dtype", "float16"), ("shape", [None, 2, 4, 7]), ("shape", [3, 2, 4, 6]), ("name", "picture")):
        changed = [{**said["inputs"][0], key: value}, *said["inputs"][1:]]
        write_scorer(path, inputs=changed)
        with pytest.raises(UserError, match="damaged"):
            read_onnx(path)
    changed = [{**said["outputs"][0], "dtype": "int64"}, *said["outputs"][1:]]
    write_scorer(path, outputs=changed)
    with pytest.raises(UserError, match="damaged"):
        read_onnx(path)
    model = onnx.load(write_scorer(path)[0])
    for text in ("[" * 100_000, '{"inputs": 1}', "not JSON"):
        helper.set_model_props(model, {SIGNATURE_KEY: text})
        onnx.save(model, path)
        with pytest.raises(UserError, match="damaged"):
            read_onnx(path)


def test_a_card_that_can_not_be_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(write_scorer(path)[0])
    helper.set_model_props(model, {CARD_KEY: '{"version": 1, "classes": "cats"}'})
    onnx.save(model, path)
    with pytest.raises(
        UserError, match=r"model\.onnx describes its model .*classes must be a list of names, not 'cats'"
    ):
        load_engine(path)


@pytest.mark.parametrize("batch", [2**40, -2])
def test_a_batch_that_no_machine_holds_is_refused(batch: int, tmp_path: Path) -> None:
    path, _ = write_scorer(tmp_path / "scorer.onnx", batch)
    with pytest.raises(UserError, match="damaged"):
        load_engine(path)


def test_constants_whose_sizes_lie_are_refused(tmp_path: Path) -> None:
    path, _ = write_scorer(tmp_path / "scorer.onnx")
    model = onnx.load(path)
    for sizes in ([2**40], [4, 4], [-1, 3]):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sizes)
        onnx.save(model, path)
        with pytest.raises(UserError, match=r"damaged|can't compile"):
            load_engine(path)

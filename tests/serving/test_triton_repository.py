"""Model repositories for Triton, read with Triton's own schema."""

import errno
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from google.protobuf import text_format

from effnet_quant import UserError, create_model, export_onnx
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.cli import serve as command
from effnet_quant.engines.openvino import shared_core
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.engines.tensorrt.build_options import BuildOptions, Machine
from effnet_quant.engines.tensorrt.plans import Plan, write_plan
from effnet_quant.serving.settings import Serving
from effnet_quant.serving.triton_repository import model_config, write_model

CLASSES = ["ship", 'a "quoted" dog', "Käfer", "two\nlines", *"efghij"]
IMAGES = InputSpec(32, 36, mean=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """The message types of model_config.proto, from Triton's client package (whose __init__ wants grpc)."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "digits.onnx"
    card = ModelCard(classes=CLASSES, num_classes=10, input=IMAGES)
    export_onnx(create_model("cifar-resnet20").eval(), path, 32, card=card)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_configuration_says_what_the_engine_takes_and_gives(path: Path, schema: ModuleType, tmp_path: Path) -> None:
    serving = Serving("onnxruntime", instances=2, max_batch=16, queue_delay_us=500)
    assert write_model(path, tmp_path / "models", serving) == tmp_path / "models" / "digits" / "1"
    folder = tmp_path / "models" / "digits"
    assert files(folder) == ["1/model.onnx", "config.pbtxt", "labels.txt"]
    assert (folder / "1" / "model.onnx").read_bytes() == path.read_bytes()
    config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())
    graph = onnx.load(path).graph
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx"
    (image,), (logits,), (group,) = config.input, config.output, config.instance_group
    assert (image.name, image.data_type, list(image.dims)) == (graph.input[0].name, schema.TYPE_FP32, [3, 32, 32])
    assert (logits.name, logits.data_type, list(logits.dims)) == (graph.output[0].name, schema.TYPE_FP32, [10])
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_CPU)
    assert json.loads(config.parameters["preprocessing"].string_value) == IMAGES.to_json()
    labels = (folder / logits.label_filename).read_text(encoding="utf-8").splitlines()
    assert labels == ["ship", 'a "quoted" dog', "Käfer", "two lines", *"efghij"]
    assert (folder.stat().st_mode & 0o755) == 0o755


def test_a_second_version_stands_beside_the_first(path: Path, tmp_path: Path) -> None:
    serving = Serving("openvino")
    for number in (1, 2):
        assert write_model(path, tmp_path / "models", serving, name="net").name == str(number)
    assert write_model(path, tmp_path / "models", serving, name="net", version=7).name == "7"
    assert files(tmp_path / "models" / "net")[:3] == ["1/model.onnx", "2/model.onnx", "7/model.onnx"]
    with pytest.raises(UserError, match="has a version 2 already"):
        write_model(path, tmp_path / "models", serving, name="net", version=2)
    assert files(tmp_path) == [f"models/net/{file}" for file in files(tmp_path / "models" / "net")]
    assert len(files(tmp_path)) == 5


def test_a_version_that_can_not_be_written_leaves_the_others(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, serving = tmp_path / "models", Serving("onnxruntime")
    write_model(path, models, serving)
    before = files(models)
    places = []

    def rename(source: Path, target: Path) -> None:
        places.append((Path(source).parent, Path(target).parent))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", rename)
    for name in ("digits", "new"):
        with pytest.raises(UserError, match="No space left"):
            write_model(path, models, serving, name=name)
        # within one folder, so that a repository may be a file system of its own (a container's volume)
        assert places.pop() == (models / name, models / name)
    assert files(tmp_path) == [f"models/{file}" for file in before]
    assert [entry.name for entry in models.iterdir()] == ["digits"]


def test_each_backend_is_configured_as_it_batches(path: Path, schema: ModuleType, tmp_path: Path) -> None:
    """ONNX Runtime joins requests. Triton's OpenVINO backend takes only full batches of max_batch_size, unless that is 0."""
    configs = {}
    for backend in ("onnxruntime", "openvino"):
        folder = write_model(path, tmp_path / backend, Serving(backend)).parent
        configs[backend] = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), schema.ModelConfig())
    joining, alone = configs["onnxruntime"], configs["openvino"]
    assert (joining.max_batch_size, joining.dynamic_batching.max_queue_delay_microseconds) == (32, 100)
    assert (list(joining.input[0].dims), list(joining.output[0].dims)) == ([3, 32, 32], [10])
    assert (alone.max_batch_size, alone.HasField("dynamic_batching")) == (0, False)
    assert (list(alone.input[0].dims), list(alone.output[0].dims)) == ([-1, 3, 32, 32], [-1, 10])
    # Triton sets another max_batch_size than 0 where the file's layout names a batch
    layouts = pytest.importorskip("openvino").layout_helpers
    model = shared_core().read_model(tmp_path / "openvino" / "digits" / "1" / "model.onnx")
    assert not any(layouts.has_batch(layouts.get_layout(port)) for port in (*model.inputs, *model.outputs))
    for flag in ("--max-batch", "--queue-delay"):
        with pytest.raises(UserError, match=f"OpenVINO in Triton takes each request by itself; leave .*{flag}"):
            command.job([str(path), str(tmp_path / "other"), "--backend", "openvino", flag, "8"])


def test_a_plan_is_served_on_the_card_in_its_own_batches(schema: ModuleType, tmp_path: Path) -> None:
    machine, options = Machine("a card", "9.0", "11.4"), BuildOptions(1, 8, 64)
    image, logits = ArrayInput("input", "uint8", (32, 32, 3), 1, 64), ArrayOutput("logits", "float32")
    digest = hashlib.sha256(b"plan").hexdigest()
    plan = Plan(
        tmp_path / "b0.plan",
        digest,
        machine,
        options,
        Signature((image,), (logits,)),
        ModelCard(classes=("a", "b")),
        {},
        [],
    )
    write_plan(plan, b"plan")
    assert command.job([str(plan.path), str(tmp_path / "models"), "--max-batch", "128"]) == 0
    folder = tmp_path / "models" / "b0"
    assert files(folder) == ["1/model.plan", "config.pbtxt", "labels.txt"]
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 64)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert (config.input[0].data_type, list(config.input[0].dims)) == (schema.TYPE_UINT8, [32, 32, 3])
    assert list(config.output[0].dims) == [2]
    (tmp_path / "b0.plan.json").unlink()
    with pytest.raises(UserError, match=r"no plan with its description b0\.plan\.json"):
        command.job([str(plan.path), str(tmp_path / "models")])


def test_a_fixed_batch_is_a_dimension_to_triton(schema: ModuleType) -> None:
    image = ArrayInput("input", "float32", (3, None, None), 4, 4)
    signature = Signature((image,), (ArrayOutput("logits", "float32"),))
    text = model_config("fixed", signature, ModelCard(), Serving("onnxruntime"))
    config = text_format.Parse(text, schema.ModelConfig())
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [4, 3, -1, -1]
    assert list(config.output[0].dims) == [4, -1]
    assert config.output[0].label_filename == ""
    with pytest.raises(UserError, match="a file with a fixed batch takes each request by itself"):
        model_config("fixed", signature, ModelCard(), Serving("onnxruntime", max_batch=4))


def test_every_input_and_output_is_served(schema: ModuleType) -> None:
    inputs = (ArrayInput("image", "float32", (3, 8, 6)), ArrayInput("tokens", "int64", (None,)))
    outputs = (ArrayOutput("boxes", "float32", (None, 4)), ArrayOutput("kinds", "int32", (5,)))
    signature = Signature(inputs, outputs, {"tuple": [0, 1]})
    text = model_config("detector", signature, ModelCard(classes=("a", "b")), Serving("onnxruntime"))
    config = text_format.Parse(text, schema.ModelConfig())
    assert [(value.name, value.data_type, list(value.dims)) for value in config.input] == [
        ("image", schema.TYPE_FP32, [3, 8, 6]),
        ("tokens", schema.TYPE_INT64, [-1]),
    ]
    assert [(value.name, value.data_type, list(value.dims)) for value in config.output] == [
        ("boxes", schema.TYPE_FP32, [-1, 4]),
        ("kinds", schema.TYPE_INT32, [5]),
    ]
    assert not any(value.label_filename for value in config.output)


def test_what_can_not_be_served_is_said_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    models = str(tmp_path / "models")
    with pytest.raises(UserError, match="openvino serves on the device cpu"):
        command.job([str(path), models, "--backend", "openvino", "--device", "cuda"])
    path.with_suffix(".safetensors").touch()
    with pytest.raises(UserError, match="Triton has no backend 'torch'"):
        command.job([str(path.with_suffix(".safetensors")), models])
    with pytest.raises(UserError, match="at least 1"):
        command.job([str(path), models, "--instances", "0"])
    with pytest.raises(UserError, match="no file"):
        command.job([str(tmp_path / "missing.onnx"), models])
    with pytest.raises(UserError, match="Triton counts from 1"):
        command.job([str(path), models, "--version", "0"])
    with pytest.raises(UserError, match="can't be the name"):
        command.job([str(path), models, "--name", "a/b"])
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        command.job([str(tmp_path / "damaged.onnx"), models])
    with pytest.raises(UserError, match="can't write"):
        command.job([str(path), str(tmp_path / "missing" / "models")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.onnx"]

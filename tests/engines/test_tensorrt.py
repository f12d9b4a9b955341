"""TensorRT plans. What needs no library is tested everywhere; building and running where a card and TensorRT are."""

import ast
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import CARD_KEY, ModelCard
from effnet_quant.cli import model2trt
from effnet_quant.engines.signature import ArrayInput, ArrayOutput, Signature
from effnet_quant.engines.tensorrt import library
from effnet_quant.engines.tensorrt.build_options import HARDWARE_COMPATIBILITY, BuildOptions, Machine, plan_key
from effnet_quant.engines.tensorrt.inspector import LayerPrecision, format_layers, read_layers, summarize
from effnet_quant.engines.tensorrt.plans import Plan, compile_engine, find_plan, timings_name, with_profile, write_plan

ROOT = Path(__file__).parents[2]
MACHINE = Machine("NVIDIA H100 80GB HBM3", "9.0", "11.4.0.106")
OPEN = ArrayInput("input", "float32", (3, 32, 32))


def why_not() -> str:
    """Why plans can't be built here, or nothing."""
    try:
        library.this_machine(library.import_tensorrt())
    except UserError as error:
        return str(error)
    return ""


REASON = why_not()
needs_tensorrt = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = calibrate(quantize(create_model("cifar-resnet20").eval()), [torch.randn(8, 3, 32, 32)], method="max")
    path = tmp_path_factory.mktemp("plans") / "model.onnx"
    export_onnx(model, path, 32, target="tensorrt", metadata={"classes": list("abcdefghij")})
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "effnet-quant" / "tensorrt"


def test_a_plans_key_follows_from_all_that_it_is_built_from() -> None:
    key = plan_key(b"model", MACHINE, BuildOptions())
    assert key == plan_key(b"model", MACHINE, BuildOptions())
    assert len(key) == 64
    others = {plan_key(b"another", MACHINE, BuildOptions())}
    for name in ("card", "compute_capability", "tensorrt"):
        others.add(plan_key(b"model", dataclasses.replace(MACHINE, **{name: "other"}), BuildOptions()))
    changed = {
        "smallest_batch": 2,
        "usual_batch": 33,
        "largest_batch": 64,
        "image_size": 96,
        "workspace_mib": 512,
        "version_compatible": True,
        "hardware_compatible": "ampere-plus",
    }
    assert set(changed) == {field.name for field in dataclasses.fields(BuildOptions)}
    for name, value in changed.items():
        others.add(plan_key(b"model", MACHINE, BuildOptions(**{name: value})))
    assert key not in others
    assert len(others) == 1 + 3 + len(changed)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"smallest_batch": 0}, "at least 1 and not fall"),
        ({"usual_batch": 8, "largest_batch": 4}, "batches of 1, 8 and 4"),
        ({"hardware_compatible": "all"}, "no hardware compatibility 'all'"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        BuildOptions(**options)


def test_profiles_cover_what_the_file_leaves_open() -> None:
    options = BuildOptions(1, 8, 64)
    profile = {"input": ((1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32))}
    assert library.profile_shapes([OPEN], options) == profile
    flags = ArrayInput("flags", "int64", (7,))
    assert library.profile_shapes([OPEN, flags], options) == {**profile, "flags": ((1, 7), (8, 7), (64, 7))}
    assert with_profile(OPEN, options) == ArrayInput("input", "float32", (3, 32, 32), 1, 64)
    fixed = ArrayInput("input", "float32", (3, 32, 32), 4, 4)
    assert library.profile_shapes([fixed], options) == {}
    assert with_profile(fixed, options) == fixed
    pixels = ArrayInput("input", "uint8", (None, None, 3))
    with pytest.raises(UserError, match="any size; say which with --image-size"):
        library.profile_shapes([pixels], options)
    sized = BuildOptions(1, 8, 64, image_size=96)
    assert library.profile_shapes([pixels], sized)["input"][1] == (8, 96, 96, 3)
    assert with_profile(pixels, sized).shape == (96, 96, 3)


# Made by hand in the two documented forms of the inspector's JSON (detailed profiling verbosity).
TENSORRT_10 = {
    "Layers": [
        {
            "Name": "quantize input",
            "LayerType": "Reformat",
            "Inputs": [
                {"Name": "input", "Dimensions": [8, 3, 32, 32], "Format/Datatype": "Row major linear FP32 format"}
            ],
            "Outputs": [{"Name": "q", "Dimensions": [8, 3, 32, 32], "Format/Datatype": "Row major Int8 format"}],
        },
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "q", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            "Weights": {"Type": "Int8", "Count": 432},
            "Bias": {"Type": "Float", "Count": 16},
        },
        {
            "Name": "shape",
            "LayerType": "NoOp",
            "Inputs": [{"Name": "y", "Format/Datatype": "N/A due to dynamic shapes"}],
            "Outputs": [],
            "Weights": {"Type": "Float", "Count": 0},
        },
    ],
    "Bindings": ["input", "logits"],
}
TENSORRT_11 = {
    "Layers": [
        {
            "Name": "fc",
            "LayerType": "gemm",
            "Inputs": [{"Name": "y", "DataType": "Half", "Format": "Row major linear format (kLINEAR)"}],
            "Outputs": [{"Name": "logits", "DataType": "Float", "Format": "Row major linear format (kLINEAR)"}],
        },
        "a layer by name only",
    ],
    "I/O Tensors": [{"Name": "input", "IOMode": "Input", "DataType": "Float"}],
}


def test_the_inspectors_report_is_read_in_both_forms() -> None:
    reformat, convolution, shape = read_layers(json.dumps(TENSORRT_10))
    assert reformat == LayerPrecision("quantize input", "Reformat", ("fp32",), ("int8",), None)
    assert convolution == LayerPrecision("conv1 + relu", "CaskConvolution", ("int8",), ("fp16",), "int8")
    assert (shape.computes_in, shape.weights) == ("?", None)
    gemm, nameless = read_layers(json.dumps(TENSORRT_11))
    assert gemm == LayerPrecision("fc", "gemm", ("fp16",), ("fp32",), None)
    assert nameless == LayerPrecision("a layer by name only", "?", (), (), None)


def test_the_report_counts_layers_by_kind_and_type() -> None:
    layers = [
        *read_layers(json.dumps(TENSORRT_10)),
        LayerPrecision("c2", "CaskConvolution", ("fp16",), ("fp16",), "fp16"),
    ]
    assert summarize(layers).splitlines()[0].split() == ["CaskConvolution", "1", "int8,", "1", "fp16"]
    table = format_layers(layers).splitlines()
    assert len(table) == 1 + len(layers)
    assert table[2].split() == ["int8", "int8", "fp16", "CaskConvolution", "conv1", "+", "relu"]


def plan_of(path: Path, content: bytes) -> Plan:
    layers, options = read_layers(json.dumps(TENSORRT_10)), BuildOptions()
    digest = hashlib.sha256(content).hexdigest()
    takes = Signature((with_profile(OPEN, options),), (ArrayOutput("logits", "float32", (None,)),))
    return Plan(path, digest, MACHINE, options, takes, ModelCard(classes=("a",)), {"classes": ["a"]}, layers)


def test_a_plan_and_its_description_belong_together(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model.plan", b"plan")
    assert find_plan(plan.path) is None
    write_plan(plan, b"plan")
    assert find_plan(plan.path) == plan
    assert plan.path.read_bytes() == b"plan"
    plan.path.write_bytes(b"another plan")
    assert find_plan(plan.path) is None
    write_plan(plan, b"plan")
    described = json.loads((tmp_path / "model.plan.json").read_text())
    (image,), (logits,) = described.pop("inputs"), described.pop("outputs")
    del described["structure"]
    (tmp_path / "model.plan.json").write_text(json.dumps({**described, "input": image, "output": logits["name"]}))
    assert find_plan(plan.path).input == plan.input  # as versions before this one described it
    (tmp_path / "model.plan.json").write_text('{"sha256": ')
    assert find_plan(plan.path) is None


def test_what_was_built_is_not_built_again(
    path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []

    def build(
        _trt: object, model: bytes, _inputs: object, options: BuildOptions, timings: bytes
    ) -> tuple[bytes, bytes]:
        builds.append(timings)
        return b"plan of " + model[:8] + str(options.largest_batch).encode(), timings + b"measured;"

    monkeypatch.setattr(library, "import_tensorrt", lambda: None)
    monkeypatch.setattr(library, "this_machine", lambda trt: MACHINE)
    monkeypatch.setattr(library, "build_plan", build)
    monkeypatch.setattr(library, "load_plan", lambda trt, content, version_compatible: object())
    monkeypatch.setattr(library, "inspect", lambda *arguments: json.dumps(TENSORRT_10))

    first = compile_engine(path)
    assert first.path.parent == cache
    assert first.metadata["classes"] == list("abcdefghij")
    assert compile_engine(path, tmp_path / "model.plan").sha256 == first.sha256
    assert (tmp_path / "model.plan").read_bytes() == first.path.read_bytes()
    assert find_plan(tmp_path / "model.plan").layers == first.layers
    assert builds == [b""]

    larger = compile_engine(path, options=BuildOptions(largest_batch=512))
    assert larger.path != first.path
    assert larger.input.largest_batch == 512
    assert builds == [b"", b"measured;"]
    assert (cache / timings_name(MACHINE)).read_bytes() == b"measured;measured;"

    first.path.write_bytes(b"damaged")
    assert compile_engine(path).sha256 == first.sha256
    assert len(builds) == 3
    own = tmp_path / "own.timings"
    compile_engine(path, options=BuildOptions(image_size=32), timing_cache=own)
    assert own.read_bytes() == b"measured;"


@pytest.mark.skipif(not REASON, reason="TensorRT is here")
def test_without_tensorrt_one_sentence_says_what_to_install(
    path: Path, tmp_path: Path, run_script, cache: Path
) -> None:
    output = tmp_path / "model.plan"
    result = run_script("model2trt.py", path, "--output", output)
    assert result.code == 2
    assert len(result.error_lines) == 1
    assert "pip install effnet-quant[tensorrt]" in result.err or "CUDA card" in result.err
    with pytest.raises(UserError, match="TensorRT"):
        load_engine(path, "tensorrt")
    with pytest.raises(UserError, match="tensorrt does not run on the device 'cpu'"):
        load_engine(path, "tensorrt", device="cpu")
    assert not output.exists()
    assert not cache.exists()


def test_what_is_wrong_with_the_file_is_said_before_tensorrt_is_needed(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        model2trt.job([str(tmp_path / "missing.onnx")])
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        model2trt.job([str(tmp_path / "damaged.onnx")])
    with pytest.raises(UserError, match="no folder"):
        model2trt.job([str(path), "--output", str(tmp_path / "missing" / "model.plan")])
    with pytest.raises(UserError, match="batches of 1, 64 and 8"):
        model2trt.job([str(path), "-b", "64", "--max-batch", "8"])
    with pytest.raises(UserError, match="batches of 1, 0 and 256"):
        model2trt.job([str(path), "-b", "0"])
    with pytest.raises(UserError, match=r"call it .*model\.plan"):
        model2trt.job([str(path), "--output", str(tmp_path / "model.engine")])
    unsigned = onnx.load(path)
    (said,) = (entry for entry in unsigned.metadata_props if entry.key == CARD_KEY)
    said.value = said.value.replace('"tensorrt"', '"onnxruntime"')
    onnx.save(unsigned, tmp_path / "unsigned.onnx")
    with pytest.raises(UserError, match=r"quantized for onnxruntime.*--target tensorrt"):
        model2trt.job([str(tmp_path / "unsigned.onnx")])


# the class of what each name holds in the modules that call TensorRT
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}


# looked for before it is used
LATER = {"10.0.1": {("IExecutionContext", "set_device_memory")}}


@pytest.mark.parametrize("version", ["10.0.1", "10.13.3.9", "11.4.0.106"])
def test_every_name_of_tensorrt_that_is_used_exists(version: str) -> None:
    # tests/reference/tensorrt_api.json: dir() of the classes in NVIDIA's published bindings of these versions
    known = json.loads((ROOT / "tests/reference/tensorrt_api.json").read_text())[version]
    members = {name: set(text.split()) for name, text in known.items()}
    checked = set()
    for file in ("engines/tensorrt/library.py", "engines/tensorrt/backend.py"):
        for node in ast.walk(ast.parse((ROOT / "effnet_quant" / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if isinstance(owner, ast.Attribute) and ast.unparse(owner.value) == "trt":
                name = owner.attr  # trt.BuilderFlag.VERSION_COMPATIBLE
            elif isinstance(owner, ast.Name):
                name = CLASSES.get(owner.id, "")
            elif isinstance(owner, ast.Attribute) and ast.unparse(owner.value) == "self":
                name = CLASSES.get(owner.attr.removeprefix("_"), "")
            else:
                continue
            if name in members and node.attr != "__init__":
                assert node.attr in members[name] or (name, node.attr) in LATER.get(version, set()), (name, node.attr)
                checked.add((name, node.attr))
    assert len(checked) > 30
    assert ("IExecutionContext", "execute_async_v3") in checked
    levels = {name.replace("-", "_").upper() for name in HARDWARE_COMPATIBILITY}
    newer = {"SAME_COMPUTE_CAPABILITY"} if version in LATER else set()  # refused there with a sentence
    assert levels - members["HardwareCompatibilityLevel"] == newer


@needs_tensorrt
@torch.no_grad()
def test_a_plan_computes_what_onnxruntime_computes_at_any_batch(path: Path) -> None:
    expected, engine = load_engine(path), load_engine(path, "tensorrt")
    generator = np.random.default_rng(0)
    for count in (1, 2, 7, 2, 300):
        images = generator.standard_normal((count, 3, 32, 32)).astype(np.float32)
        got, wanted = engine(images), expected(images)
        assert np.linalg.norm(got - wanted) < 5e-2 * np.linalg.norm(wanted)
        assert np.array_equal(engine(images), got)  # replayed
    assert engine.metadata["classes"] == list("abcdefghij")


@needs_tensorrt
def test_building_reports_integer_convolutions_and_keeps_the_plan(path: Path, tmp_path: Path, cache: Path) -> None:
    plan = compile_engine(path, tmp_path / "model.plan", BuildOptions(largest_batch=64, workspace_mib=1024))
    convolutions = [layer for layer in plan.layers if "conv" in layer.kind.lower()]
    assert convolutions
    assert sum(layer.computes_in == "int8" for layer in convolutions) > len(convolutions) // 2
    kept = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    compile_engine(path, tmp_path / "again.plan", BuildOptions(largest_batch=64, workspace_mib=1024))
    assert kept == {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    images = np.zeros((3, 3, 32, 32), np.float32)
    assert load_engine(tmp_path / "model.plan", "tensorrt")(images).shape == (3, 10)

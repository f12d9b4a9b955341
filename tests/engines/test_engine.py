"""Engines behind one interface: any batch, devices, threads and precisions, and what is said where one can't be had."""

import builtins
import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from effnet_quant import UserError, calibrate, create_model, export_onnx, load_engine, quantize
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.engines import cpu, onnxruntime, openvino
from effnet_quant.engines.compiled import Settings, run_in_batches
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.engines.runtimes import BACKENDS, get_backend
from effnet_quant.export.options import ExportOptions
from effnet_quant.models.weights import write_weights
from effnet_quant.quantization.placement.insertion import simulate_target

ONNX_BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    return calibrate(quantize(create_model("cifar-resnet20").eval(), target="openvino"), [images], method="max")


@pytest.fixture(scope="module")
def path(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.onnx"
    export_onnx(model, path, 32, target="openvino")
    return path


def means_of_channels(path: Path, batch: int | str, size: int | str = 4, dtype: int = TensorProto.FLOAT) -> Path:
    """An ONNX classifier whose logits are the means of the three channels, times 1, 2 and 3."""
    image = helper.make_tensor_value_info("pixels", dtype, [batch, 3, size, size])
    logits = helper.make_tensor_value_info("classes", TensorProto.FLOAT, [batch, 3])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["means", "factors"], ["classes"]),
    ]
    factors = numpy_helper.from_array(np.array([1, 2, 3], np.float32), "factors")
    model = helper.make_model(
        helper.make_graph(nodes, "means", [image], [logits], [factors]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("count", [1, 4, 6, 9])
def test_a_file_with_a_fixed_batch_takes_any_number_of_images(backend: str, count: int, tmp_path: Path) -> None:
    engine = load_engine(means_of_channels(tmp_path / "fixed.onnx", 4), backend)
    images = np.random.default_rng(count).standard_normal((count, 3, 4, 4)).astype(np.float32)
    assert (engine.input.smallest_batch, engine.input.largest_batch) == (4, 4)
    np.testing.assert_allclose(engine(images), images.mean((2, 3)) * [1, 2, 3], rtol=1e-5, atol=1e-6)


def test_batches_are_split_and_filled_up_and_no_copy_comes_out() -> None:
    seen = []

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        images, factors = arrays
        seen.append(len(images))
        return [images.reshape(len(images), -1) * factors, factors]

    arrays = [np.arange(11, dtype=np.float32).reshape(11, 1, 1, 1), np.arange(11)[:, None]]
    for smallest, largest, batches in ((2, 5, [5, 5, 2]), (1, None, [11]), (4, 4, [4, 4, 4]), (16, None, [16])):
        seen.clear()
        squares, factors = run_in_batches(run, arrays, smallest, largest)
        assert squares[:, 0].tolist() == [number**2 for number in range(11)]
        assert factors[:, 0].tolist() == list(range(11))
        assert seen == batches
    with pytest.raises(UserError, match="no batch; call the engine with 5 entries"):
        run_in_batches(lambda arrays: [arrays[0].sum()], arrays, 1, 5)


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_open_image_sizes_and_pixels(backend: str, tmp_path: Path) -> None:
    engine = load_engine(means_of_channels(tmp_path / "open.onnx", "n", "side", TensorProto.UINT8), backend)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5), dtype=np.uint8)
    np.testing.assert_allclose(engine(pixels), pixels.mean((2, 3)) * [1, 2, 3], rtol=1e-5)
    with pytest.raises(UserError, match="uint8 images, not float32; give it pixels"):
        engine(pixels.astype(np.float32))
    with pytest.raises(UserError, match=r"\(N, 3xanyxany\)"):
        engine(pixels[:, :2])
    with pytest.raises(UserError, match="any size; say which"):
        engine.warm_up()
    engine.warm_up(2, image_size=8)


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_one_thread_or_two_compute_the_same(backend: str, path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    one, two = (load_engine(path, backend, threads=threads) for threads in (1, 2))
    one.warm_up(3)
    assert one.settings.threads == 1
    np.testing.assert_allclose(one(images), two(images), rtol=1e-4, atol=1e-4)


def test_openvino_compiles_powers_of_two_and_prepared_batches_apart(path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
    expected = load_engine(path)(images)
    engines = [load_engine(path, "openvino", threads=1) for _ in range(2)]
    for engine in engines:
        engine.warm_up(5)
    upwards = {count: engines[0](images[:count]) for count in range(1, 8)}
    downwards = {count: engines[1](images[:count]) for count in range(7, 0, -1)}
    for count, logits in upwards.items():
        # a value that rounds the other way ends as about 1e-2 in these random-weight logits
        assert np.linalg.norm(logits - expected[:count]) < 3e-2 * np.linalg.norm(expected[:count])
        assert np.array_equal(engines[0](images[:count]), logits)
        assert np.array_equal(downwards[count], logits), "the answer does not follow from what came before"
    run = engines[0]._run
    assert {shape[0] for (shape,) in run._networks} == {1, 2, 4, 5}
    for network in (*run._networks.values(), run._any_shape):
        (compiled,) = network.compiled
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@torch.no_grad()
def test_the_torch_backend_is_the_model_of_a_weights_file(model: torch.nn.Module, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    card = ModelCard(arch="cifar-resnet20", num_classes=10, classes=tuple("abcdefghij"))
    write_weights(weights, model.state_dict(), card)
    engine = load_engine(weights, "torch", threads=1)
    images = torch.randn(3, 3, 32, 32)
    expected = simulate_target(copy.deepcopy(model), "onnxruntime")(images)  # as create_model simulates
    threads = torch.get_num_threads()
    np.testing.assert_allclose(engine(images.numpy()), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == threads
    assert engine.card == card
    assert engine.input.shape == (3, 32, 32)
    half = load_engine(weights, "torch", precision="bf16")(images.numpy())
    assert half.dtype == np.float32
    assert 0 < np.abs(half - expected.numpy()).max() < 0.2 * expected.abs().max().item()


def test_the_torch_backend_says_which_files_it_takes(path: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes weights"):
        load_engine(path, "torch")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="does not say which model"):
        load_engine(tmp_path / "plain.pth", "torch")


def test_what_a_backend_can_not_do_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS:
        assert get_backend(backend).DEVICES
    with pytest.raises(UserError, match="openvino does not run on the device 'cuda'; choose one of: cpu"):
        load_engine(path, "openvino", device="cuda")
    with pytest.raises(UserError, match="onnxruntime does not compute in 'bf16'; choose one of: fp32"):
        load_engine(path, precision="bf16")
    with pytest.raises(UserError, match="0 threads"):
        load_engine(path, threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="onnxruntime-gpu"):
            load_engine(path, device="cuda")
    monkeypatch.setattr(openvino, "cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match="does not compute in bfloat16"):
        load_engine(path, "openvino", precision="bf16")


@pytest.mark.parametrize(
    ("backend", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "effnet-quant\\[openvino\\]")]
)
def test_a_missing_runtime_is_named_with_how_to_install_it(
    backend: str, package: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == backend:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=f"not installed; pip install {package}"):
        load_engine(path, backend)


@pytest.mark.skipif(not cpu.cpu_has_bf16(), reason="this CPU does not compute in bfloat16")
def test_openvino_in_bfloat16_is_near_float(path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    exact, near = load_engine(path, "openvino")(images), load_engine(path, "openvino", precision="bf16")(images)
    assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@torch.no_grad()
def test_torch_and_onnxruntime_on_a_card(path: Path, model: torch.nn.Module) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    images = torch.randn(3, 3, 32, 32)
    got = load_engine(path, device="cuda")(images.numpy())
    np.testing.assert_allclose(got, model(images).numpy(), rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("spec", ["w7a8", "w8a8"])
def test_sums_of_the_largest_products_do_not_saturate(backend: str, spec: str, tmp_path: Path) -> None:
    """On CPUs without VNNI fast kernels add two products in 16 bits; all of these are the largest there are."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(), nn.Linear(8, 4)).eval()
    for parameter in model.parameters():
        parameter.fill_(1 / 16)
    images = torch.ones(4, 16, 5, 5)
    calibrate(quantize(model, spec, target=backend), [images], method="max")
    export_onnx(model, tmp_path / "model.onnx", 5, target=backend)
    assert read_onnx(tmp_path / "model.onnx").fits_16_bits == (spec == "w7a8")
    logits = load_engine(tmp_path / "model.onnx", backend)(images.numpy())
    np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4)
    export_onnx(model, tmp_path / "floats.onnx", 5, target=backend, options=ExportOptions(float_weights=True))
    assert not read_onnx(tmp_path / "floats.onnx").fits_16_bits


@pytest.mark.parametrize(
    ("flags", "exact_kernels"),
    [
        ({"avx2", "avx512f"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx512f", "avx512_vnni"}, False),
        (None, True),  # unknown: right before fast
    ],
)
def test_onnxruntime_is_asked_for_slower_exact_kernels_only_where_the_fast_ones_saturate(
    flags: set[str] | None, exact_kernels: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cpu, onnxruntime):
        monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    options = onnxruntime.session_options(read_onnx(path), Settings("cpu", "fp32"))
    if exact_kernels:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have configuration"):
            options.get_session_config_entry("session.x64quantprecision")


class Residual(nn.Module):
    """A block of a ResNet; with ``gate``, its branch is multiplied by that of its own numbers."""

    def __init__(self, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.branch(x)
        return torch.relu(x + (branch if self.gate is None else branch * self.gate(branch)))


@pytest.mark.parametrize("gate", [None, nn.Sigmoid()])
@pytest.mark.parametrize("preprocessing", [False, True])
@torch.no_grad()
def test_openvino_convolutions_add_shortcuts_of_integers_themselves(
    gate: nn.Module | None, preprocessing: bool, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), Residual(gate), Residual(gate)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ).eval()
    path, images = tmp_path / "model.onnx", torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    calibrate(quantize(model, "w7a8", target="openvino"), [images / 255], method="max")
    options = ExportOptions(normalisation=InputSpec(8, 8, mean=(0.0,) * 3, std=(1.0,) * 3) if preprocessing else None)
    export_onnx(model, path, 16, target="openvino", options=options)
    assert read_onnx(path).adds_integers == (gate is None)

    engine = load_engine(path, "openvino")
    got = engine((images if preprocessing else images / 255).numpy())
    np.testing.assert_allclose(got, model(images / 255).numpy(), rtol=2e-2, atol=2e-3)
    if gate is None:
        network = openvino.shared_core().read_model(path)
        network.reshape(list(images.shape))
        properties = openvino.compile_properties(read_onnx(path), engine.settings)
        compiled = openvino.shared_core().compile_model(network, "CPU", properties)
        nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        written = [
            info["outputPrecisions"].astype(str) for info in nodes if info["layerType"].astype(str) == "Convolution"
        ]
        assert sorted(written) == ["f32", "u8", "u8", "u8", "u8"]  # floats for the last mean only


def test_openvino_engines_that_come_and_go_leave_the_process_whole(path: Path) -> None:
    """Each Core would bring a stack for signal handlers; a freed one ends the process with the next SIGCHLD."""
    pytest.importorskip("openvino")
    first, second = load_engine(path, "openvino"), load_engine(path, "openvino")
    images = np.zeros((1, 3, 32, 32), np.float32)
    assert np.array_equal(first(images), second(images))
    assert first._run._core is second._run._core is openvino.shared_core()

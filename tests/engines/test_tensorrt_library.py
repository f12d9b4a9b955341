"""What is asked of TensorRT, and what is done with its answers, against reference/fake_tensorrt.py."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effnet_quant import UserError, create_model, export_onnx, load_engine
from effnet_quant.engines.onnx_file import read_onnx
from effnet_quant.engines.signature import ArrayInput
from effnet_quant.engines.tensorrt import backend as tensorrt
from effnet_quant.engines.tensorrt import library
from effnet_quant.engines.tensorrt.build_options import BuildOptions
from effnet_quant.engines.tensorrt.plans import compile_engine
from reference import fake_tensorrt as fake

VERSIONS = ("10.0.1", "11.4.0.106")
OPTIONS = BuildOptions(1, 4, 12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plans") / "model.onnx"
    export_onnx(create_model("cifar-resnet20").eval(), path, 32, target="tensorrt", metadata={"classes": ["a"] * 10})
    return path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a fake TensorRT on a fake card where ours is looked for: (version, fails) -> (module, card)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(version: str = VERSIONS[-1], *fails: str) -> tuple[Any, Any]:
        card = fake.Card()
        trt = fake.fake_tensorrt(version, card, fails)
        monkeypatch.setattr(library, "import_tensorrt", lambda: trt)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(tensorrt, "torch", card)
        return trt, card

    return install


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_computes_what_the_graph_says_at_every_batch(install: Any, path: Path, version: str) -> None:
    _, card = install(version)
    plan = compile_engine(path, options=OPTIONS)
    engine, expected = load_engine(plan.path, "tensorrt"), load_engine(path, threads=1)
    images = np.random.default_rng(0).standard_normal((29, 3, 32, 32), np.float32)
    wanted = expected(images)
    for count in (7, 1, 2, 29, 7, 1):  # 29 in batches of 12, 12 and 5
        np.testing.assert_allclose(engine(images[:count]), wanted[:count], rtol=1e-4, atol=1e-4)
    assert engine.metadata["classes"] == ["a"] * 10
    assert (engine.input.smallest_batch, engine.input.largest_batch) == (1, 12)
    assert engine.precision == "int8"
    # the graphs of 7, 1 and 2 images share their memory, those of 12 and 5 theirs
    assert card.live_bytes() == (7 + 12) * fake.ACTIVATIONS
    for count in (3, 4, 5, 6, 8, 9, 10, 11):
        engine(images[:count])
    assert len(engine._run._graphs) == tensorrt.GRAPHS_KEPT
    assert card.live_bytes() == 12 * fake.ACTIVATIONS


def test_callers_in_several_threads_do_not_meet_on_the_card(install: Any, path: Path) -> None:
    install()
    engine = load_engine(compile_engine(path, options=OPTIONS).path, "tensorrt")
    images = np.random.default_rng(0).standard_normal((7, 3, 32, 32), np.float32)
    alone = [engine(images[:count]) for count in range(1, 8)]
    order = np.random.default_rng(1).integers(0, 7, 200).tolist()
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda index: engine(images[: index + 1]), order))
    assert all(np.array_equal(answer, alone[index]) for index, answer in zip(order, answers, strict=True))


def test_a_plan_of_another_tool_says_what_it_takes(install: Any, path: Path, tmp_path: Path) -> None:
    install()
    bare = tmp_path / "bare.plan"
    bare.write_bytes(compile_engine(path, options=OPTIONS).path.read_bytes())
    engine = load_engine(bare, "tensorrt")
    assert engine.inputs == (ArrayInput("input", "float32", (3, 32, 32), 1, 12),)
    assert engine.precision == "unknown"
    assert engine(np.zeros((3, 3, 32, 32), np.float32)).shape == (3, 10)


def test_the_builder_is_told_what_the_options_say(install: Any, path: Path) -> None:
    trt, _ = install()
    options = BuildOptions(2, 4, 8, None, 512, version_compatible=True, hardware_compatible="ampere-plus")
    plan = compile_engine(path, options=options)
    built = trt.built
    assert built._profile._shapes == {"input": [(2, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32)]}
    assert built._limits == {"WORKSPACE": 512 << 20}
    assert built._flags == ["VERSION_COMPATIBLE"]
    assert built.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert built.profiling_verbosity.name == "DETAILED"
    assert [layer.computes_in for layer in plan.layers] == ["int8"]
    # such a plan brings code for the CPU: allowed for this one, because its description says so
    assert load_engine(plan.path, "tensorrt")(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)
    compile_engine(path, options=OPTIONS)
    assert (trt.built._limits, trt.built._flags) == ({}, [])
    install("10.0.1")
    with pytest.raises(UserError, match=r"TensorRT 10\.0\.1 has no hardware compatibility 'same-compute-capability'"):
        compile_engine(path, options=BuildOptions(hardware_compatible="same-compute-capability"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b"+conv"), (b"old", b"old+conv"), (b"damaged", b"+conv"), (b"another card's", b"+conv")],
)
def test_a_timing_cache_is_used_where_it_fits(
    install: Any, path: Path, tmp_path: Path, before: bytes, after: bytes
) -> None:
    install()
    timings = tmp_path / "own.timings"
    timings.write_bytes(before)
    compile_engine(path, options=OPTIONS, timing_cache=timings)
    assert timings.read_bytes() == after


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        ("Builder", "TensorRT does not start: CUDA initialization failure"),
        ("build", "can't build the plan: Network has dynamic"),
        ("Runtime", "TensorRT does not start: it gives no reason"),
        ("context", r"can't run the plan: .*\(out of memory\)"),
    ],
)
def test_a_failed_build_is_one_sentence_with_tensorrts_reason(
    install: Any, path: Path, tmp_path: Path, fails: str, sentence: str
) -> None:
    install(VERSIONS[-1], fails)
    with pytest.raises(UserError, match=sentence) as caught:
        compile_engine(path, tmp_path / "model.plan", OPTIONS)
    assert "more of it" not in str(caught.value)
    assert not list(tmp_path.rglob("*.plan*"))


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        ("context", r"can't run the plan: .*\(out of memory\)"),
        ("execute", "can't run the plan: .*illegal memory access"),
    ],
)
def test_a_failed_run_is_one_sentence_with_tensorrts_reason(
    install: Any, path: Path, fails: str, sentence: str
) -> None:
    install()
    plan = compile_engine(path, options=OPTIONS).path
    install(VERSIONS[-1], fails)
    engine = load_engine(plan, "tensorrt")
    with pytest.raises(UserError, match=sentence):
        engine(np.zeros((1, 3, 32, 32), np.float32))


def test_a_plan_that_does_not_fit_says_why(install: Any, path: Path, tmp_path: Path) -> None:
    install(VERSIONS[0])
    old = tmp_path / "old.plan"
    compile_engine(path, old, OPTIONS)
    install()
    with pytest.raises(UserError, match=r"no TensorRT plan for this card .*not compatible with this version: 10\.0\.1"):
        load_engine(old, "tensorrt")
    lean = compile_engine(path, options=BuildOptions(1, 4, 12, version_compatible=True))
    bare = tmp_path / "bare.plan"
    bare.write_bytes(lean.path.read_bytes())  # without the description nobody vouches for its code
    with pytest.raises(UserError, match="host code is not allowed"):
        load_engine(bare, "tensorrt")


def test_what_tensorrt_does_not_read_is_named(install: Any, path: Path) -> None:
    trt, _ = install()
    model = fake.onnx.load(path)
    model.graph.node.append(fake.onnx.helper.make_node("NonZero", ["input"], ["places"]))
    with pytest.raises(UserError, match="can't read the ONNX file: NonZero: no importer"):
        library.build_plan(trt, model.SerializeToString(), read_onnx(path).signature.inputs, OPTIONS, b"")

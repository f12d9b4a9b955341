"""An engine computes in the precision that its file was tuned for, where backend and machine have it."""

from pathlib import Path

import pytest
import torch

from effnet_quant import create_model, export_onnx, load_engine
from effnet_quant.engines import cpu, engine, openvino


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tuned") / "model.onnx"
    metadata = {"tuned_precision": "bf16"}
    export_onnx(create_model("cifar-resnet20").eval(), path, 32, target="openvino", metadata=metadata)
    return path


def test_a_file_tuned_for_bfloat16_runs_in_it_where_the_cpu_can(path: Path) -> None:
    pytest.importorskip("openvino")
    usual = load_engine(path, "openvino")
    assert usual.settings.precision == usual.precision == ("bf16" if cpu.cpu_has_bf16() else "fp32")
    assert load_engine(path, "openvino", precision="fp32").precision == "fp32"
    assert load_engine(path).precision == "fp32"  # ONNX Runtime has no other


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_cpu_decides(has: bool, precision: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    for module in (engine, openvino):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: has)
    # OpenVINO compiles when the first images come, so that this runs on any CPU
    assert load_engine(path, "openvino").settings.precision == precision


@pytest.mark.parametrize("tuned", ["fp8", None])
def test_a_precision_that_nobody_has_is_the_usual_one(tuned: object, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    export_onnx(create_model("cifar-resnet20").eval(), path, 32, metadata={"tuned_precision": tuned})
    assert load_engine(path, "openvino").settings.precision == "fp32"

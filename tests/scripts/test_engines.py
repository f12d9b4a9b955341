"""The flags that choose an engine, where it can't be had."""

import pytest
import torch

from effnet_quant.cli.engines import is_engine, usual_backend


@pytest.mark.parametrize(
    ("path", "engine", "backend"),
    [
        ("a/b.onnx", True, "onnxruntime"),
        ("b.plan", True, "tensorrt"),
        ("b.safetensors", False, "torch"),
        ("b.pth.tar", False, "torch"),
    ],
)
def test_the_extension_says_what_a_file_is(path, engine, backend):
    assert is_engine(path) == engine
    assert usual_backend(path) == backend


def test_classify_says_which_files_a_backend_takes(run_script, repository, tmp_path):
    image = repository / "docs" / "demo.png"
    weights = ["--pretrained-from-file", tmp_path / "model.safetensors", "--image", image]
    result = run_script("classify.py", *weights, "--backend", "openvino")
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "openvino takes no weights" in result.err
    result = run_script("classify.py", *weights, "--threads", 2, "--engine-precision", "bf16")
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "--engine-precision, --threads: PyTorch weights are no engine" in result.err
    (tmp_path / "model.plan").write_bytes(b"no plan")
    result = run_script("classify.py", "--pretrained-from-file", tmp_path / "model.plan", "--image", image)
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "TensorRT" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_classify_says_that_there_is_no_card(run_script, repository, tmp_path):
    weights = ["--pretrained-from-file", tmp_path / "model.safetensors", "--image", repository / "docs" / "demo.png"]
    result = run_script("classify.py", *weights, "--device", "cuda")
    assert (result.code, len(result.error_lines)) == (2, 1)
    assert "no CUDA card" in result.err

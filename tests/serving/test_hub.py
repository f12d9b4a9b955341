"""push and from_pretrained against a hub on this machine."""

from __future__ import annotations

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml

from effnet_quant import UserError, calibrate, create_model, export_onnx, from_pretrained, push, quantize, save
from effnet_quant.engines.engine import Engine
from hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("cifar-resnet20", num_classes=5).eval()
    quantize(model, target="onnxruntime")
    calibrate(model, [torch.randn(4, 3, 32, 32)], method="max")
    return model


def test_a_pushed_model_comes_back_to_the_bit_with_a_readme(hub, model):
    assert push(model, "me/tiny") == f"{hub.url}/me/tiny"
    assert hub.private["me/tiny"] is True
    images = torch.randn(2, 3, 32, 32)
    again = from_pretrained("me/tiny")
    assert torch.equal(again(images), model(images))
    readme = hub.repositories["me/tiny"]["README.md"].decode()
    head = yaml.safe_load(readme.split("---")[1])
    assert head == {
        "library_name": "effnet-quant",
        "pipeline_tag": "image-classification",
        "tags": ["effnet-quant", "quantized"],
    }
    for line in ("| architecture | cifar-resnet20 |", "| classes | 5 |", "| weights | int8, per output channel |"):
        assert line in readme
    assert 'from_pretrained("me/tiny")' in readme and "## What is quantized" in readme
    # a README.md of one's own stays, that of push is renewed
    hub.repositories["me/tiny"]["README.md"] = b"mine"
    push(model, "me/tiny")
    assert hub.repositories["me/tiny"]["README.md"] == b"mine"


def test_files_of_a_model_and_of_an_engine(hub, model, tmp_path):
    save(model, tmp_path / "any.safetensors")
    export_onnx(model, tmp_path / "any.onnx", 32)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    push(tmp_path / "any.onnx", "me/both")
    engine = from_pretrained("me/both")
    assert isinstance(engine, Engine) and engine(images).shape == (2, 5)
    push(tmp_path / "any.safetensors", "me/both")
    assert isinstance(from_pretrained("me/both"), torch.nn.Module)
    assert isinstance(from_pretrained("me/both", "model.onnx"), Engine)


def test_what_is_pushed_and_loaded_is_checked(hub, model, tmp_path, monkeypatch):
    torch.save({"weight": torch.ones(1)}, tmp_path / "plain.pth")
    (tmp_path / "bad.onnx").write_bytes(b"no onnx")
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors")
    for name, says in (
        ("plain.pth", "push takes a model"),
        ("bad.onnx", "bad.onnx"),
        ("bad.safetensors", "bad.safetens"),
    ):
        with pytest.raises(UserError, match=says):
            push(tmp_path / name, "me/x")
    with pytest.raises(UserError, match="leave out @v1"):
        push(model, "me/x@v1")
    assert "me/x" not in hub.repositories
    hub.repositories["me/x"] = {"pytorch_model.bin": b"a pickle"}
    with pytest.raises(UserError, match=r"has no model\.safetensors and no model\.onnx"):
        from_pretrained("me/x")
    hub.repositories["me/x"]["model.safetensors"] = b"\x80\x04."
    with pytest.raises(UserError, match=r"model\.safetensors"):
        from_pretrained("me/x")
    with pytest.raises(UserError, match="none of the files that push writes"):
        from_pretrained("me/x", "evil.py")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="me/y at http"):
        push(model, "me/y")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"nothing is pushed: http://127\.0\.0\.1:9 can't be reached"):
        push(model, "me/y")

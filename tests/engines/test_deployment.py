"""deploy.json: read as strictly as any file of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant import UserError, export_onnx, load_engine
from effnet_quant.engines.deployment import Deployment, read_deployment, write_deployment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an engine and its deploy.json; not to be changed."""
    folder = tmp_path_factory.mktemp("deployed")
    torch.manual_seed(0)
    export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), folder / "engine.onnx", 8)
    size = (folder / "engine.onnx").stat().st_size
    write_deployment(Deployment("engine.onnx", size, "openvino", "fp32", 1), folder)
    return folder


def test_load_engine_runs_what_was_chosen(folder: Path) -> None:
    engine = load_engine(folder / "deploy.json")
    assert (engine.backend, engine.settings.precision, engine.settings.threads) == ("openvino", "fp32", 1)
    assert engine.path == folder / "engine.onnx"
    (image,) = engine.example_inputs(1)
    expected = load_engine(folder / "engine.onnx", "onnxruntime")(image)
    np.testing.assert_allclose(engine(image), expected, rtol=1e-4, atol=1e-5)


def test_arguments_win_over_the_file(folder: Path) -> None:
    engine = load_engine(folder / "deploy.json", "onnxruntime", threads=2)
    assert (engine.backend, engine.settings.threads) == ("onnxruntime", 2)


WRONG = {
    "of another project": ({"kind": None, "name": "app", "version": "1.0"}, "no deploy.json of effnet-quant"),
    "newer": ({"version": 2}, "reads version 1"),
    "true version": ({"version": True}, "has the version True"),
    "unknown entry": ({"command": "rm"}, "check 'command'"),
    "above its folder": ({"file": "../engine.onnx"}, "a file in its own folder"),
    "absolute": ({"file": "/etc/passwd"}, "a file in its own folder"),
    "its folder": ({"file": ".."}, "a file in its own folder"),
    "no name": ({"file": 3}, "a file in its own folder"),
    "missing file": ({"file": "other.onnx"}, "not beside it"),
    "other size": ({"size_bytes": 7}, "copy the whole folder again"),
    "huge size": ({"size_bytes": 1 << 80}, "a number of bytes"),
    "other backend": ({"backend": "tflite"}, "backend must be one of"),
    "list as backend": ({"backend": ["openvino"]}, "backend must be one of"),
    "other precision": ({"precision": "int4"}, "precision must be one of"),
    "no threads": ({"threads": 0}, "threads must be null or"),
    "true threads": ({"threads": True}, "threads must be null or"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(folder: Path, tmp_path: Path, changes: dict, says: str) -> None:
    values = json.loads((folder / "deploy.json").read_text()) | changes
    (tmp_path / "engine.onnx").write_bytes((folder / "engine.onnx").read_bytes())
    (tmp_path / "deploy.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )
    with pytest.raises(UserError, match=says) as raised:
        load_engine(tmp_path / "deploy.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 50_000, b'{"kind": "' + b"x" * 70_000 + b'"}', b"null"]
)
def test_what_is_no_description_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "deploy.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no deploy\.json of effnet-quant"):
        read_deployment(path)

"""Other networks than EfficientNet go through the same scripts; weights come from files, checkpoints and servers."""

from __future__ import annotations

import dataclasses
import http.server
import shlex
import threading
from functools import partial

import onnx
import pytest
import torch

from effnet_quant import create_model
from effnet_quant.models import registry
from effnet_quant.models.weights import read_weights, write_weights

TRAIN = shlex.split("--num-classes 3 --prof 2 -b 6 --data-backend pytorch -j 0 --seed 1 --lr 0.001 -p 1")
NETWORKS = {
    "cifar-resnet20": [],
    "timm:test_efficientnet": ["--image-size", "64"],
    "torchvision:squeezenet1_1": ["--image-size", "64"],
}


def succeeded(result):
    assert result.code == 0, result.err
    return result


def classes(result):
    return {line.split()[-1] for line in result.out.splitlines()[1:]}


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch.startswith("timm:") else pytest.mark.slow) for arch in NETWORKS]
)
def test_a_network_is_trained_quantized_and_classifies_under_one_name(run_script, image_folder, tmp_path, arch):
    network = ["--arch", arch, *NETWORKS[arch]]
    run = [image_folder, *network, *TRAIN, "--epochs", 1]
    succeeded(run_script("main.py", *run, "--workspace", tmp_path / "float"))
    start = ["--pretrained-from-file", tmp_path / "float" / "model_best.pth.tar"]
    succeeded(run_script("quant_main.py", *run, *start, "--workspace", tmp_path / "int8"))
    images = ["--image", image_folder / "val/cat/00.jpg"]
    for kind in ("float", "int8"):
        weights = tmp_path / f"{kind}.safetensors"
        checkpoint = tmp_path / kind / "model_best.pth.tar"
        succeeded(run_script("checkpoint2model.py", "--checkpoint-path", checkpoint, "--weight-path", weights))
        assert read_weights(weights).has_ranges is (kind == "int8")
        result = succeeded(run_script("classify.py", *network, "--pretrained-from-file", weights, *images))
        assert classes(result) == {"apple", "bear", "cat"}
        assert "ranges in the weights are left out" not in result.err
        engine = ["--pretrained-from-file", tmp_path / f"{kind}.onnx"]
        export = ["--pretrained-from-file", weights, "--output", tmp_path / f"{kind}.onnx"]
        succeeded(run_script("model2onnx.py", "--arch", arch, *export))  # the image size is the weights' own
        assert ("QuantizeLinear" in {node.op_type for node in onnx.load(engine[1]).graph.node}) is (kind == "int8")
        assert classes(succeeded(run_script("classify.py", *engine, *images))) == {"apple", "bear", "cat"}


def test_weights_for_other_classes_start_with_a_new_classifier_when_asked(run_script, image_folder, tmp_path):
    weights = tmp_path / "five.safetensors"
    write_weights(weights, create_model("cifar-resnet20", 5).state_dict())
    run = [image_folder, "--arch", "cifar-resnet20", *TRAIN, "--pretrained-from-file", weights, "--epochs", 0]
    result = succeeded(run_script("main.py", *run, "--workspace", tmp_path))
    assert f"note: {weights} is for 5 classes; the classifier starts anew" in result.err
    assert "top1" not in result.err


def test_the_moving_average_of_a_checkpoint_is_chosen_by_a_flag(run_script, tmp_path):
    checkpoint = tmp_path / "checkpoint.pth.tar"
    state = {kind: create_model("cifar-resnet20", 3).state_dict() for kind in ("state_dict", "state_dict_ema")}
    torch.save({"epoch": 1, **state}, checkpoint)
    for flags, kind in (([], "state_dict"), (["--ema"], "state_dict_ema")):
        output = tmp_path / f"{kind}.pth"
        extract = ["--checkpoint-path", checkpoint, "--weight-path", output]
        succeeded(run_script("checkpoint2model.py", *extract, *flags))
        assert torch.equal(read_weights(output).tensors["linear.weight"], state[kind]["linear.weight"])


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A server of a folder, to which the registry's cifar-resnet20 leads; yields the folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/resnet20.th"
        entry = dataclasses.replace(
            registry.get_entry("cifar-resnet20"), weights_at=url, fetch_weights=partial(registry._published, url)
        )
        monkeypatch.setitem(registry._ENTRIES, entry.name, entry)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        yield folder
        server.shutdown()


def test_published_weights_are_downloaded_once_and_classify(run_script, image_folder, publisher, tmp_path):
    model = create_model("cifar-resnet20")
    published = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": published, "best_prec1": 91.7}, publisher / "resnet20.th")  # as its authors do
    classify = ["--arch", "cifar-resnet20", "--pretrained", "--image", image_folder / "val/cat/00.jpg"]
    first = succeeded(run_script("classify.py", *classify))
    assert "downloading http://127.0.0.1" in first.err
    (publisher / "resnet20.th").unlink()
    second = succeeded(run_script("classify.py", *classify))
    assert second.out == first.out
    assert "downloading" not in second.err


def test_a_server_without_the_weights_is_one_sentence_with_status_2(run_script, image_folder, publisher, tmp_path):
    run = [image_folder, "--arch", "cifar-resnet20", *TRAIN, "--pretrained", "--workspace", tmp_path / "run"]
    result = run_script("main.py", *run)
    assert result.code == 2
    (line,) = result.error_lines
    assert "the server answers 404" in line
    assert "--pretrained-from-file" in line
    assert not (tmp_path / "run").exists()

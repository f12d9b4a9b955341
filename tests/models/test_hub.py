"""timm's weights and hf-hub: names, from a hub on this machine."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save as to_bytes

from effnet_quant import UserError, create_model
from effnet_quant.models.registry import get_entry
from hub_server import HubServer

NOWHERE = "http://127.0.0.1:9"  # the port of "discard", where nothing listens
TINY = "test_resnet"  # timm's network for tests, 470,000 parameters


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7).state_dict()


@pytest.fixture
def repository(hub, weights):
    config = {"input_size": [3, 96, 96], "crop_pct": 0.75, "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 7}
    files = {"config.json": json.dumps({"architecture": TINY, "num_classes": 7, "pretrained_cfg": config}).encode()}
    hub.repositories["some-one/tiny"] = {**files, "model.safetensors": to_bytes(weights)}
    return hub.repositories["some-one/tiny"]


def test_published_weights_of_timm_come_as_safetensors(hub):
    torch.manual_seed(1)
    published = timm.create_model(TINY).state_dict()
    hub.repositories[timm.get_pretrained_cfg(TINY).hf_hub_id] = {"model.safetensors": to_bytes(published)}
    model = create_model(f"timm:{TINY}", pretrained=True)
    assert all(torch.equal(tensor, published[name]) for name, tensor in model.state_dict().items())
    assert not any("pytorch_model.bin" in line for line in hub.requests)


def test_weights_that_cannot_be_reached_are_one_sentence_at_once(monkeypatch, tmp_path, capfd, caplog):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"can't be downloaded: http://127\.0\.0\.1:9 can't be reached; try again"):
        create_model(f"timm:{TINY}", pretrained=True)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


@pytest.mark.parametrize("name", ["hf-hub:some-one/tiny", "timm:hf-hub:some-one/tiny@main"])
def test_a_repository_is_its_architecture_with_its_weights_and_images(repository, weights, name):
    model = create_model(name, pretrained=True)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    card = model._built.card
    assert (card.arch, card.num_classes) == (f"timm:{TINY}", 7)
    assert (card.input.image_size, card.input.resize_size, card.input.mean) == (96, 128, (0.5, 0.5, 0.5))


def test_what_was_downloaded_serves_offline(repository, weights, monkeypatch):
    create_model("hf-hub:some-one/tiny", pretrained=True)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    model = create_model("hf-hub:some-one/tiny", pretrained=True)
    assert torch.equal(model.state_dict()["fc.weight"], weights["fc.weight"])
    with pytest.raises(UserError, match=r"some-one/other can't be downloaded"):
        get_entry("hf-hub:some-one/other")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "holds no model of timm's; effnet_quant.from_pretrained loads"),
        ({}, "holds no model of timm's"),
        ({"architecture": "os.system"}, "holds no model of timm's"),
        ({"architecture": TINY}, "does not say how many classes"),
        ({"architecture": TINY, "num_classes": 10**9}, "does not say how many classes"),
        ({"architecture": TINY, "num_classes": 7, "pretrained_cfg": 3}, "does not say how many classes"),
        ({"architecture": TINY, "num_classes": 7, "input_size": "abc"}, "does not say what images"),
        ({"architecture": TINY, "num_classes": 7, "crop_pct": 0}, "does not say what images"),
        ({"architecture": TINY, "num_classes": 7, "model_args": {"width": 10**9}}, "arguments of its own"),
        ([1], "holds no settings of a model"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(repository, config, says):
    del repository["config.json"]
    if config is not None:
        repository["config.json"] = json.dumps(config).encode()
    with pytest.raises(UserError, match=says):
        get_entry("hf-hub:some-one/tiny")


def test_pickles_and_wrong_names_are_refused(repository):
    repository["pytorch_model.bin"] = repository.pop("model.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors; other formats are not read from strangers"):
        get_entry("hf-hub:some-one/tiny").pretrained()
    for name, says in (
        ("tiny", "is no repository of a hub; it is ORG/NAME"),
        ("a/../b", "is no repository"),
        ("some-one/gone", "has no repository some-one/gone that you may read"),
        ("some-one/tiny@gone", "some-one/tiny@gone at http"),
    ):
        with pytest.raises(UserError, match=says):
            get_entry(f"hf-hub:{name}")

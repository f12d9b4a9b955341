"""Mutated files at every entry point, in one process: each is taken or ends in a UserError, soon and with nothing written.

The quick part runs with the other tests. ``python -m pytest tests/fuzz -m slow -s`` throws 1,000 files of each kind and
prints how many were tried, held and refused.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import yaml

from effnet_quant import calibrate, export_onnx, load_engine
from effnet_quant.api import build, choose_card
from effnet_quant.card import CARD_KEY, ModelCard
from effnet_quant.checks.lint import lint_tensorrt
from effnet_quant.cli import launch
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.shards import ShardSource, pack
from effnet_quant.engines.onnx_file import load_onnx, read_onnx
from effnet_quant.errors import UserError
from effnet_quant.models.weights import read_weights, write_weights
from effnet_quant.recipes.recipe import load_recipes, resolve
from effnet_quant.serving.settings import Serving
from effnet_quant.serving.triton_repository import model_config
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.trainer import Trainer
from fuzz.mutations import mutated_bytes, mutated_onnx, mutated_recipe, mutated_values

SEED = 20260
SECONDS = 20  # for one file, on a machine with other work
MEBIBYTES = 1500  # that all files together may add to the process

IMAGES = np.zeros((1, 3, 32, 32), np.float32)
RECIPE = {
    "precision": {"FP32": {"amp": False}},
    "platform": {"CPU": {"workers": 2}},
    "models": {"efficientnet-b0": {"CPU": {"FP32": {"batch_size": 8, "lr": 0.5}}}},
    "mode": {"evaluate": {"evaluate": True, "epochs": 3}},
    "model_mode": {"efficientnet-b0": {"evaluate": {"dropout": 0.1}}},
}


@dataclass
class Good:
    """Good files, and what the mutations start from."""

    folder: Path
    card: ModelCard
    tensors: dict
    checkpoint: dict
    model: onnx.ModelProto
    index: dict


@pytest.fixture(scope="module")
def good(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    card = replace(choose_card("cifar-resnet20", num_classes=3, quantized=True), classes=("apple", "bear", "cat"))
    model = calibrate(build(card).eval(), [torch.randn(2, 3, 32, 32)], method="max")
    write_weights(folder / "good.safetensors", model.state_dict(), card)
    export_onnx(model, folder / "good.onnx", 32, card=card)
    trainer(folder).save()
    pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    list(pack(FolderSource(image_folder / "val"), folder / "shards"))
    return Good(
        folder,
        card,
        read_weights(folder / "good.safetensors").tensors,
        torch.load(folder / "checkpoint.pth.tar", weights_only=True),
        onnx.load(folder / "good.onnx"),
        json.loads((folder / "shards/index.json").read_text()),
    )


def trainer(folder):
    card = choose_card("cifar-resnet20", num_classes=3)
    config = TrainConfig(epochs=2, batch_size=2, optimizer_batch_size=2, use_ema=0.9)
    return Trainer(build(card), config, card, torch.device("cpu"), folder, Recorder(None))


def take_weights(path, good):
    load_engine(path, "torch")(IMAGES)


def take_checkpoint(path, good):
    own = trainer(good.folder / "nowhere")
    own.resume(load_checkpoint(path), str(path))
    own.model(torch.zeros(2, 3, 32, 32)).sum().backward()
    own.optimizer.step()


def take_onnx(path, good):
    file = read_onnx(path)
    lint_tensorrt(load_onnx(path))
    model_config("m", file.signature, file.card, Serving("onnxruntime", "cpu"))
    load_engine(path, threads=1)(IMAGES)


def take_card(path, good):
    card = ModelCard.from_text(path.read_text(), str(path))
    if card.num_classes is None or card.num_classes <= 1000:  # a person who asks for more gets more
        build(card)


def take_index(path, good):
    source = ShardSource(str(path.parent))
    for index in range(min(len(source), 3)):
        source.read(index)
    source.samples(source.urls[0]) if source.urls else None


def take_recipe(path, good):
    resolve(load_recipes(path), model="efficientnet-b0", mode="evaluate", platform="CPU", precision="FP32")
    launch.job(["--cfg_file", str(path), "--list"])


def make_weights(good, chance):
    tensors = good.tensors
    if chance.random() < 0.4:
        changed = mutated_values(tensors, chance)
        plain = {
            str(name): tensor.contiguous()
            for name, tensor in (changed.items() if isinstance(changed, dict) else ())
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.numel() < 10**6
        }
        tensors = {name: tensor.clone() for name, tensor in plain.items()}
    card = mutated_values(good.card.to_json(), chance) if chance.random() < 0.4 else good.card.to_json()
    content = safetensors.torch.save(tensors, {CARD_KEY: json.dumps(card)})
    kind = chance.randrange(4)
    if kind == 0:
        return mutated_bytes(content, chance)
    if kind == 1:  # the header alone: names, types, shapes and places of the tensors
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(mutated_values(json.loads(content[8 : 8 + length]), chance)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    return content


def make_checkpoint(good, chance):
    path = good.folder / "mutated.pth.tar"
    values = mutated_values(good.checkpoint, chance)
    torch.save(values, path)
    content = path.read_bytes()
    path.unlink()
    return mutated_bytes(content, chance) if chance.random() < 0.25 else content


def make_onnx(good, chance):
    return mutated_onnx(good.model, chance)


def make_card(good, chance):
    text = json.dumps(mutated_values(good.card.to_json(), chance)).encode()
    return mutated_bytes(text, chance).decode(errors="replace").encode() if chance.random() < 0.3 else text


def make_index(good, chance):
    text = json.dumps(mutated_values(good.index, chance)).encode()
    return mutated_bytes(text, chance) if chance.random() < 0.3 else text


def make_recipe(good, chance):
    return mutated_recipe(RECIPE, chance)


KINDS = {
    "weights": ("w.safetensors", make_weights, take_weights),
    "checkpoint": ("c.pth.tar", make_checkpoint, take_checkpoint),
    "onnx": ("m.onnx", make_onnx, take_onnx),
    "card": ("card.json", make_card, take_card),
    "index": ("shards/index.json", make_index, take_index),
    "recipe": ("own.yml", make_recipe, take_recipe),
}


class TooSlow(BaseException):
    """A file took longer than SECONDS."""


def _too_slow(number, frame):
    raise TooSlow


def throw(kind, count, good, tmp_path, capsys):
    """Throws ``count`` mutated files of a kind at its entry points; returns how many were refused."""
    name, make, take = KINDS[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "index":
        for shard in (good.folder / "shards").glob("*.tar"):
            (path.parent / shard.name).write_bytes(shard.read_bytes())
    expected = sorted([*tmp_path.rglob("*"), path])
    before = signal.signal(signal.SIGALRM, _too_slow)
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, failures = 0, []
    try:
        for number in range(count):
            chance = random.Random(f"{SEED} {kind} {number}")
            path.write_bytes(make(good, chance))
            signal.alarm(SECONDS)
            try:
                take(path, good)
            except UserError as error:
                refused += 1
                if not str(error).isprintable() and "\u200d" not in str(error):
                    failures.append(f"{number}: {str(error)!r:.200}")
            except (Exception, TooSlow) as error:
                frames = traceback.extract_tb(error.__traceback__)
                frame = [frame for frame in frames if "site-packages" not in frame.filename][-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                failures.append(f"{number}: {type(error).__name__}: {str(error)[:120]!r} at {where}")
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
    capsys.readouterr()
    with capsys.disabled():
        if count > 100:
            print(
                f"\n{kind}: {count} tried, {count - len(failures)} held, {refused} refused, "
                f"{time.monotonic() - start:.0f} s, peak memory grew by {grown} MiB",
                file=sys.stderr,
            )
    assert not failures, "\n".join(failures[:20])
    assert sorted(tmp_path.rglob("*")) == sorted(set(expected)), "a file was written"
    assert grown < MEBIBYTES
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutated_files_are_taken_or_refused(kind, good, tmp_path, capsys):
    assert throw(kind, 15, good, tmp_path, capsys) >= 5  # else the mutations are too mild to test anything


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutated_files_are_taken_or_refused(kind, good, tmp_path, capsys):
    assert throw(kind, 1000, good, tmp_path, capsys) >= 200


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_files_are_taken(kind, good, tmp_path):
    name, _, take = KINDS[kind]
    path = {"weights": "good.safetensors", "checkpoint": "checkpoint.pth.tar", "onnx": "good.onnx"}.get(kind, name)
    (good.folder / "card.json").write_text(json.dumps(good.card.to_json()))
    (good.folder / "own.yml").write_text(yaml.safe_dump(RECIPE))
    take(good.folder / path, good)

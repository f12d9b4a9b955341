"""The climb from cheap to dear: where it stops, and what is left when it is stopped."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time

import numpy as np
import pytest
import torch

from effnet_quant import ModelCard, TrainConfig, UserError, create_model, load_engine
from effnet_quant.card import InputSpec
from effnet_quant.data.arrays import DigitsSource
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.jobs.autoquant import ENGINE, TABLE, WEIGHTS, autoquant
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.run import calibration_loader, hold_back, open_run
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import read_weights, write_weights
from effnet_quant.quantization.ptq.adaptive_rounding import AdaptiveRounding
from effnet_quant.quantization.ptq.calibration_choice import Calibration
from effnet_quant.quantization.qat import QatConfig
from effnet_quant.quantization.spec import resolve_spec

ARCH, SIZE = "cifar-resnet20", 16
SPEC = InputSpec(SIZE, SIZE, mean=get_entry(ARCH).input.mean, std=get_entry(ARCH).input.std)


def digits(split):
    loader = Loader(DigitsSource(split), evaluation_transform(SPEC), 100)
    pairs = [(normalize(pixels, SPEC), labels) for pixels, labels in loader.epoch()]
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that reads digits: its features are random, its classifier is the best linear one."""
    torch.manual_seed(0)
    model = create_model(ARCH, 10).eval()
    images, labels = digits("train")
    seen = []
    handle = model.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in images.split(200):
            model(batch)
    handle.remove()
    features = torch.cat(seen).double()
    features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    truth = torch.nn.functional.one_hot(labels, 10).double()
    solved = torch.linalg.solve(features.T @ features + 1e-6 * torch.eye(features.shape[1]), features.T @ truth)
    with torch.no_grad():
        model.linear.weight.copy_(solved[:-1].T)
        model.linear.bias.copy_(solved[-1])
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    write_weights(path, model.state_dict(), ModelCard(ARCH, num_classes=10))
    return path


def opened(weights, folder, spec, epochs=0):
    card = ModelCard(ARCH, input=SPEC, quant_spec=resolve_spec(spec).to_json())
    config = TrainConfig(epochs=epochs, batch_size=64, workers=0, seed=0, lr=0.002, prof=3 if epochs else -1)
    place, start = PlaceConfig(workspace=str(folder)), StartConfig(weights=str(weights))
    return open_run(card, DataConfig("digits"), config, place, start, quantized=True)


QAT = QatConfig(calibration_images=64)


def test_the_first_network_that_meets_the_target_ends_the_climb(weights, tmp_path):
    with opened(weights, tmp_path, "w8a8") as run:
        climb = autoquant(run, QAT, tmp_path, target_drop=5.0)
    assert [tried.name for tried in climb.tried] == ["minmax"]
    assert climb.reached
    assert climb.best == "minmax"
    assert climb.ended == "the target is met"
    # the files are the network that was judged, and the engine has the score of the table
    images, labels = digits("val")
    score = 100 * np.mean(load_engine(tmp_path / ENGINE)(images.numpy()).argmax(1) == labels.numpy())
    assert climb.tried[0].verdict.score == pytest.approx(score)
    loaded = create_model(ARCH, weights=tmp_path / WEIGHTS).eval()
    with torch.no_grad():
        simulated = 100 * (loaded(images).argmax(1) == labels).double().mean().item()
    assert abs(simulated - score) < 1
    stored = json.loads((tmp_path / TABLE).read_text())
    assert stored["best"] == "minmax"
    assert stored["reached"] is True
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_unreachable_target_climbs_to_the_top_and_keeps_the_best(weights, tmp_path):
    with opened(weights, tmp_path, "w4a8", epochs=1) as run:
        climb = autoquant(
            run,
            QAT,
            tmp_path,
            target_drop=0.0,
            recipes={"minmax": (Calibration("percentile"),), "short": (Calibration("percentile"), AdaptiveRounding(3))},
        )
    names = [tried.name for tried in climb.tried]
    assert names == ["minmax", "short", "mixed precision", "QAT with distillation"][: len(names)]
    assert climb.reached or climb.ended == "no step met the target"
    assert len(names) == 4 or climb.reached
    scores = {tried.name: tried.verdict.score for tried in climb.tried}
    assert scores[climb.best] == max(scores.values())
    stored = read_weights(tmp_path / WEIGHTS)
    assert stored.card == climb.card
    images, labels = digits("val")
    score = 100 * np.mean(load_engine(tmp_path / ENGINE)(images.numpy()).argmax(1) == labels.numpy())
    assert score == pytest.approx(scores[climb.best])
    if "mixed precision" in scores:
        mixed = next(tried for tried in climb.tried if tried.name == "mixed precision")
        assert sum(map(int, re.findall(r"(\d+) layers", mixed.note))) == 20
        assert scores["mixed precision"] > scores["minmax"]
    assert "best" in str(climb)


def test_time_that_is_over_keeps_what_was_found(weights, tmp_path, monkeypatch):
    def slow(model, batches, context):
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)  # an hour goes by
        context.progress("slow", 0, 1)

    with opened(weights, tmp_path, "w4a8") as run:
        climb = autoquant(
            run,
            QAT,
            tmp_path,
            target_drop=0.0,
            time_budget=1800,
            recipes={"minmax": (Calibration("percentile"),), "slow": (slow,), "never": ()},
        )
    assert climb.ended == "the time budget is spent"
    assert [tried.note for tried in climb.tried] == ["", "the time was over"]
    assert climb.best == "minmax"
    assert (tmp_path / WEIGHTS).is_file()


def test_a_step_that_fails_is_noted_and_the_climb_goes_on(weights, tmp_path):
    def fails(model, batches, context):
        raise UserError("there is nothing to equalize.")

    with opened(weights, tmp_path, "w8a8") as run:
        climb = autoquant(
            run, QAT, tmp_path, target_drop=5.0, recipes={"fails": (fails,), "minmax": (Calibration("percentile"),)}
        )
    assert [tried.note for tried in climb.tried] == ["there is nothing to equalize.", ""]
    assert climb.best == "minmax"


def test_held_back_images_are_in_neither_calibration_nor_training(weights, tmp_path):
    with opened(weights, tmp_path, "w8a8", epochs=1) as run:
        calibration = calibration_loader(run, 100)._indices
        before = set(run.train._indices.tolist())
        held = hold_back(run, 200, 100)._indices
        assert len(set(held.tolist())) == 200
        assert not set(held.tolist()) & set(calibration.tolist())
        assert set(run.train._indices.tolist()) == before - set(held.tolist())
        with pytest.raises(UserError, match="can't be held back"):
            hold_back(run, len(before), 100)


FLAGS = shlex.split(
    f"digits --arch {ARCH} --num-classes 10 --image-size {SIZE} -b 64 -j 0 --seed 0 --data-backend pytorch "
    "--calibration-images 64 --auto --target-drop 0 --quant-spec w4a4"
)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_best_so_far_outlives_a_signal(start_process, weights, tmp_path, number):
    command = [*FLAGS, "--pretrained-from-file", weights, "--workspace", tmp_path]
    with start_process("quant_main.py", *command, cwd=tmp_path) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if (tmp_path / TABLE).is_file() and json.loads((tmp_path / TABLE).read_text())["best"]:
                process.send_signal(number)
                break
            time.sleep(0.05)
        _, err = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 130), err
    assert create_model(ARCH, weights=tmp_path / WEIGHTS).eval()(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 10)
    assert load_engine(tmp_path / ENGINE).card.quant_spec is not None
    if number == signal.SIGINT:
        assert f"stopped by SIGINT; the best so far is {tmp_path / WEIGHTS}" in err
        assert json.loads((tmp_path / TABLE).read_text())["ended"] == "a signal ended it"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--auto", "give it with --target-drop"),
        ("--target-drop 1 --budget latency=3", "give one of them"),
        ("--time-budget 20m", "belongs to --auto"),
        ("--auto --target-drop 1 --time-budget soon", "such as 90s, 20m or 2h"),
        ("--auto --target-drop 1 --calibration-method mse", "choose ranges themselves"),
        ("--auto --target-drop -1", "at least 0 points"),
        ("--budget energy=3", "a budget limits one of"),
        ("--target-drop 1 --quant-spec w4a8", "choose the spec of each layer"),
        ("--auto --target-drop 1 --evaluate", "a search starts from float weights"),
    ],
)
def test_flags_that_do_not_go_together(run_script, weights, tmp_path, flags, sentence):
    command = [*FLAGS[:-5], *shlex.split(flags), "--pretrained-from-file", weights, "--workspace", tmp_path]
    result = run_script("quant_main.py", *command)
    assert result.code == 2
    assert sentence in result.err
    assert len(result.error_lines) == 1


def test_a_budget_gives_a_network_with_the_bits_of_each_layer(run_script, weights, tmp_path):
    command = [*FLAGS[:-5], "--budget", "weight-bytes=60%", "--epochs", 0, "--pretrained-from-file", weights]
    result = run_script("quant_main.py", *command, "--workspace", tmp_path)
    assert result.code == 0, result.err
    spec = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["metadata"]["quant_spec"]
    bits = {name: 32 if own is None else own["weight"]["bits"] for name, own in spec["overrides"]}
    layers = {name: module for name, module in create_model(ARCH, 10).named_modules() if hasattr(module, "weight")}
    counts = {name: module.weight.numel() for name, module in layers.items() if module.weight.dim() > 1}
    assert set(bits) <= set(counts)
    assert (
        0.5
        < sum(bits.get(name, 8) * count for name, count in counts.items()) / sum(8 * n for n in counts.values())
        <= 0.6
    )
    assert "weight-bytes: chosen" in result.out

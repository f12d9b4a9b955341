"""Two processes train and validate as one does."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from effnet_quant.errors import UserError
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.distributed import World
from effnet_quant.training.metrics import Recorder

CHECKPOINT = "checkpoint.pth.tar"


@pytest.fixture(scope="module")
def results(run_process, tmp_path_factory):
    """The folder that two_processes.py wrote to."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    result = run_process("multiproc.py", "--nproc_per_node", 2, script, folder, cwd=folder)
    assert result.code == 0, result.err
    return folder


def lines(path):
    return [json.loads(line)["data"] for line in path.read_text().splitlines()]


def test_losses_weights_and_validation_are_those_of_one_process_with_the_doubled_batch(
    results, tiny_network, make_trainer, make_loaders, tmp_path
):
    model = tiny_network(batch_norm=False, dropout=0.0)
    raport = tmp_path / "raport.json"
    trainer = make_trainer(model, tmp_path, Recorder(raport), batch_size=8, use_ema=0.9, clip_grad_norm=0.5)
    trainer.fit(*make_loaders(8, count=49, val_count=101))
    two = load_checkpoint(results / "doubled" / CHECKPOINT)
    one = load_checkpoint(tmp_path / CHECKPOINT)
    assert two["step"] == one["step"] == 12
    for key in ("state_dict", "state_dict_ema"):
        for name, tensor in one[key].items():
            torch.testing.assert_close(two[key][name], tensor, rtol=1e-4, atol=1e-6)
    # 101 images, 51 and 50 a process, the last batches 3 and 2: each counts once
    for ours, theirs in zip(lines(results / "doubled/raport.json"), lines(raport), strict=True):
        for name in ("train.loss", "val.loss", "val_ema.loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
        for name in ("val.top1", "val_ema.top1"):
            assert ours[name] == theirs[name]
            assert round(ours[name] * 1.01) == pytest.approx(ours[name] * 1.01, abs=1e-9)  # a share of 101


def test_validation_counts_each_image_once_where_processes_have_different_numbers_of_batches(
    results, tiny_network, make_trainer, make_loaders, tmp_path
):
    both = json.loads((results / "uneven/metrics.json").read_text())
    for metrics, (count, batch_size) in zip(both, ((101, 50), (1, 4)), strict=True):
        expected = make_trainer(tiny_network(), tmp_path).evaluate(make_loaders(batch_size, val_count=count)[1])
        assert metrics["val.loss"] == pytest.approx(expected["val.loss"], abs=1e-5)
        assert metrics["val.top1"] == pytest.approx(expected["val.top1"], abs=1e-9)


def test_the_process_whose_loss_is_no_number_names_its_images(results, make_loaders):
    (kind, sentence), (other, _) = (json.loads((results / "diverging" / f"{r}.json").read_text()) for r in (1, 0))
    assert (kind, other) == ("UserError", "PeerLost")
    train, _ = make_loaders(4, count=49, world=World(rank=1, size=2))
    assert "epoch 1, batch 2" in sentence
    assert f"to blame: {', '.join(train.names(0, 1))};" in sentence


def test_processes_that_stand_at_different_places_do_not_start(results):
    for rank in range(2):
        kind, sentence = json.loads((results / "apart" / f"{rank}.json").read_text())
        assert kind == "UserError"
        assert "different places of the training" in sentence


def test_a_signal_to_one_process_stops_all_after_the_same_step(results):
    position = json.loads((results / "interrupted/position.json").read_text())
    assert position == {"signals": [signal.SIGUSR1] * 2, "epoch": 0, "batch": 2}


def test_resuming_within_an_epoch_is_bit_exact_in_two_processes(results):
    straight, resumed = (load_checkpoint(results / name / CHECKPOINT) for name in ("straight", "interrupted"))
    for key in ("state_dict", "state_dict_ema"):
        assert straight[key].keys() == resumed[key].keys()
        for name, tensor in straight[key].items():
            assert torch.equal(resumed[key][name], tensor), name
    assert all(torch.equal(one, other) for one, other in zip(straight["rng"], resumed["rng"], strict=True))
    assert not torch.equal(*straight["rng"])  # each process draws its own dropout


def test_resuming_within_an_epoch_needs_as_many_processes(results, tiny_network, make_trainer, tmp_path):
    state = load_checkpoint(results / "straight" / CHECKPOINT)
    state["batch"] = 1
    with pytest.raises(UserError, match="middle of an epoch; resume it with 2 processes"):
        make_trainer(tiny_network(), tmp_path).resume(state, CHECKPOINT)

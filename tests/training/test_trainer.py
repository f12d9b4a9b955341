"""The loop: what it computes, how it stops, and that it goes on as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effnet_quant.data.transforms import normalize
from effnet_quant.errors import UserError
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.schedules import learning_rate
from effnet_quant.training.signals import Interrupted

CHECKPOINT = "checkpoint.pth.tar"
LATENCIES = ("", "_at50", "_at95", "_at99", "_at100")


@pytest.fixture
def straight(tiny_network, make_trainer, make_loaders, tmp_path):
    """The model after two epochs without interruption."""
    model = tiny_network()
    make_trainer(model, tmp_path / "straight", save_checkpoints=False).fit(*make_loaders())
    return model


def go_on(model, trainer, path, loaders):
    """Resume in a new trainer whose random state is another."""
    torch.manual_seed(999)
    trainer.resume(load_checkpoint(path), str(path))
    trainer.fit(*loaders)
    return model


def fit_until(trainer, train, val):
    with pytest.raises(Interrupted) as stop:
        trainer.fit(train, val)
    assert stop.value.signal_number == signal.SIGUSR1


def test_training_is_the_plain_loop(tiny_network, make_trainer, make_loaders, preprocessing, tmp_path, same_weights):
    ours, reference = tiny_network(), tiny_network()
    trainer = make_trainer(ours, tmp_path, label_smoothing=0.1, weight_decay=0.01, momentum=0.8)
    torch.manual_seed(3)
    trainer.fit(*make_loaders())

    norm = list(reference[1].parameters())
    others = [reference[0].weight, *reference[5].parameters()]
    optimizer = torch.optim.SGD(
        [{"params": norm, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.01}],
        lr=1.0,
        momentum=0.8,
        fused=True,  # rounds otherwise than the loop over parameters
    )
    train, _ = make_loaders()
    batches = [list(train.epoch(epoch)) for epoch in range(2)]
    torch.manual_seed(3)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("cosine", epoch, base_lr=0.05, epochs=2)
        for images, labels in batches[epoch]:
            optimizer.zero_grad()
            F.cross_entropy(reference(normalize(images, preprocessing)), labels, label_smoothing=0.1).backward()
            optimizer.step()
    assert same_weights(ours, reference)


def test_same_seed_gives_the_same_bits(straight, tiny_network, make_trainer, make_loaders, tmp_path, same_weights):
    again = tiny_network()
    make_trainer(again, tmp_path).fit(*make_loaders())
    assert same_weights(again, straight)
    other = tiny_network()
    torch.manual_seed(1)  # another dropout
    make_trainer(other, tmp_path).fit(*make_loaders())
    assert not same_weights(other, straight)


def test_resuming_between_epochs_is_bit_exact(
    straight, tiny_network, make_trainer, make_loaders, tmp_path, same_weights
):
    make_trainer(tiny_network(), tmp_path, run_epochs=1).fit(*make_loaders())
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (1, 0)
    model = tiny_network(seed=7)
    go_on(model, make_trainer(model, tmp_path), tmp_path / CHECKPOINT, make_loaders())
    assert same_weights(model, straight)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "rmsprop"},
        {"optimizer": "adamw", "layer_decay": 0.5, "clip_grad_norm": 0.1, "random_erasing": 0.5, "freeze": ("1",)},
    ],
    ids=lambda config: config["optimizer"],
)
def test_resuming_an_accumulating_training_within_an_epoch_is_bit_exact(
    tiny_network, make_trainer, make_loaders, watch, tmp_path, same_weights, config
):
    config = {**config, "lr": 0.001, "optimizer_batch_size": 8}
    straight, stopped, model = tiny_network(dropout=0.0), tiny_network(dropout=0.0), tiny_network(seed=7, dropout=0.0)
    train, val = make_loaders()
    make_trainer(straight, tmp_path, **config).fit(train, val)
    trainer = make_trainer(stopped, tmp_path, **config)
    fit_until(trainer, watch(train, 3, lambda: trainer.note_signal(signal.SIGUSR1)), val)
    assert load_checkpoint(tmp_path / CHECKPOINT)["batch"] == 4
    go_on(model, make_trainer(model, tmp_path, **config), tmp_path / CHECKPOINT, (train, val))
    assert same_weights(model, straight)


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_resuming_within_an_epoch_is_bit_exact(
    straight, tiny_network, make_trainer, make_loaders, watch, tmp_path, same_weights, steps
):
    trainer = make_trainer(tiny_network(), tmp_path)
    train, val = make_loaders()
    fit_until(trainer, watch(train, steps, lambda: trainer.note_signal(signal.SIGUSR1)), val)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    # behind the last batch there is still the validation of its epoch to do
    assert (state["epoch"], state["batch"]) == {1: (0, 1), 3: (0, 3), 5: (0, 5), 7: (1, 2)}[steps]
    model = tiny_network(seed=7)
    go_on(model, make_trainer(model, tmp_path), tmp_path / CHECKPOINT, make_loaders())
    assert same_weights(model, straight)


def test_resuming_within_validation_is_bit_exact_and_validates_again(
    straight, tiny_network, make_trainer, make_loaders, watch, tmp_path, same_weights
):
    trainer = make_trainer(tiny_network(), tmp_path)
    train, val = make_loaders()
    fit_until(trainer, train, watch(val, 2, lambda: trainer.note_signal(signal.SIGUSR1)))
    model = tiny_network(seed=7)
    validation = watch(val)
    go_on(model, make_trainer(model, tmp_path), tmp_path / CHECKPOINT, (train, validation))
    assert validation.count == 6
    assert same_weights(model, straight)


def test_resuming_a_profiled_run_behind_its_last_batch_trains_no_further(
    tiny_network, make_trainer, make_loaders, watch, tmp_path, same_weights
):
    stopped = tiny_network()
    trainer = make_trainer(stopped, tmp_path, prof=2, epochs=1)
    train, val = make_loaders()
    fit_until(trainer, train, watch(val, 1, lambda: trainer.note_signal(signal.SIGUSR1)))
    model = tiny_network(seed=7)
    go_on(model, make_trainer(model, tmp_path, prof=2, epochs=1), tmp_path / CHECKPOINT, (train, val))
    assert same_weights(model, stopped)


def test_interruption_waits_for_the_optimizers_step(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    trainer = make_trainer(tiny_network(), tmp_path, optimizer_batch_size=12)
    train, val = make_loaders()
    fit_until(trainer, watch(train, 1, lambda: trainer.note_signal(signal.SIGUSR1)), val)
    assert load_checkpoint(tmp_path / CHECKPOINT)["batch"] == 3


def test_real_sigterm_stops_after_the_step_and_gives_the_handler_back(
    tiny_network, make_trainer, make_loaders, watch, tmp_path
):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tiny_network(), tmp_path)
    train, val = make_loaders()
    with pytest.raises(Interrupted, match="SIGTERM"):
        trainer.fit(watch(train, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)), val)
    assert load_checkpoint(tmp_path / CHECKPOINT)["batch"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("count", [16, 22])
def test_gradient_accumulation_equals_the_big_batch(tiny_network, make_trainer, make_loaders, tmp_path, count):
    models = {}
    for batch_size, optimizer_batch_size in ((8, -1), (4, 8)):
        model = tiny_network(batch_norm=False, dropout=0.0)
        trainer = make_trainer(
            model, tmp_path, batch_size=batch_size, optimizer_batch_size=optimizer_batch_size, prof=16 // batch_size
        )
        trainer.fit(*make_loaders(batch_size, count=count))
        models[batch_size] = model.state_dict()
    start = tiny_network(batch_norm=False, dropout=0.0).state_dict()
    for name, tensor in models[8].items():
        torch.testing.assert_close(models[4][name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, start[name])


def test_an_incomplete_accumulation_at_the_end_is_the_mean_of_what_there_is(
    tiny_network, make_trainer, make_loaders, preprocessing, tmp_path
):
    model, reference = (tiny_network(batch_norm=False, dropout=0.0) for _ in range(2))
    # five batches of four: three make the first step, two the second
    make_trainer(model, tmp_path, epochs=1, optimizer_batch_size=12, momentum=0.0, weight_decay=0.0).fit(
        *make_loaders()
    )
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    batches = list(make_loaders()[0].epoch(0))
    for joined in (batches[:3], batches[3:]):
        images, labels = (torch.cat(parts) for parts in zip(*joined, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(reference(normalize(images, preprocessing)), labels).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_evaluation_counts_every_image_and_changes_nothing(
    tiny_network, make_trainer, make_loaders, preprocessing, tmp_path, same_weights
):
    model, before = tiny_network(), tiny_network()
    _, val = make_loaders()
    metrics = make_trainer(model, tmp_path).evaluate(val)
    with torch.no_grad():
        logits = before.eval()(normalize(val.source.images, preprocessing)).double()
    truth = val.source.labels
    assert metrics["val.loss"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-5)
    assert metrics["val.top1"] == pytest.approx(100 * (logits.argmax(1) == truth).double().mean().item())
    assert metrics["val.top5"] == 100
    assert same_weights(model, before)


def test_prof_limits_training_and_validation(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    model = tiny_network()
    train, val = (watch(loader) for loader in make_loaders())
    make_trainer(model, tmp_path, prof=2, epochs=1).fit(train, val)
    assert (train.count, val.count) == (2, 2)
    assert int(model[1].num_batches_tracked) == 2


def test_a_training_that_is_done_says_so(tiny_network, make_trainer, make_loaders, watch, tmp_path, capsys):
    make_trainer(tiny_network(), tmp_path).fit(*make_loaders())
    trainer = make_trainer(tiny_network(), tmp_path)
    trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)
    train, val = (watch(loader) for loader in make_loaders())
    trainer.fit(train, val)
    assert (train.count, val.count) == (0, 0)
    assert "nothing left to train: 2 of 2 epochs are done" in capsys.readouterr().out


def test_run_epochs_0_trains_nothing(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    train, val = (watch(loader) for loader in make_loaders())
    make_trainer(tiny_network(), tmp_path, run_epochs=0).fit(train, val)
    assert (train.count, val.count) == (0, 0)


def test_run_epochs_limits_this_run_and_not_the_schedule(tiny_network, make_trainer, make_loaders, tmp_path):
    raport = tmp_path / "raport.json"
    model = tiny_network()
    make_trainer(model, tmp_path, Recorder(raport), epochs=4, run_epochs=2).fit(*make_loaders())
    lines = [json.loads(line) for line in raport.read_text().splitlines()]
    assert [line["step"] for line in lines] == [[0], [1]]
    # 0.05 * 0.5 (1 + cos(pi e / 4))
    assert [line["data"]["train.lr"] for line in lines] == pytest.approx([0.05, 0.0426776695])


def test_each_epoch_is_recorded_under_nvidias_names(tiny_network, make_trainer, make_loaders, tmp_path):
    raport = tmp_path / "raport.json"
    make_trainer(tiny_network(), tmp_path, Recorder(raport), epochs=1).fit(*make_loaders())
    data = json.loads(raport.read_text())["data"]
    speeds = {f"{part}.{name}" for part in ("train", "val") for name in ("total_ips", "compute_ips")}
    times = {f"{part}.{name}" for part in ("train", "val") for name in ("data_time", "compute_time")}
    latencies = {f"{part}.compute_latency{at}" for part in ("train", "val") for at in LATENCIES}
    assert set(data) == {"train.loss", "train.lr", "val.loss", "val.top1", "val.top5"} | speeds | times | latencies
    assert all(data[name] > 0 for name in speeds | times)


def test_training_only_validates_nothing(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    train, val = make_loaders()
    validation = watch(val)
    make_trainer(tiny_network(), tmp_path, training_only=True).fit(train, validation)
    assert validation.count == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT]
    trainer = make_trainer(tiny_network(), tmp_path, training_only=True, epochs=3)
    trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)
    trainer.fit(train, validation)
    assert (validation.count, load_checkpoint(tmp_path / CHECKPOINT)["epoch"]) == (0, 3)


def test_a_checkpoint_before_the_first_epoch_is_no_epochs(tiny_network, make_trainer, tmp_path):
    """As quant_main.py writes it after calibration."""
    make_trainer(tiny_network(), tmp_path, gather_checkpoints=-1).save()
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT]


def test_no_checkpoints_writes_nothing(tiny_network, make_trainer, make_loaders, tmp_path):
    make_trainer(tiny_network(), tmp_path, save_checkpoints=False).fit(*make_loaders())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_after_so_many_epochs_without_a_better_top1(
    tiny_network, make_trainer, make_loaders, tmp_path, capsys, patience
):
    raport = tmp_path / "raport.json"
    model = tiny_network(batch_norm=False)  # which at a learning rate of 0 never changes: only epoch 1 is a new best
    trainer = make_trainer(model, tmp_path, Recorder(raport), epochs=6, lr=0.0, early_stopping_patience=patience)
    trainer.fit(*make_loaders())
    assert len(raport.read_text().splitlines()) == 1 + patience
    # and resuming does not change that
    trainer = make_trainer(model, tmp_path, Recorder(raport), epochs=6, lr=0.0, early_stopping_patience=patience)
    trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)
    trainer.fit(*make_loaders())
    assert len(raport.read_text().splitlines()) == 1 + patience
    assert capsys.readouterr().out.count("stopped early: ") == 2


def test_best_checkpoint_is_that_of_the_best_epoch(tiny_network, make_trainer, make_loaders, tmp_path):
    raport = tmp_path / "raport.json"
    make_trainer(tiny_network(), tmp_path, Recorder(raport), epochs=6).fit(*make_loaders())
    top1 = [json.loads(line)["data"]["val.top1"] for line in raport.read_text().splitlines()]
    best = load_checkpoint(tmp_path / "model_best.pth.tar")
    assert best["epoch"] == 1 + top1.index(max(top1))
    assert best["best_prec1"] == max(top1)
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 6


def test_divergence_is_reported_and_keeps_the_last_checkpoint(tiny_network, make_trainer, make_loaders, tmp_path):
    make_trainer(tiny_network(), tmp_path, epochs=1).fit(*make_loaders())
    before = (tmp_path / CHECKPOINT).read_bytes()
    model = tiny_network()
    with torch.no_grad():
        model[5].weight.fill_(torch.nan)
    train, val = make_loaders()
    with pytest.raises(UserError, match=r"not finite in epoch 1, batch 1:.*--lr") as error:
        make_trainer(model, tmp_path).fit(train, val)
    assert f": {', '.join(train.names(0, 0))};" in str(error.value)
    assert (tmp_path / "nonfinite_loss.txt").read_text().splitlines() == train.names(0, 0)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(
    tiny_network, make_trainer, make_loaders, watch, tmp_path
):
    make_trainer(tiny_network(), tmp_path, epochs=1).fit(*make_loaders())
    before = (tmp_path / CHECKPOINT).read_bytes()
    model = tiny_network()
    train, val = make_loaders()

    def poison():  # after the last loss has been looked at
        with torch.no_grad():
            model[5].weight[1, 2] = torch.inf

    with pytest.raises(UserError, match=r"^5\.weight is not finite.*--lr"):
        make_trainer(model, tmp_path, epochs=1).fit(train, watch(val, 1, poison))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_trainer_on_a_cpu_keeps_freed_memory(tiny_network, make_trainer, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("effnet_quant.training.trainer.keep_freed_memory", lambda: kept.append(True))
    make_trainer(tiny_network(), tmp_path)
    assert kept == [True]


def test_weights_are_loaded_whatever_optimizer_trained_them(
    tiny_network, make_trainer, make_loaders, tmp_path, same_weights
):
    trained, other = tiny_network(), tiny_network(1)
    make_trainer(trained, tmp_path, epochs=1, optimizer="rmsprop").fit(*make_loaders())
    trainer = make_trainer(other, tmp_path, batch_size=2)
    assert trainer.load(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)
    assert same_weights(trained, other)


def test_full_disk_ends_the_run_with_the_previous_checkpoint(
    tiny_network, make_trainer, make_loaders, tmp_path, monkeypatch
):
    make_trainer(tiny_network(), tmp_path, run_epochs=1).fit(*make_loaders())
    before = (tmp_path / CHECKPOINT).read_bytes()
    model = tiny_network()
    trainer = make_trainer(model, tmp_path)
    trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        trainer.fit(*make_loaders())
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [{}, {"amp": True, "dynamic_loss_scale": True}, {"amp": True, "amp_dtype": "bf16"}])
def test_a_gpu_is_not_waited_for_between_steps(tiny_network, make_trainer, make_loaders, watch, tmp_path, amp):
    class Guarded(watch):
        def epoch(self, epoch=0, first_batch=0):
            for number, batch in enumerate(super().epoch(epoch, first_batch)):
                if number == 1:  # the first loss is looked at
                    torch.cuda.set_sync_debug_mode("error")
                yield batch
            torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(tiny_network(), tmp_path, device="cuda", print_freq=1000, use_ema=0.9, **amp)
    train, val = make_loaders()
    try:
        trainer.fit(Guarded(train), val)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("before", "after"), [("sgd", "rmsprop"), ("rmsprop", "sgd")])
def test_resuming_with_another_optimizer_is_refused(tiny_network, make_trainer, make_loaders, tmp_path, before, after):
    make_trainer(tiny_network(), tmp_path, epochs=1, optimizer=before).fit(*make_loaders())
    trainer = make_trainer(tiny_network(), tmp_path, optimizer=after)
    with pytest.raises(UserError, match="--optimizer"):
        trainer.resume(load_checkpoint(tmp_path / CHECKPOINT), CHECKPOINT)


def test_resuming_with_an_optimizer_state_of_other_shapes_is_refused(
    tiny_network, make_trainer, make_loaders, tmp_path
):
    make_trainer(tiny_network(), tmp_path, epochs=1).fit(*make_loaders())
    state = load_checkpoint(tmp_path / CHECKPOINT)
    for entry in state["optimizer"]["state"].values():
        entry["momentum_buffer"] = torch.zeros(7)
    with pytest.raises(UserError, match="optimizer"):
        make_trainer(tiny_network(), tmp_path).resume(state, CHECKPOINT)


def test_checkpoint_of_nvidias_scripts_resumes(tiny_network, make_trainer, make_loaders, tmp_path):
    """Their optimizer has BatchNorm's parameters first, then the others; they write no step."""
    donor, average, model = tiny_network(seed=3), tiny_network(seed=4), tiny_network()
    momentum = [torch.full_like(p, 0.25 + place) for place, p in enumerate(model.parameters())]
    order = [1, 2, 0, 3, 4]  # of the convolution, BatchNorm's two and the classifier's two
    groups = [{"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 0.0, "params": [0, 1]}]
    groups.append({**groups[0], "weight_decay": 1e-4, "params": [2, 3, 4]})
    checkpoint = {
        "epoch": 2,
        "arch": "tiny",
        "best_prec1": 100.0,
        "state_dict": {f"module.{name}": tensor for name, tensor in donor.state_dict().items()},
        "state_dict_ema": average.state_dict(),
        "optimizer": {
            "state": {place: {"momentum_buffer": momentum[index]} for place, index in enumerate(order)},
            "param_groups": groups,
        },
    }
    trainer = make_trainer(model, tmp_path, epochs=3, lr=0.0, use_ema=0.9999, prof=1)
    trainer.resume(checkpoint, "nvidia.pth.tar")
    assert torch.equal(model[5].weight, donor[5].weight)
    for parameter, buffer in zip(model.parameters(), momentum, strict=True):
        assert torch.equal(trainer.optimizer.state[parameter]["momentum_buffer"], buffer)
    trainer.fit(*make_loaders())
    resumed = load_checkpoint(tmp_path / CHECKPOINT)
    assert (resumed["epoch"], resumed["best_prec1"]) == (3, 100.0)
    assert not (tmp_path / "model_best.pth.tar").exists()
    # two epochs of one batch are behind it: the next step is number 2, the average's share of it 1 - 3 / 12
    assert resumed["step"] == 3
    expected = 0.25 * average[5].weight + 0.75 * donor[5].weight
    torch.testing.assert_close(resumed["state_dict_ema"]["5.weight"], expected)


def test_amp_trains_on_the_cpu_in_bfloat16(tiny_network, make_trainer, make_loaders, tmp_path):
    dtypes = []
    model = tiny_network()
    model[5].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    make_trainer(model, tmp_path, epochs=1, amp=True).fit(*make_loaders())
    assert set(dtypes) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_channels_last_reaches_the_network(tiny_network, make_trainer, make_loaders, tmp_path):
    layouts = []
    model = tiny_network()
    model[0].register_forward_pre_hook(
        lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    make_trainer(model, tmp_path, epochs=1, channels_last=True).fit(*make_loaders())
    assert all(layouts)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_progress_is_plain_lines_up_to_the_last_batch(tiny_network, make_trainer, make_loaders, tmp_path, capsys):
    make_trainer(tiny_network(), tmp_path, epochs=1, print_freq=2).fit(*make_loaders())
    lines = capsys.readouterr().err.splitlines()
    done = [line.split(",")[0] for line in lines if "train" in line]
    assert done == ["epoch 1/1 train: 2/5", "epoch 1/1 train: 4/5", "epoch 1/1 train: 5/5"]


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [("batch_size", 3, "-b 3"), ("optimizer_batch_size", 8, "--optimizer-batch-size 8"), ("seed", 5, "--seed 5")],
)
def test_resuming_within_an_epoch_needs_the_same_batches(make_trainer, tiny_network, tmp_path, name, value, flag):
    trainer = make_trainer(tiny_network(), tmp_path)
    state = {"state_dict": trainer.model.state_dict(), "epoch": 0, "batch": 2, "config": {name: value}}
    with pytest.raises(UserError, match=f"middle of an epoch; resume it with {flag}\\."):
        trainer.resume(state, "checkpoint.pth.tar")


def test_mixup_trains_on_blended_images_and_targets(tiny_network, make_trainer, make_loaders, preprocessing, tmp_path):
    seen = []
    trainer = make_trainer(tiny_network(dropout=0.0), tmp_path, epochs=1, mixup=0.2, label_smoothing=0.1)
    own = trainer.loss

    def loss(logits, targets, images):
        seen.append((logits.detach(), targets, images))
        return own(logits, targets, images)

    trainer.loss = loss
    train, val = make_loaders()
    trainer.fit(train, val)
    shares = []
    for (logits, targets, images), (pixels, labels) in zip(seen, train.epoch(0), strict=True):
        plain = normalize(pixels, preprocessing)
        one_hot = F.one_hot(labels, 3).float()
        blended = plain.roll(1, 0)
        # one share a batch: images = share * plain + (1 - share) * its neighbour
        share = ((images - blended) * (plain - blended)).sum() / (plain - blended).pow(2).sum()
        torch.testing.assert_close(images, share * plain + (1 - share) * blended, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0), rtol=1e-4, atol=1e-4)
        smoothed = 0.9 * targets.double() + 0.1 / 3
        expected = -(smoothed * logits.double().log_softmax(1)).sum(1).mean()
        assert own(logits, targets, images).item() == pytest.approx(expected.item(), rel=1e-5)
        shares.append(float(share))
    assert len(set(shares)) == 5


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_cutmix_trains_on_boxes_of_the_neighbour(
    mixup, tiny_network, make_trainer, make_loaders, preprocessing, tmp_path
):
    seen = []
    trainer = make_trainer(tiny_network(dropout=0.0), tmp_path, epochs=3, mixup=mixup, cutmix=1.0)
    own = trainer.loss

    def loss(logits, targets, images):
        seen.append((targets, images))
        return own(logits, targets, images)

    trainer.loss = loss
    train, val = make_loaders()
    trainer.fit(train, val)
    boxes = 0
    for (targets, images), (pixels, labels) in zip(
        seen, (batch for epoch in range(3) for batch in train.epoch(epoch)), strict=True
    ):
        plain, one_hot = normalize(pixels, preprocessing), F.one_hot(labels, 3).float()
        kept = (images == plain).all(1, keepdim=True)
        if not torch.equal(torch.where(kept, plain, plain.roll(1, 0)), images):
            continue  # blended: the coin fell the other way
        boxes += 1
        share = kept[0].float().mean()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    assert boxes == 15 if mixup == 0 else 0 < boxes < 15


def test_checkpoints_within_an_epoch_come_every_so_many_steps(
    straight, tiny_network, make_trainer, make_loaders, watch, tmp_path, same_weights
):
    class Killed(Exception):
        pass

    def die():
        raise Killed

    train, val = make_loaders()
    with pytest.raises(Killed):  # before the fifth batch
        make_trainer(tiny_network(), tmp_path, checkpoint_every_steps=2).fit(watch(train, 5, die), val)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert (state["epoch"], state["batch"], state["step"]) == (0, 4, 4)
    model = tiny_network(seed=7)
    go_on(model, make_trainer(model, tmp_path), tmp_path / CHECKPOINT, (train, val))
    assert same_weights(model, straight)


def test_the_loss_of_a_resumed_epoch_is_that_of_the_whole(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    raports = [tmp_path / "straight.json", tmp_path / "resumed.json"]
    make_trainer(tiny_network(), tmp_path, Recorder(raports[0]), epochs=1).fit(*make_loaders())
    trainer = make_trainer(tiny_network(), tmp_path, epochs=1)
    train, val = make_loaders()
    fit_until(trainer, watch(train, 3, lambda: trainer.note_signal(signal.SIGUSR1)), val)
    model = tiny_network(seed=7)
    go_on(model, make_trainer(model, tmp_path, Recorder(raports[1]), epochs=1), tmp_path / CHECKPOINT, (train, val))
    losses = [json.loads(path.read_text())["data"]["train.loss"] for path in raports]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_the_first_tenth_of_a_profiled_epoch_does_not_count(tiny_network, make_trainer, make_loaders, watch, tmp_path):
    raport = tmp_path / "raport.json"
    train, val = make_loaders(count=80)
    # the second batch arrives late
    make_trainer(tiny_network(), tmp_path, Recorder(raport), epochs=1, prof=20).fit(
        watch(train, 2, lambda: time.sleep(1)), val
    )
    assert json.loads(raport.read_text())["data"]["train.data_time"] < 0.05


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_the_eager_one(tiny_network, make_trainer, make_loaders, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    models = [tiny_network(dropout=0.0) for _ in range(2)]
    for model, compiled in zip(models, (False, True), strict=True):
        make_trainer(model, tmp_path, compile=compiled, use_ema=0.9, optimizer_batch_size=8).fit(*make_loaders())
    eager, compiled = (model.state_dict() for model in models)
    assert compiled.keys() == eager.keys()  # nothing of torch.compile in the names
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)
    assert models[1]._compiled_call_impl is not None


def test_gradients_are_clipped_together_after_accumulation(
    tiny_network, make_trainer, make_loaders, preprocessing, tmp_path
):
    ours, reference = tiny_network(dropout=0.0), tiny_network(dropout=0.0)
    config = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "optimizer_batch_size": 8, "prof": 2}
    train, val = make_loaders()
    make_trainer(ours, tmp_path, clip_grad_norm=0.05, **config).fit(train, val)
    for images, labels in list(train.epoch())[:2]:
        (F.cross_entropy(reference(normalize(images, preprocessing)), labels) / 2).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    norm = sum(gradient.double().square().sum() for gradient in gradients.values()).sqrt()
    assert norm > 0.1
    for (name, after), before in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * gradients[name] * float(0.05 / norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])  # one asks for the overflow, the other's kernel is told
def test_gradients_are_clipped_without_the_loss_scale(
    tiny_network, make_trainer, make_loaders, tmp_path, same_weights, optimizer
):
    models = [tiny_network(dropout=0.0) for _ in range(2)]
    config = {
        "optimizer": optimizer,
        "lr": 0.001,
        "epochs": 1,
        "amp": True,
        "amp_dtype": "fp16",
        "clip_grad_norm": 0.05,
    }
    for model, scale in zip(models, (1, 64), strict=True):
        make_trainer(model, tmp_path, static_loss_scale=scale, **config).fit(*make_loaders())
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # a scale saves small gradients from underflow

"""The trainer with another task than classification."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from effnet_quant.card import ModelCard
from effnet_quant.data.transforms import normalize
from effnet_quant.tasks.task import Metric, Score, Task
from effnet_quant.training.checkpoint import load_checkpoint
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.trainer import Trainer


class Heads(nn.Module):
    """Two outputs in a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Linear(3 * 64, 1)

    def forward(self, images):
        value = self.scale(images.flatten(1))[:, 0]
        return {"value": value, "extra": (value.half(), value.long())}


class MeanError(Metric):
    """Mean absolute error of the value."""

    def __init__(self):
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, outputs, targets):
        assert [outputs["value"].dtype, *(part.dtype for part in outputs["extra"])] == [
            torch.float32,
            torch.float32,
            torch.int64,
        ]
        for value, target in zip(outputs["value"], targets, strict=True):
            self.sums += torch.tensor([abs(value.item() - target["label"].item()), 1.0], dtype=torch.float64)

    def merge(self, processes):
        self.sums = processes.sum(self.sums)

    def results(self):
        return {"mae": (self.sums[0] / self.sums[1]).item()}


@dataclass(frozen=True)
class Regression(Task):
    """A number for each image; targets are a list of dicts with a label and a name."""

    name = "regression"
    score = Score("mae", "mean error", "", higher_is_better=False)
    output_names = ("value",)
    agreement_title = "same value"
    error_title = "value error"

    def loss(self, outputs, targets, inputs):
        return (outputs["value"] - torch.stack([target["label"] for target in targets])).square().mean()

    def distillation_loss(self, outputs, teacher_outputs, temperature):
        return (outputs["value"] - teacher_outputs["value"]).square().mean()

    def metric(self, device):
        return MeanError()

    def predictions(self, outputs):
        return outputs["value"]

    def agreement(self, one, other):
        return (one == other).double()

    def answers(self, outputs, classes, count):
        return [{"value": value} for value in outputs["value"].tolist()]

    def answer_text(self, answer):
        return str(answer["value"])


class Named:
    """A loader whose targets are a list of dicts, of which not all values are tensors."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch=0, first_batch=0):
        for images, labels in self.loader.epoch(epoch, first_batch):
            yield images, [{"label": label, "name": f"image of {int(label)}"} for label in labels]


@pytest.mark.parametrize("lr", [1e-4, 0.0])
def test_another_task_trains_validates_and_chooses_its_best(make_loaders, preprocessing, tmp_path, capsys, lr):
    raport = tmp_path / "raport.json"
    train, val = make_loaders(augment=False)
    config = TrainConfig(
        epochs=4, lr=lr, lr_schedule="cosine", batch_size=4, momentum=0.0, weight_decay=0.0, early_stopping_patience=2
    )
    model = Heads()
    trainer = Trainer(
        model,
        config,
        ModelCard(arch="heads", num_classes=1, input=preprocessing),
        torch.device("cpu"),
        tmp_path,
        Recorder(raport),
        task=Regression(),
    )
    trainer.fit(Named(train), Named(val))
    lines = [json.loads(line)["data"] for line in raport.read_text().splitlines()]
    errors = [line["val.mae"] for line in lines]
    assert "val.top1" not in lines[0]
    best = load_checkpoint(tmp_path / "model_best.pth.tar")
    assert best["epoch"] == 1 + errors.index(min(errors))
    assert best["best_prec1"] == -min(errors)
    with torch.no_grad():
        values = model(normalize(val.source.images, preprocessing))["value"].double()
    assert errors[-1] == pytest.approx((values - val.source.labels).abs().mean().item(), rel=1e-5)
    out = capsys.readouterr().out
    if lr == 0:
        assert len(lines) == 3
        assert "stopped early: 2 epochs without a better mean error" in out
    else:
        assert min(errors) < errors[0]

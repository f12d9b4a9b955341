"""A tiny network, tiny data and a trainer around them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import ALONE
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.trainer import Trainer

PREPROCESSING = InputSpec(8, 8)


class RandomImages:
    """Random images of 8 x 8 pixels with labels 0, 1, 2."""

    in_memory = True
    augmentable = True
    classes = ("x", "y", "z")

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return self.images[index]

    def name(self, index):
        return f"image {index}"


class WatchedLoader:
    """Passes a loader's batches on, counts them, and calls ``action`` before batch number ``at`` (counted from 1)."""

    def __init__(self, loader, at=0, action=None):
        self.loader, self.at, self.action = loader, at, action
        self.count = 0

    def __len__(self):
        return len(self.loader)

    def names(self, epoch, batch):
        return self.loader.names(epoch, batch)

    def epoch(self, epoch=0, first_batch=0):
        for batch in self.loader.epoch(epoch, first_batch):
            self.count += 1
            if self.count == self.at:
                self.action()
            yield batch


def _tiny_network(seed=0, *, batch_norm=True, dropout=0.5):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(8 * 36, 3)
    )


def _make_trainer(model, workspace, recorder=None, world=ALONE, device="cpu", **config):
    config = {"epochs": 2, "lr": 0.05, "lr_schedule": "cosine", "batch_size": 4, **config}
    card = ModelCard(arch="tiny", num_classes=3, input=PREPROCESSING)
    return Trainer(
        model,
        TrainConfig(**config),
        card,
        torch.device(device),
        workspace,
        recorder or Recorder(None),
        world,
    )


def _make_loaders(batch_size=4, *, count=22, val_count=10, augment=True, world=ALONE):
    transform = training_transform(PREPROCESSING) if augment else evaluation_transform(PREPROCESSING)
    share = {"rank": world.rank, "ranks": world.size}
    train = Loader(RandomImages(count), transform, batch_size, shuffle=True, seed=5, **share)
    return train, Loader(RandomImages(val_count, seed=1), evaluation_transform(PREPROCESSING), batch_size, **share)


@pytest.fixture(scope="session")
def preprocessing():
    """How the tiny images become the tiny network's input."""
    return PREPROCESSING


@pytest.fixture(scope="session")
def tiny_network():
    """Builds a classifier of 3 x 8 x 8 images into three classes: (seed=0, batch_norm=True, dropout=0.5)."""
    return _tiny_network


@pytest.fixture(scope="session")
def make_trainer():
    """Builds a trainer: (model, workspace, recorder=None, world=ALONE, device="cpu", **config)."""
    return _make_trainer


@pytest.fixture(scope="session")
def make_loaders():
    """Builds (train, val) loaders of 5 and 3 batches: (batch_size=4, count=22, val_count=10, augment=True, world=ALONE)."""
    return _make_loaders


@pytest.fixture(scope="session")
def watch():
    """Wraps a loader to count its batches and to act before one of them: (loader, at=0, action=None)."""
    return WatchedLoader


@pytest.fixture(scope="session")
def same_weights():
    """Whether two models hold the same bits: (one, other)."""

    def same(one, other):
        ours, theirs = one.state_dict(), other.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return same

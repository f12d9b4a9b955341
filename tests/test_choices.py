"""The names in the choices of each room stand for something that is there."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from effnet_quant.card import InputSpec
from effnet_quant.data.choices import AUGMENTATIONS, INTERPOLATIONS
from effnet_quant.data.transforms import training_transform
from effnet_quant.quantization.calibration import METHODS
from effnet_quant.quantization.choices import CALIBRATION_METHODS, DEFAULT_RECIPE, PTQ_RECIPES
from effnet_quant.quantization.recipe import RECIPES
from effnet_quant.training.choices import AMP_DTYPES, OPTIMIZERS, SCHEDULES
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.optimizers import build_optimizer
from effnet_quant.training.precision import choose_precision
from effnet_quant.training.schedules import learning_rate


@pytest.mark.parametrize("room", ["data", "quantization", "training"])
def test_choices_load_no_library(room):
    code = f"import sys, effnet_quant.{room}.choices; print([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_augmentations_are_torchvisions():
    expected = {"autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
    assert list(AUGMENTATIONS) == list(expected)
    for name, kind in expected.items():
        transform = training_transform(InputSpec(8, 8), augmentation=name)
        assert type(transform._policy) is kind


def test_interpolations_are_torchvisions():
    assert all(InterpolationMode(name) for name in INTERPOLATIONS)


def test_calibration_methods_are_those_of_the_calibration():
    assert tuple(METHODS) == tuple(CALIBRATION_METHODS)


def test_optimizers_are_pytorchs():
    model = nn.Linear(1, 1)
    kinds = [type(build_optimizer(model, TrainConfig(optimizer=name))) for name in OPTIMIZERS]
    assert kinds == [torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW]


def test_amp_dtypes_are_pytorchs():
    cpu = torch.device("cpu")
    chosen = [choose_precision(cpu, amp=True, amp_dtype=name, loss_scale=1, dynamic=False) for name in AMP_DTYPES]
    assert [precision.dtype for precision in chosen] == [torch.float16, torch.bfloat16]


def test_schedules_each_have_a_rate_of_their_own():
    # epoch 30 of 120: a tenth, three quarters, and (1 + cos(pi / 4)) / 2
    rates = [learning_rate(name, 30, base_lr=1.0, epochs=120) for name in SCHEDULES]
    assert rates == pytest.approx([0.1, 0.75, (1 + math.sqrt(0.5)) / 2])


def test_ptq_recipes_have_steps():
    assert list(RECIPES) == list(PTQ_RECIPES)
    assert DEFAULT_RECIPE in RECIPES and all(callable(step) for steps in RECIPES.values() for step in steps)

"""The settings and the exit status of main.py and quant_main.py."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, fields, replace

import torch

from effnet_quant.card import HARD_SWISH, InputSpec, ModelCard
from effnet_quant.cli.arguments import model_options
from effnet_quant.cli.stopping import end_children
from effnet_quant.data.data_argument import DIGITS
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.float_training import evaluate, fit
from effnet_quant.jobs.run import Run
from effnet_quant.models.registry import get_entry
from effnet_quant.quantization.spec import QuantSpec
from effnet_quant.terminal import printable, shell_word
from effnet_quant.training.config import (
    ABOVE_ZERO,
    ABOVE_ZERO_TO_ONE,
    AT_LEAST_ONE,
    SHARE,
    Allowed,
    TrainConfig,
    check_allowed,
)
from effnet_quant.training.signals import Interrupted

DEFAULT_BACKEND = "pytorch"  # NVIDIA's default, dali-cpu, needs an optional package
_OF_THE_MODEL = {
    "num_classes": AT_LEAST_ONE,
    "image_size": AT_LEAST_ONE,
    "crop_pct": ABOVE_ZERO_TO_ONE,
    "bn_momentum": SHARE,
    "bn_epsilon": ABOVE_ZERO,
    "dropout": Allowed(lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "survival_prob": ABOVE_ZERO_TO_ONE,
}


@dataclass(frozen=True)
class Settings:
    """The settings of a command line: the arguments of ``open_run``."""

    card: ModelCard
    data: DataConfig
    config: TrainConfig
    place: PlaceConfig
    start: StartConfig


def settings(
    parsed: argparse.Namespace,
    said: ModelCard | None = None,
    quant_spec: QuantSpec | None = None,
    target: str | None = None,
    *,
    quantized: bool = False,
) -> Settings:
    """Turn the flags of ``add_training_arguments`` into settings.

    Args:
        parsed: the flags.
        said: the card of the weights that the run starts from; flags win over it.
        quant_spec, target: the quantization and the runtime that the flags ask for.
        quantized: whether the run quantizes the network. Then a new classifier is made only for ``--num-classes``.

    Raises:
        UserError: a flag's value is not allowed, or two flags exclude each other.
    """
    entry = get_entry(parsed.arch)
    for name, allowed in _OF_THE_MODEL.items():
        check_allowed(name, getattr(parsed, name), allowed)
    start = StartConfig(
        weights=parsed.pretrained_from_file,
        ema=parsed.ema,
        pretrained=parsed.pretrained,
        new_classifier=not parsed.evaluate and (not quantized or "num_classes" in parsed.explicit),
        resume=parsed.resume,
        options=model_options(parsed),
    )
    place = PlaceConfig(**{field.name: getattr(parsed, field.name) for field in fields(PlaceConfig)})
    card = ModelCard(
        arch=parsed.arch,
        num_classes=parsed.num_classes if "num_classes" in parsed.explicit else None,
        input=_input_spec(parsed, (said and said.input) or entry.input),
        activation=HARD_SWISH if parsed.hard_swish else None,
        quant_spec=None if quant_spec is None else quant_spec.to_json(),
        target=target,
    )
    data = DataConfig(
        parsed.data,
        parsed.data_backend if "data_backend" in parsed.explicit else DEFAULT_BACKEND,
        parsed.prefetch,
        parsed.max_bad_images,
        parsed.augmentation,
        parsed.smallest_crop,
    )
    return Settings(card, data, _train_config(parsed), place, start)


def _train_config(parsed: argparse.Namespace) -> TrainConfig:
    values = {field.name: getattr(parsed, field.name) for field in fields(TrainConfig) if field.name in parsed}
    values["channels_last"] = parsed.memory_format == "nhwc"
    values["freeze"] = tuple(parsed.freeze or ())
    if parsed.jit == "script":
        print("--jit script: TorchScript has been superseded by torch.compile, which is used", flush=True)
        values["compile"] = True
    config = TrainConfig(**values)
    if (config.static_loss_scale != 1 or config.dynamic_loss_scale) and not config.amp:
        print("without --amp, --static-loss-scale and --dynamic-loss-scale do nothing", flush=True)
    return config


def _input_spec(parsed: argparse.Namespace, spec: InputSpec) -> InputSpec:
    """``spec`` with what the flags change."""
    if parsed.image_size:
        spec = spec.resized(parsed.image_size)
    if "interpolation" in parsed.explicit:
        spec = replace(spec, interpolation=parsed.interpolation)
    if parsed.crop_pct is not None:
        return replace(spec, resize_size=math.floor(spec.image_size / parsed.crop_pct))
    if parsed.data == DIGITS:  # a digit fills its image
        return replace(spec, resize_size=spec.image_size)
    return spec


def say_what_is_used(run: Run, parsed: argparse.Namespace) -> None:
    """Print where a run departs from its flags, or from the defaults of NVIDIA's scripts."""
    if "tf32" in parsed.explicit and parsed.tf32 and not torch.cuda.is_available():
        print("no GPU: TF32 means FP32", flush=True)
    if "data_backend" not in parsed.explicit:
        print(f"data backend: {DEFAULT_BACKEND}", flush=True)
    if "num_classes" not in parsed.explicit:
        print(f"from {parsed.data}: {run.card.num_classes} classes", flush=True)
    if run.began_with is None or parsed.evaluate:
        return
    for name in ("weight_decay", "bn_weight_decay", "momentum", "nesterov", "rmsprop_alpha", "rmsprop_eps"):
        asked = getattr(run.config, name)
        # a resumed optimizer keeps its own values
        if name in parsed.explicit and run.began_with.get(name, asked) != asked:
            flag = f"--{name.replace('_', '-')}"
            said = f"note: {flag} stays {run.began_with[name]}, as {parsed.resume} says"
            print(printable(said), file=sys.stderr)


def train_or_evaluate(run: Run, parsed: argparse.Namespace) -> int:
    """Evaluate (``--evaluate``) or train; returns the exit status."""
    if parsed.evaluate:
        metrics = evaluate(run)
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
        return 0
    try:
        fit(run)
    except Interrupted as interruption:
        end_children()
        path = os.path.join(parsed.workspace, parsed.checkpoint_filename)
        kept = f"; go on with --resume {shell_word(path)}" if run.config.save_checkpoints else ", without a checkpoint"
        print(f"{interruption}{printable(kept)}", file=sys.stderr)
        return 128 + interruption.signal_number
    done, epochs = run.trainer.epochs_done, run.config.epochs
    if parsed.run_epochs >= 0 and done < epochs and run.config.save_checkpoints and run.world.is_main:
        path = os.path.join(parsed.workspace, parsed.checkpoint_filename)
        print(f"trained {done} of {epochs} epochs; go on with --resume {shell_word(path)}", flush=True)
    return 0

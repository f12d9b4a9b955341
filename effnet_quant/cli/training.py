"""What main.py and quant_main.py have in common: from arguments to data, model and trainer."""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_quant.api import HARD_SWISH_KEY, create_model, simulated_target
from effnet_quant.cli.arguments import model_options
from effnet_quant.cli.quantization import SPEC_KEY, TARGET_KEY, chosen_spec, same_grids
from effnet_quant.cli.weights import given_weights, load_given
from effnet_quant.data.arrays import SYNTHETIC, SYNTHETIC_IMAGES, SyntheticSource
from effnet_quant.data.backends import open_loader
from effnet_quant.data.data_argument import DIGITS, fills_cache, open_sources, open_validation
from effnet_quant.data.loaders import Loader
from effnet_quant.data.seeding import mix
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import Preprocessing, evaluation_transform, training_transform
from effnet_quant.errors import UserError
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, load_weights
from effnet_quant.quantization.spec import resolve_spec
from effnet_quant.training.affinity import bind_to_gpu
from effnet_quant.training.checkpoint import load_checkpoint, prepare_workspace
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import World, joined_world
from effnet_quant.training.machine import describe_machine
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.signals import Interrupted
from effnet_quant.training.sinks import Sink, TensorBoard, WandB
from effnet_quant.training.trainer import Trainer

DEFAULT_BACKEND = "pytorch"  # NVIDIA's default, dali-cpu, needs an optional package


@dataclass
class Job:
    """A run that is ready to start.

    Attributes:
        has_ranges: whether every quantizer of the model has a range (True for a float model).
    """

    model: nn.Module
    trainer: Trainer
    config: TrainConfig
    recorder: Recorder
    preprocessing: Preprocessing
    device: torch.device
    train: Loader | None
    train_source: ImageSource | None
    val: Loader
    world: World
    has_ranges: bool


@contextmanager
def prepared(arguments: argparse.Namespace, *, quantized: bool) -> Iterator[Job]:
    """The run that the command line asks for, in the job of the processes that were started together.

    Everything a user may have got wrong is checked first; nothing is written before all checks have passed.

    Args:
        arguments: the command line.
        quantized: whether quantizers are placed in the network.

    Raises:
        UserError: what is wrong, and the way out.
    """
    with joined_world() as world:
        yield _prepare(arguments, world, quantized=quantized)


def _prepare(arguments: argparse.Namespace, world: World, *, quantized: bool) -> Job:
    entry = get_entry(arguments.arch)
    _go_on_if_started_again(arguments, world)
    if "num_classes" not in arguments.explicit:
        arguments.num_classes = entry.num_classes
    checkpoint = load_checkpoint(arguments.resume) if arguments.resume else None
    config = train_config(arguments, checkpoint, world)
    preprocessing = _preprocessing(arguments, entry)
    with world.main_first() if fills_cache(arguments.data) else nullcontext():
        train_source, val_source = _open_sources(arguments, preprocessing)
    classes = val_source.classes
    if len(classes) != arguments.num_classes:
        raise UserError(
            f"{arguments.data} has {len(classes)} classes, but the model has {arguments.num_classes}; "
            f"pass --num-classes {len(classes)}."
        )
    device = _device(arguments, config, world)  # before there is memory that would lie at the wrong cores
    torch.manual_seed(config.seed)
    if checkpoint is not None and (arguments.pretrained_from_file or arguments.pretrained):
        raise UserError("--resume and --pretrained-from-file (or --pretrained) both bring weights; give one of them.")
    with world.main_first():
        weights = given_weights(arguments, entry)
    model, files_say = _model(arguments, checkpoint, weights, quantized=quantized)
    has_ranges = not quantized
    if checkpoint is not None:
        has_ranges = load_weights(model, Weights(checkpoint["state_dict"], source=arguments.resume))
    elif weights is not None:
        new_classifier = "num_classes" in arguments.explicit and not arguments.evaluate
        has_ranges = load_given(
            model, _with_fitting_ranges(weights, files_say), arguments.arch, new_classifier=new_classifier
        )
    workspace = Path(arguments.workspace)
    if world.is_main:
        prepare_workspace(workspace)
    recorder = _recorder(arguments, config, workspace, world)
    world.wait()
    if "data_backend" not in arguments.explicit:
        print(f"data backend: {DEFAULT_BACKEND}", flush=True)
    if world.rank > 0:  # dropout differs between processes; process 0 draws as a process alone does
        torch.manual_seed(mix(config.seed, world.rank))
    metadata = {
        "arch": arguments.arch,
        "num_classes": arguments.num_classes,
        "classes": classes,
        "preprocessing": preprocessing.to_json(),
        **files_say,
    }
    trainer = Trainer(model, config, preprocessing, device, workspace, recorder, metadata, world)
    if checkpoint is not None and arguments.evaluate:
        trainer.load(checkpoint, arguments.resume)
    elif checkpoint is not None:
        _check_same_workers(train_source, checkpoint, arguments)
        _note_what_stays(checkpoint, config, arguments)
        trainer.resume(checkpoint, arguments.resume)
    loader = partial(
        open_loader,
        arguments.data_backend if "data_backend" in arguments.explicit else DEFAULT_BACKEND,
        batch_size=config.batch_size,
        device=device,
        workers=arguments.workers,
        prefetch=arguments.prefetch,
        max_bad_images=arguments.max_bad_images,
        rank=world.rank,
        ranks=world.size,
    )
    evaluation = evaluation_transform(preprocessing)
    train = None
    if train_source is not None:
        augmented = training_transform(preprocessing, arguments.augmentation)
        transform = augmented if train_source.augmentable else evaluation
        train = loader(train_source, transform, shuffle=True, seed=config.seed)
    val = loader(val_source, evaluation)
    return Job(model, trainer, config, recorder, preprocessing, device, train, train_source, val, world, has_ranges)


def _model(
    arguments: argparse.Namespace, checkpoint: dict[str, Any] | None, weights: Weights | None, *, quantized: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The network without its weights, and what its files say of its activations and its quantization."""
    said = weights.metadata if weights is not None else (checkpoint or {}).get("metadata") or {}
    hard_swish = bool(said.get(HARD_SWISH_KEY))
    if checkpoint is not None and arguments.hard_swish and not hard_swish:
        raise UserError(
            f"{arguments.resume} goes on with the activations it began with; leave out --hard-swish, or start from it with "
            "--pretrained-from-file."
        )
    hard_swish = hard_swish or arguments.hard_swish
    options = {**model_options(arguments), "hard_swish": hard_swish}
    files_say: dict[str, Any] = {HARD_SWISH_KEY: True} if hard_swish else {}
    if not quantized:
        return create_model(arguments.arch, arguments.num_classes, quantized=False, **options), files_say
    spec = chosen_spec(arguments, said)
    if checkpoint is not None and not same_grids(spec, said):
        raise UserError(
            f"{arguments.resume} goes on with the quantization it began with; leave out --quant-spec and --quant-override, "
            "or start from it with --pretrained-from-file."
        )
    target = simulated_target(arguments.arch, said)
    if checkpoint is not None and arguments.target not in (None, target):
        raise UserError(
            f"{arguments.resume} goes on for {target}, for which it began; leave out --target, or start from it with "
            "--pretrained-from-file."
        )
    target = arguments.target or target
    model = create_model(
        arguments.arch, arguments.num_classes, quantized=True, quant_spec=spec, target=target, **options
    )
    return model, {**files_say, SPEC_KEY: spec.to_json(), TARGET_KEY: target}


def _with_fitting_ranges(weights: Weights, files_say: dict[str, Any]) -> Weights:
    """Without their ranges if these are for other grids or activations than the model's (none for a float model)."""
    if SPEC_KEY not in files_say or not weights.has_ranges:
        return weights
    same_activations = weights.metadata.get(HARD_SWISH_KEY, False) == files_say.get(HARD_SWISH_KEY, False)
    if same_activations and same_grids(resolve_spec(files_say[SPEC_KEY]), weights.metadata):
        return weights
    print(f"note: the ranges in {weights.source} are for another quantization; they are left out", file=sys.stderr)
    return weights.without_ranges()


def _check_same_workers(source: ImageSource | None, checkpoint: dict[str, Any], arguments: argparse.Namespace) -> None:
    """In the middle of an epoch of shards, whose order depends on the number of workers, it must be the same."""
    before = (checkpoint.get("config") or {}).get("workers", arguments.workers)
    if isinstance(source, ShardSource) and checkpoint.get("batch") and before != arguments.workers:
        raise UserError(
            f"{arguments.resume} stands in the middle of an epoch of shards that {before} workers read; resume it with "
            f"-j {before}."
        )


def _note_what_stays(checkpoint: dict[str, Any], config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Flags that a resumed optimizer does not follow: it has its own settings, as in NVIDIA's scripts."""
    before = checkpoint.get("config") or {}
    for name in ("weight_decay", "bn_weight_decay", "momentum", "nesterov", "rmsprop_alpha", "rmsprop_eps"):
        if name in arguments.explicit and before.get(name, getattr(config, name)) != getattr(config, name):
            flag = f"--{name.replace('_', '-')}"
            print(f"note: {flag} stays {before[name]}, as {arguments.resume} says", file=sys.stderr)


def train_or_evaluate(job: Job, arguments: argparse.Namespace) -> int:
    """The part after everything is prepared: ``--evaluate``, or training; returns the process's exit status."""
    if arguments.evaluate:
        metrics = job.trainer.validate(job.val)
        job.recorder.record(metrics)
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
        return 0
    assert job.train is not None
    try:
        job.trainer.fit(job.train, job.val)
    except Interrupted as interruption:
        path = os.path.join(arguments.workspace, arguments.checkpoint_filename)
        kept = f"; go on with --resume {path}" if job.config.save_checkpoints else ", without a checkpoint"
        print(f"{interruption}{kept}", file=sys.stderr)
        return 128 + interruption.signal_number
    return 0


def _go_on_if_started_again(arguments: argparse.Namespace, world: World) -> None:
    """Resume from the job's own latest checkpoint where torchrun has started its processes again."""
    latest = os.path.join(arguments.workspace, arguments.checkpoint_filename)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not os.path.isfile(latest):
        return
    if load_checkpoint(latest).get("job") == world.job:  # and not an earlier one's, which the command line passed over
        print(f"started again: going on from {latest}", flush=True)
        arguments.resume, arguments.pretrained_from_file, arguments.pretrained = latest, None, False
        arguments.ema = False  # which of the weights to start from


def _device(arguments: argparse.Namespace, config: TrainConfig, world: World) -> torch.device:
    """This process's device, set up; says in a line what the CPU does instead of what was asked for."""
    if arguments.gpu_affinity != "none":
        print(f"--gpu-affinity: {bind_to_gpu(arguments.gpu_affinity, world.local_rank)}", flush=True)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
        torch.backends.cudnn.allow_tf32 = arguments.tf32
        torch.backends.cudnn.benchmark = True  # the images have one size
        return torch.device("cuda", world.local_rank)
    if config.amp and config.amp_dtype is None:
        print("no GPU: --amp runs in bfloat16, without a loss scale", flush=True)
    if "tf32" in arguments.explicit and arguments.tf32:
        print("no GPU: TF32 means FP32", flush=True)
    return torch.device("cpu")


def _recorder(arguments: argparse.Namespace, config: TrainConfig, workspace: Path, world: World) -> Recorder:
    """The run's metrics, to the raport file and the sinks asked for; process 0 writes them all."""
    if not world.is_main:
        return Recorder(None)
    sinks: list[Sink] = []
    if arguments.tensorboard:
        sinks.append(TensorBoard(workspace))
    if arguments.wandb:
        sinks.append(WandB(arguments.wandb, workspace, asdict(config)))
    machine = describe_machine(world.size) if config.prof > 0 else None
    return Recorder(workspace / arguments.raport_file, machine, sinks)


def train_config(arguments: argparse.Namespace, checkpoint: dict[str, Any] | None, world: World) -> TrainConfig:
    """The trainer's configuration as the flags say; without ``--seed`` that of the checkpoint, or a random one.

    Raises:
        UserError: a flag has a value that means nothing, or two don't go together.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig) if field.name in arguments}
    values["channels_last"] = arguments.memory_format == "nhwc"
    if arguments.jit == "script":
        print("--jit script: TorchScript has been superseded by torch.compile, which is used", flush=True)
        values["compile"] = True
    if arguments.seed is None:
        resumed: int | None = None if checkpoint is None else (checkpoint.get("config") or {}).get("seed")
        seed = torch.tensor(random.SystemRandom().randrange(2**31) if resumed is None else resumed)
        world.broadcast([seed])
        values["seed"] = int(seed)
    config = TrainConfig(**values)
    for flag, allowed in _ALLOWED.items():
        value = getattr(arguments, flag.replace("-", "_"))
        if value is not None and not allowed.contains(value):
            raise UserError(f"--{flag} must be {allowed.words}, not {value}.")
    if not config.checkpoint_filename or os.path.basename(config.checkpoint_filename) != config.checkpoint_filename:
        raise UserError(
            f"--checkpoint-filename names a file in the workspace, without a folder; '{config.checkpoint_filename}' "
            "does not."
        )
    if re.fullmatch(r"model_best\.pth\.tar|checkpoint_\d+\.pth\.tar", config.checkpoint_filename):
        raise UserError(
            f"--checkpoint-filename {config.checkpoint_filename} is the name of the best or of an epoch's checkpoint; "
            "choose another."
        )
    together = config.batch_size * world.size
    if config.optimizer_batch_size >= 0 and (
        config.optimizer_batch_size < together or config.optimizer_batch_size % together
    ):
        by = f" by {world.size} processes" if world.size > 1 else ""
        raise UserError(
            f"--optimizer-batch-size {config.optimizer_batch_size} must be a multiple of "
            f"--batch-size {config.batch_size}{by}."
        )
    if config.amp_dtype is not None and not config.amp:
        raise UserError(f"--amp-dtype {config.amp_dtype} says what --amp computes in; give both.")
    if (config.static_loss_scale != 1 or config.dynamic_loss_scale) and not config.amp:
        print("without --amp, --static-loss-scale and --dynamic-loss-scale do nothing", flush=True)
    if config.nesterov and (config.optimizer != "sgd" or config.momentum <= 0):
        raise UserError("--nesterov goes with --optimizer sgd and a momentum above 0.")
    return config


@dataclass(frozen=True)
class _Allowed:
    """Which numbers a flag takes, as a test and in words."""

    contains: Callable[[float], bool]
    words: str


_AT_LEAST_ONE = _Allowed(lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = _Allowed(lambda value: 0 <= value < math.inf, "0 or more")
_SHARE = _Allowed(lambda value: 0 <= value <= 1, "between 0 and 1")
_ALLOWED = {
    "num-classes": _AT_LEAST_ONE,
    "batch-size": _AT_LEAST_ONE,
    "image-size": _AT_LEAST_ONE,
    "print-freq": _AT_LEAST_ONE,
    "prefetch": _AT_LEAST_ONE,
    "max-bad-images": _NOT_NEGATIVE,
    "crop-pct": _Allowed(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "topk": _AT_LEAST_ONE,
    "workers": _NOT_NEGATIVE,
    "epochs": _NOT_NEGATIVE,
    "run-epochs": _Allowed(lambda value: value >= -1, "-1 (all that are left) or more"),
    "warmup": _NOT_NEGATIVE,
    "lr": _NOT_NEGATIVE,
    "end-lr": _NOT_NEGATIVE,
    "momentum": _SHARE,
    "weight-decay": _NOT_NEGATIVE,
    "gather-checkpoints": _Allowed(lambda value: value >= -1, "-1 (all) or more"),
    "checkpoint-every-steps": _NOT_NEGATIVE,
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "use-ema": _SHARE,
    "rmsprop-alpha": _SHARE,
    "rmsprop-eps": _NOT_NEGATIVE,
    "seed": _Allowed(lambda value: 0 <= value < 2**63, "between 0 and 2**63 - 1"),
    "bn-momentum": _SHARE,
    "bn-epsilon": _Allowed(lambda value: value > 0, "above 0"),
    "static-loss-scale": _Allowed(lambda value: value > 0, "above 0"),
    "prof": _Allowed(lambda value: value == -1 or value >= 1, "-1 (all batches) or at least 1"),
    "label-smoothing": _SHARE,
    "dropout": _Allowed(lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "survival-prob": _Allowed(lambda value: 0 < value <= 1, "above 0 and at most 1"),
}


def _preprocessing(arguments: argparse.Namespace, entry: ModelEntry) -> Preprocessing:
    preprocessing = Preprocessing(**asdict(entry.input))
    if arguments.image_size:
        preprocessing = preprocessing.resized(arguments.image_size)
    if "interpolation" in arguments.explicit:
        preprocessing = replace(preprocessing, interpolation=arguments.interpolation)
    if arguments.crop_pct is not None:
        scaled = math.floor(preprocessing.image_size / arguments.crop_pct)
        preprocessing = replace(preprocessing, resize_size=scaled)
    elif arguments.data == DIGITS:  # a digit fills its image
        preprocessing = replace(preprocessing, resize_size=preprocessing.image_size)
    return preprocessing


def _open_sources(
    arguments: argparse.Namespace, preprocessing: Preprocessing
) -> tuple[ImageSource | None, ImageSource]:
    if SYNTHETIC in (arguments.data_backend, arguments.data):
        source = SyntheticSource(SYNTHETIC_IMAGES, arguments.num_classes, preprocessing.image_size)
        return source, source
    if arguments.evaluate:
        return None, open_validation(arguments.data)
    return open_sources(arguments.data)

"""Run: data, model and trainer, made from the settings of a run."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.api import Overrides, build, choose_card, left_out
from effnet_quant.card import HARD_SWISH, ModelCard
from effnet_quant.data.arrays import SYNTHETIC, SYNTHETIC_IMAGES, SyntheticSource
from effnet_quant.data.backends import open_loader
from effnet_quant.data.data_argument import fills_cache, open_sources, open_validation
from effnet_quant.data.loaders import Loader
from effnet_quant.data.seeding import mix
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.errors import UserError
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, read_weights
from effnet_quant.quantization.spec import resolve_spec, same_grids
from effnet_quant.training.affinity import bind_to_gpu
from effnet_quant.training.checkpoint import load_checkpoint, prepare_workspace
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import World, joined_world
from effnet_quant.training.machine import describe_machine
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.sinks import Sink, TensorBoard, WandB
from effnet_quant.training.trainer import Trainer


@dataclass
class Run:
    """A run that is ready to start.

    Attributes:
        card: the model's card.
        began_with: the configuration in the checkpoint that the run resumes; None if it resumes none.
        train, train_source: training images; None in an evaluation.
        options: options of the network.
    """

    card: ModelCard
    model: nn.Module
    trainer: Trainer
    config: TrainConfig
    data: DataConfig
    recorder: Recorder
    device: torch.device
    train: Loader | None
    train_source: ImageSource | None
    val: Loader
    world: World
    began_with: dict[str, Any] | None
    options: dict[str, Any]


@contextmanager
def open_run(
    card: ModelCard,
    data: DataConfig,
    config: TrainConfig,
    place: PlaceConfig | None = None,
    start: StartConfig | None = None,
    *,
    quantized: bool = False,
    overrides: Overrides = (),
    evaluate: bool = False,
) -> Iterator[Run]:
    """Open everything that a training or an evaluation needs, and join the processes that were started together.

    All settings are checked before anything is written.

    Args:
        card: the arch, and other fields that override the weights' card and the network's defaults. Without
            ``num_classes``, the data's number of classes is used.
        data: the images' settings.
        config: hyperparameters and run control.
        place: where the run writes; None for the working directory.
        start: weights or a checkpoint to start from; None for random weights.
        quantized: whether quantizers are placed in the network.
        overrides: pairs of a pattern and a preset or "float", on top of the quantization spec.
        evaluate: whether only validation images are needed.

    Raises:
        UserError: a setting or the data can't be used.
    """
    with joined_world() as world:
        yield _prepare(
            card,
            data,
            config,
            place or PlaceConfig(),
            start or StartConfig(),
            world,
            quantized=quantized,
            overrides=overrides,
            evaluate=evaluate,
        )


def _prepare(
    asked: ModelCard,
    data: DataConfig,
    config: TrainConfig,
    place: PlaceConfig,
    start: StartConfig,
    world: World,
    *,
    quantized: bool,
    overrides: Overrides,
    evaluate: bool,
) -> Run:
    if asked.arch is None:
        raise UserError("which model is it? The card names no arch; give one.")
    entry = get_entry(asked.arch)
    asked = replace(asked, input=asked.input or entry.input)
    start = _started_again(start, config, place, world)
    checkpoint = load_checkpoint(start.resume) if start.resume else None
    if checkpoint is not None and (start.weights or start.pretrained):
        raise UserError("--resume and --pretrained-from-file (or --pretrained) both bring weights; give one of them.")
    config = _with_seed(config, checkpoint, world)
    config.check_processes(world.size)
    with world.main_first() if fills_cache(data.data) else nullcontext():
        train_source, val_source = _open_sources(data, asked, entry, evaluate=evaluate)
    classes = val_source.classes
    if asked.num_classes is not None and len(classes) != asked.num_classes:
        raise UserError(
            f"{data.data} has {len(classes)} classes, but the model has {asked.num_classes}; "
            f"pass --num-classes {len(classes)}."
        )
    asked = replace(asked, num_classes=len(classes), classes=tuple(classes))
    device = _device(config, place, world)  # binds cores, so it comes before memory is allocated
    assert config.seed is not None
    torch.manual_seed(config.seed)
    if checkpoint is not None:
        said = ModelCard.from_json(checkpoint.get("metadata") or {}, str(start.resume))
        weights: Weights | None = Weights(checkpoint["state_dict"], said, str(start.resume))
    else:
        with world.main_first():
            weights = starting_weights(start, entry)
    card = _card(asked, weights, quantized=quantized, overrides=overrides)
    if weights is not None and checkpoint is not None:
        _check_resumed_card(asked, card, weights)
    model = build(card, weights, new_classifier=start.new_classifier and checkpoint is None, **start.options)
    if weights is not None and checkpoint is None:
        for sentence in left_out(weights, model, card):
            print(f"note: {sentence}", file=sys.stderr)
    workspace = Path(place.workspace)
    if world.is_main:
        prepare_workspace(workspace)
    recorder = _recorder(place, config, workspace, world)
    world.wait()
    if world.rank > 0:  # dropout must differ between processes; process 0 draws like a single process
        torch.manual_seed(mix(config.seed, world.rank))
    trainer = Trainer(model, config, card, device, workspace, recorder, world)
    if checkpoint is not None and evaluate:
        trainer.load(checkpoint, str(start.resume))
    elif checkpoint is not None:
        _check_same_workers(train_source, checkpoint, config, str(start.resume))
        trainer.resume(checkpoint, str(start.resume))
    train, val = _loaders(data, config, card, train_source, val_source, device, world)
    return Run(
        card,
        model,
        trainer,
        config,
        data,
        recorder,
        device,
        train,
        train_source,
        val,
        world,
        None if checkpoint is None else checkpoint.get("config") or {},
        dict(start.options),
    )


def starting_weights(start: StartConfig, entry: ModelEntry) -> Weights | None:
    """Read the weights that a run starts from; None for random weights.

    Raises:
        UserError: they can't be read or downloaded.
    """
    if start.pretrained:
        return entry.pretrained()
    return read_weights(start.weights, ema=start.ema) if start.weights else None


def _card(asked: ModelCard, weights: Weights | None, *, quantized: bool, overrides: Overrides) -> ModelCard:
    """The model's card: fields as asked, else as in the weights, else the defaults."""
    assert asked.arch is not None
    card = choose_card(
        asked.arch,
        weights,
        num_classes=asked.num_classes,
        quantized=quantized,
        quant_spec=None if asked.quant_spec is None else resolve_spec(asked.quant_spec),
        overrides=overrides,
        target=asked.target,
        hard_swish=True if asked.activation == HARD_SWISH else None,
    )
    return replace(card, classes=asked.classes, input=asked.input)


def _check_resumed_card(asked: ModelCard, card: ModelCard, checkpoint: Weights) -> None:
    """Raises UserError if a resumed run asks for another network than its checkpoint's."""
    said, source = checkpoint.card, checkpoint.source
    otherwise = "or start from it with --pretrained-from-file."
    if asked.activation == HARD_SWISH and said.activation != HARD_SWISH:
        raise UserError(f"{source} goes on with the activations it began with; leave out --hard-swish, {otherwise}")
    if card.quant_spec is None:
        return
    if said.quant_spec is not None and not same_grids(resolve_spec(card.quant_spec), resolve_spec(said.quant_spec)):
        raise UserError(
            f"{source} goes on with the quantization it began with; leave out --quant-spec and --quant-override, {otherwise}"
        )
    began = choose_card(str(card.arch), checkpoint, num_classes=card.num_classes, quantized=True).target
    if asked.target not in (None, began):
        raise UserError(f"{source} goes on for {began}, for which it began; leave out --target, {otherwise}")


def _started_again(start: StartConfig, config: TrainConfig, place: PlaceConfig, world: World) -> StartConfig:
    """If torchrun has restarted the job, start from the job's own latest checkpoint."""
    latest = os.path.join(place.workspace, config.checkpoint_filename)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not os.path.isfile(latest):
        return start
    if load_checkpoint(latest).get("job") != world.job:  # it belongs to an earlier job
        return start
    print(f"started again: going on from {latest}", flush=True)
    return StartConfig(resume=latest, options=start.options)


def _with_seed(config: TrainConfig, checkpoint: dict[str, Any] | None, world: World) -> TrainConfig:
    """The configuration with a seed: its own, else the checkpoint's, else a random one, equal in all processes."""
    if config.seed is not None:
        return config
    resumed: int | None = None if checkpoint is None else (checkpoint.get("config") or {}).get("seed")
    seed = torch.tensor(random.SystemRandom().randrange(2**31) if resumed is None else resumed)
    world.broadcast([seed])
    return replace(config, seed=int(seed))


def _check_same_workers(source: ImageSource | None, checkpoint: dict[str, Any], config: TrainConfig, path: str) -> None:
    """Raises UserError if a run resumes within an epoch of shards, but with another number of workers and thus order."""
    before = (checkpoint.get("config") or {}).get("workers", config.workers)
    if isinstance(source, ShardSource) and checkpoint.get("batch") and before != config.workers:
        raise UserError(
            f"{path} stands in the middle of an epoch of shards that {before} workers read; resume it with -j {before}."
        )


def _open_sources(
    data: DataConfig, card: ModelCard, entry: ModelEntry, *, evaluate: bool
) -> tuple[ImageSource | None, ImageSource]:
    if SYNTHETIC in (data.backend, data.data):
        assert card.input is not None
        source = SyntheticSource(SYNTHETIC_IMAGES, card.num_classes or entry.num_classes, card.input.image_size)
        return source, source
    if evaluate:
        return None, open_validation(data.data)
    return open_sources(data.data)


def _device(config: TrainConfig, place: PlaceConfig, world: World) -> torch.device:
    """Set up this process's device and return it."""
    if place.gpu_affinity != "none":
        print(f"--gpu-affinity: {bind_to_gpu(place.gpu_affinity, world.local_rank)}", flush=True)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = place.tf32
        torch.backends.cudnn.allow_tf32 = place.tf32
        torch.backends.cudnn.benchmark = True  # worthwhile, because all images have one size
        return torch.device("cuda", world.local_rank)
    if config.amp and config.amp_dtype is None:
        print("no GPU: --amp runs in bfloat16, without a loss scale", flush=True)
    return torch.device("cpu")


def _recorder(place: PlaceConfig, config: TrainConfig, workspace: Path, world: World) -> Recorder:
    """The recorder of the run's metrics, for the raport file and the sinks. Only process 0 writes."""
    if not world.is_main:
        return Recorder(None)
    sinks: list[Sink] = []
    if place.tensorboard:
        sinks.append(TensorBoard(workspace))
    if place.wandb:
        sinks.append(WandB(place.wandb, workspace, asdict(config)))
    machine = describe_machine(world.size) if config.prof > 0 else None
    return Recorder(workspace / place.raport_file, machine, sinks)


def _loaders(
    data: DataConfig,
    config: TrainConfig,
    card: ModelCard,
    train_source: ImageSource | None,
    val_source: ImageSource,
    device: torch.device,
    world: World,
) -> tuple[Loader | None, Loader]:
    assert card.input is not None
    loader = partial(
        open_loader,
        data.backend,
        batch_size=config.batch_size,
        device=device,
        workers=config.workers,
        prefetch=data.prefetch,
        max_bad_images=data.max_bad_images,
        rank=world.rank,
        ranks=world.size,
    )
    evaluation = evaluation_transform(card.input)
    train = None
    if train_source is not None:
        augmented = training_transform(card.input, data.augmentation)
        transform = augmented if train_source.augmentable else evaluation
        train = loader(train_source, transform, shuffle=True, seed=config.seed)
    return train, loader(val_source, evaluation)


def calibration_loader(run: Run, count: int) -> Loader:
    """Load this process's share of ``count`` training images, spread evenly over the set, with the evaluation transform."""
    assert run.train_source is not None and run.card.input is not None
    chosen = _spread(torch.arange(len(run.train_source)), count)
    # consecutive shares, because a moving average depends on the order of the images
    share = chosen.tensor_split(run.world.size)[run.world.rank]
    return open_loader(
        "pytorch",
        run.train_source,
        evaluation_transform(run.card.input),
        run.config.batch_size,
        run.device,
        workers=run.config.workers,
        prefetch=run.data.prefetch,
        max_bad_images=run.data.max_bad_images,
        indices=share,
    )


def hold_back(run: Run, count: int, calibration_images: int) -> Loader:
    """Load ``count`` training images that ``calibration_loader`` leaves out, and take them out of the run's training.

    Raises:
        UserError: there are not so many, or they come from shards.
    """
    source = run.train_source
    assert source is not None and run.train is not None and run.card.input is not None and run.config.seed is not None
    everything = torch.arange(len(source))
    free = torch.ones(len(source), dtype=torch.bool)
    free[_spread(everything, calibration_images)] = False
    if not 0 < count <= int(free.sum()) or isinstance(source, ShardSource):
        raise UserError(
            f"{count} images can't be held back: {len(source)} training images, of which {calibration_images} calibrate, "
            "must leave as many, and shards can't be split; hold fewer back, or give validation images."
        )
    held = _spread(everything[free], count)
    free[:] = True
    free[held] = False
    evaluation = evaluation_transform(run.card.input)
    augmented = training_transform(run.card.input, run.data.augmentation) if source.augmentable else evaluation
    loader = partial(
        open_loader,
        batch_size=run.config.batch_size,
        device=run.device,
        workers=run.config.workers,
        prefetch=run.data.prefetch,
        max_bad_images=run.data.max_bad_images,
    )
    run.train = loader(
        run.data.backend, source, augmented, indices=everything[free], shuffle=True, seed=run.config.seed
    )
    return loader("pytorch", source, evaluation, indices=held)


def _spread(positions: Tensor, count: int) -> Tensor:
    """``count`` of the positions, or all if there are fewer, spread evenly."""
    count = min(count, len(positions))
    return positions[torch.arange(count) * len(positions) // count]

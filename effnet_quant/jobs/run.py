"""Run: data, model and trainer, made from the settings of a run."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from effnet_quant.data.identity import identity
from effnet_quant.data.loaders import Loader
from effnet_quant.data.seeding import mix
from effnet_quant.data.shards import ShardSource
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.errors import UserError
from effnet_quant.files import possible_path
from effnet_quant.jobs.classes import check_classes, check_count, label_order
from effnet_quant.jobs.config import DataConfig, PlaceConfig, StartConfig
from effnet_quant.jobs.same_data import check_same_classes, say_other_images
from effnet_quant.models.entry import ModelEntry
from effnet_quant.models.registry import get_entry
from effnet_quant.models.weights import Weights, read_card, read_weights
from effnet_quant.quantization.spec import resolve_spec, same_grids
from effnet_quant.terminal import printable
from effnet_quant.training.affinity import bind_to_gpu
from effnet_quant.training.checkpoint import BEST_FILENAME, load_checkpoint, prepare_workspace
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import SHARED_NAMES, World, joined_world
from effnet_quant.training.machine import describe_machine
from effnet_quant.training.metrics import Recorder
from effnet_quant.training.sinks import Sink, TensorBoard, WandB
from effnet_quant.training.trainer import Trainer
from effnet_quant.training.workspace import check_unused, locked


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
        card: fields that override the weights' card and the network's defaults. Without ``arch``, the weights' card names
            it. Without ``num_classes``, the data's number of classes is used.
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
    with joined_world() as world, ExitStack() as held:
        yield _prepare(
            card,
            data,
            config,
            place or PlaceConfig(),
            start or StartConfig(),
            world,
            held,
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
    held: ExitStack,
    *,
    quantized: bool,
    overrides: Overrides,
    evaluate: bool,
) -> Run:
    workspace = possible_path(place.workspace)
    start = _started_again(start, config, place, world)
    writes_new = config.save_checkpoints and not evaluate and not start.resume
    if world.is_main and writes_new and not place.overwrite:
        check_unused(workspace, (config.checkpoint_filename, BEST_FILENAME))
    checkpoint = _resumed_checkpoint(start)
    config = _with_seed(config, checkpoint, world)
    config.check_processes(world.size)
    said = _card_to_start_from(start, checkpoint)
    asked = replace(asked, arch=asked.arch or said.arch)
    if asked.arch is None:
        raise UserError("which model is it? Neither the card nor the weights name an arch; give one.")
    entry = get_entry(asked.arch)
    asked = replace(asked, input=asked.input or said.input or entry.input)
    with world.main_first() if fills_cache(data.data) else nullcontext():
        train_source, val_source = _open_sources(data, asked, said, entry, evaluate=evaluate)
    classes = val_source.classes
    check_same_classes(checkpoint, str(start.resume), classes, data.data, evaluate=evaluate)
    check_count(asked.num_classes, classes, data.data)
    asked = replace(asked, num_classes=len(classes), classes=tuple(classes))
    device = _device(config, place, world)  # binds cores, so it comes before memory is allocated
    assert config.seed is not None
    torch.manual_seed(config.seed)
    if checkpoint is not None:
        weights: Weights | None = Weights(checkpoint["state_dict"], said, str(start.resume))
    else:
        with world.main_first():
            weights = starting_weights(start, entry)
    if weights is not None and (checkpoint is not None or not start.new_classifier):
        check_classes(weights, entry, classes, data.data)
    card = _card(asked, weights, quantized=quantized, overrides=overrides)
    if weights is not None and checkpoint is not None:
        _check_resumed_card(asked, card, weights)
    model = build(card, weights, new_classifier=start.new_classifier and checkpoint is None, **start.options)
    if weights is not None and checkpoint is None:
        for sentence in left_out(weights, model, card):
            print(f"note: {printable(sentence)}", file=sys.stderr)
    if world.is_main:
        prepare_workspace(workspace)
        held.enter_context(nullcontext() if evaluate else locked(workspace, world.job))
    recorder = _recorder(place, config, workspace, world)
    world.wait()
    if world.rank > 0:  # dropout must differ between processes; process 0 draws like a single process
        torch.manual_seed(mix(config.seed, world.rank))
    trainer = Trainer(model, config, card, device, workspace, recorder, world)
    if checkpoint is not None:
        _resume(trainer, checkpoint, str(start.resume), train_source, config)
    if train_source is not None and world.is_main:
        trainer.entries["data"] = identity(train_source)
        say_other_images(checkpoint, str(start.resume), trainer.entries["data"], data.data)
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


def _resumed_checkpoint(start: StartConfig) -> dict[str, Any] | None:
    """The checkpoint that the run resumes, if it resumes one."""
    checkpoint = load_checkpoint(start.resume) if start.resume else None
    if checkpoint is not None and (start.weights or start.pretrained):
        raise UserError("--resume and --pretrained-from-file (or --pretrained) both bring weights; give one of them.")
    return checkpoint


def _resume(
    trainer: Trainer, checkpoint: dict[str, Any], path: str, train: ImageSource | None, config: TrainConfig
) -> None:
    """Let the trainer go on from a checkpoint; for an evaluation, which has no training images, load only weights."""
    if train is None:
        trainer.load(checkpoint, path)
    else:
        _check_same_workers(train, checkpoint, config, path)
        trainer.resume(checkpoint, path)


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
    """If torchrun has started the job again, start from the job's own latest checkpoint. All processes call this.

    torchrun counts the restarts of each machine by itself, and none after a machine has joined. So the name of the job
    decides, except where all jobs have the same.
    """
    latest = os.path.join(place.workspace, config.checkpoint_filename)
    counted = world.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if (counted == 0 and world.job in SHARED_NAMES) or not os.path.isfile(latest):
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


def _card_to_start_from(start: StartConfig, checkpoint: dict[str, Any] | None) -> ModelCard:
    """What the file of a run's first weights says of its model; an empty card without such a file."""
    if checkpoint is not None:
        return ModelCard.from_json(checkpoint.get("metadata") or {}, str(start.resume))
    return read_card(start.weights) if start.weights else ModelCard()


def _open_sources(
    data: DataConfig, card: ModelCard, said: ModelCard, entry: ModelEntry, *, evaluate: bool
) -> tuple[ImageSource | None, ImageSource]:
    """The images of a run. Labels count the classes of ``said``, the weights' card, if the data has no others."""
    if SYNTHETIC in (data.backend, data.data):
        assert card.input is not None
        count = card.num_classes or said.num_classes or entry.num_classes
        source = SyntheticSource(SYNTHETIC_IMAGES, count, card.input.image_size)
        return None if evaluate else source, source
    classes = label_order(data.data, said, evaluate=evaluate)
    if evaluate:
        return None, open_validation(data.data, classes)
    return open_sources(data.data, classes)


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
        augmented = training_transform(card.input, data.augmentation, data.smallest_crop)
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
    augmented = training_transform(run.card.input, run.data.augmentation, run.data.smallest_crop)
    loader = partial(
        open_loader,
        batch_size=run.config.batch_size,
        device=run.device,
        workers=run.config.workers,
        prefetch=run.data.prefetch,
        max_bad_images=run.data.max_bad_images,
    )
    transform = augmented if source.augmentable else evaluation
    run.train = loader(
        run.data.backend, source, transform, indices=everything[free], shuffle=True, seed=run.config.seed
    )
    return loader("pytorch", source, evaluation, indices=held)


def _spread(positions: Tensor, count: int) -> Tensor:
    """``count`` of the positions, or all if there are fewer, spread evenly."""
    count = min(count, len(positions))
    return positions[torch.arange(count) * len(positions) // count]

"""The training loop: train, validate, save, resume."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effnet_quant.card import ModelCard
from effnet_quant.data.erasing import erase
from effnet_quant.data.loaders import Loader
from effnet_quant.data.seeding import mix
from effnet_quant.data.transforms import normalize
from effnet_quant.data.workers import explained_deaths
from effnet_quant.memory import keep_freed_memory
from effnet_quant.models.weights import Weights, load_weights
from effnet_quant.structure import in_float32, map_leaves
from effnet_quant.tasks import get_task
from effnet_quant.tasks.task import Loss, Targets, Task
from effnet_quant.training.callback import Callback
from effnet_quant.training.checkpoint import save_checkpoint
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.distributed import ALONE, World
from effnet_quant.training.divergence import DivergenceWatch, check_weights
from effnet_quant.training.ema import WeightAverage
from effnet_quant.training.freezing import freeze
from effnet_quant.training.metrics import LossMeter, Recorder, Stopwatch, describe
from effnet_quant.training.optimizers import LR_SCALE, build_optimizer, learned_ranges, load_optimizer_state
from effnet_quant.training.precision import choose_precision
from effnet_quant.training.progress import duration, progress
from effnet_quant.training.resume_point import Position, check_same_batches, random_states, restore_random_state
from effnet_quant.training.schedules import learning_rate
from effnet_quant.training.signals import Abandoned, Interrupted, SignalWatch
from effnet_quant.training.step_start import StepStart, interruptible_backward


class Trainer:
    """Trains and evaluates one model, alone or as one process of a job.

    On a CPU, the process keeps freed memory from then on (``keep_freed_memory``).

    Args:
        model: the network; moved to the device.
        config: hyperparameters and run control.
        card: the model's card, which checkpoints store. Its ``input`` says how to normalise uint8 images.
        device: where to compute.
        workspace: folder of the checkpoints.
        recorder: receives the metrics.
        world: the processes that train together.
        task: the network's task; None for the card's.

    Attributes:
        task: the task, with the options of the configuration.
        loss: what training minimises; at first the task's loss.
        callbacks: called in this order when training reaches certain points; empty at first.
        entries: further entries of the checkpoints, plain values; empty at first.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        card: ModelCard,
        device: torch.device,
        workspace: Path,
        recorder: Recorder,
        world: World = ALONE,
        task: Task | None = None,
    ) -> None:
        self.config = config
        self.task = (task or get_task(card.task)).configured(config)
        self.device = device
        if device.type == "cpu":
            keep_freed_memory()
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self._frozen_norms = freeze(model, config.freeze)
        self.optimizer = build_optimizer(model, config)
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.loss: Loss = self.task.loss
        self.callbacks: list[Callback] = []
        self.entries: dict[str, Any] = {}
        assert card.input is not None and config.seed is not None
        self._seed = config.seed
        self._input_spec = card.input
        self.workspace = workspace
        self._recorder = recorder
        self._card = card
        self._world = world
        self._precision = choose_precision(
            device,
            amp=config.amp,
            amp_dtype=config.amp_dtype,
            loss_scale=config.static_loss_scale,
            dynamic=config.dynamic_loss_scale,
        )
        self._scaler = self._precision.scaler
        self._batches_per_step = config.batches_per_step(world.size)
        self._average: WeightAverage | None = None
        self._position = Position()
        self._effective_steps: int | Tensor = 0  # without the steps that overflowed, which the scaler skips
        self.optimizer.register_step_post_hook(self._count_step)
        self._loss_sums: Tensor | None = None  # of the epoch in which a resumed run starts
        self._signals = SignalWatch(abandons=world.size == 1)  # several processes stop after the same step
        if config.compile:
            self.model.compile()

    @property
    def models(self) -> list[nn.Module]:
        """The trained network and, once training with ``use_ema`` has begun, the averaged one."""
        return [self.model] if self._average is None else [self.model, self._average.model]

    @explained_deaths()
    def fit(self, train: Loader, val: Loader) -> None:
        """Train to the end of the configured epochs. Validate and write a checkpoint after each.

        SIGINT, SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint to resume from. A single process
        gives up a step, or any other work, that takes more than two seconds longer; its checkpoint is that of the step
        before.

        Raises:
            Interrupted: a signal arrived.
            UserError: too many images can't be read, a checkpoint can't be written, or the loss is not finite.
        """
        config, position = self.config, self._position
        position.check_agreement(self._world)
        if 0 < config.epochs <= position.epoch:
            print(f"nothing left to train: {position.epoch} of {config.epochs} epochs are done", flush=True)
        if position.step == 0:  # NVIDIA's checkpoints hold no step, which the moving average needs
            position.step = position.epoch * math.ceil(self._batches_of(train) / self._batches_per_step)
        last = config.epochs
        if config.run_epochs >= 0:
            last = min(last, position.epoch + config.run_epochs)
        if self._average is None:
            self._average = self._new_average()
        network = self._network()
        start = StepStart(self.models, self.device)
        with self._signals, self._interruptible_backward():
            try:
                while position.epoch < last and not self._stopped_early():
                    self._whole_epoch(network, train, val, start, last)
            except Abandoned:
                position.batch = start.restore()
                self._stop_if_signalled()
        if position.epoch < last:
            print(
                f"stopped early: {position.epochs_since_best} epochs without a better {self.task.score.title}",
                flush=True,
            )

    @property
    def epochs_done(self) -> int:
        """The whole epochs that are trained, in earlier runs too."""
        return self._position.epoch

    def _whole_epoch(self, network: nn.Module, train: Loader, val: Loader, start: StepStart, last: int) -> None:
        """Train for an epoch, or what is left of it, validate, record the metrics and write a checkpoint.

        ``last``: epochs after which the run ends, for the estimate of its time.
        """
        config, position, score = self.config, self._position, self.task.score
        begin, whole = time.monotonic(), position.batch == 0
        metrics = self._train_epoch(network, train, start)
        title = f"epoch {position.epoch + 1}/{config.epochs}"
        if not config.training_only:
            metrics |= self.validate(val, f"{title} val")
        self._recorder.record(metrics, epoch=position.epoch)
        left = last - position.epoch - 1
        estimate = f", about {duration((time.monotonic() - begin) * left)} left" if whole and left else ""
        print(f"{title}: {describe(metrics)}{estimate}", flush=True)
        reached = metrics.get(f"val.{score.key}")
        is_best = reached is not None and position.note_score(score.ranked(reached))
        position.epoch, position.batch, self._loss_sums = position.epoch + 1, 0, None
        self.save(is_best=is_best)
        self._stop_if_signalled(save=False)

    def validate(self, loader: Loader, title: str = "evaluate") -> dict[str, float]:
        """Evaluate the model under ``val.`` and the averaged weights, if there are any, under ``val_ema.``."""
        metrics = self.evaluate(loader, "val", title)
        if self._average is not None:
            metrics |= self.evaluate(loader, "val_ema", f"{title} of the averaged weights", self._average.model)
        return metrics

    @torch.no_grad()
    @explained_deaths()
    def evaluate(
        self, loader: Loader, prefix: str = "val", title: str = "evaluate", model: nn.Module | None = None
    ) -> dict[str, float]:
        """Evaluate in eval mode; returns the task's metrics and the speeds under ``<prefix>.``.

        Each image of all processes' loaders counts once. ``model`` is evaluated in place of the trainer's own.
        """
        model = (self.model if model is None else model).eval()
        metric = self.task.metric(self.device)
        total = self._batches_of(loader)
        most = self._world.any(total)
        stopwatch = self._stopwatch(total)
        done = 0
        batches = self._signals.waiting_for(islice(loader.epoch(), total))
        for images, targets in progress(batches, total, title, self.config.print_freq):
            done += 1
            stopwatch.data_ready()
            with self._signals.abandonable(), self._precision.autocast():
                outputs = model(self._inputs(images))
            metric.add(in_float32(outputs), self._targets(targets))
            self._synchronize()
            stopwatch.batch_done(len(images))
            self._stop_if_signalled()
        self._wait_for_device(stopwatch)
        for _ in range(most - done):  # a collective call: processes with more batches call it after each
            self._stop_if_signalled()
        metric.merge(self._world)
        results = {f"{prefix}.{name}": value for name, value in metric.results().items()}
        return results | self._speeds(stopwatch, prefix)

    def load(self, checkpoint: dict[str, Any], source: str) -> bool:
        """Load the weights of a checkpoint and, with ``use_ema``, the averaged weights. Nothing else is loaded.

        Returns:
            Whether every quantizer of the model now has a range (True for a float model).

        Raises:
            UserError: the weights do not fit the model.
        """
        has_ranges = load_weights(self.model, Weights(checkpoint["state_dict"], source=source))
        self._average = self._new_average()
        if self._average is not None and "state_dict_ema" in checkpoint:
            load_weights(self._average.model, Weights(checkpoint["state_dict_ema"], source=source))
        return has_ranges

    def resume(self, checkpoint: dict[str, Any], source: str) -> bool:
        """Load weights, optimizer, position and random state from a checkpoint (of ``load_checkpoint``).

        Returns:
            Whether every quantizer of the model now has a range (True for a float model).

        Raises:
            UserError: the checkpoint does not fit the model or the configuration.
        """
        position = Position.of(checkpoint, source)
        if position.batch > 0:
            check_same_batches(checkpoint, source, self.config, self._world.size)
        has_ranges = self.load(checkpoint, source)
        load_optimizer_state(self.optimizer, self._scaler, checkpoint, source)
        self._position = position
        if position.batch > 0 and self._world.is_main:
            self._loss_sums = checkpoint.get("loss_sums")
        restore_random_state(checkpoint, source, self._world, self.device)
        return has_ranges

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint now, unless checkpoints are off. All processes of a job call this."""
        if not self.config.save_checkpoints:
            return
        states = random_states(self._world, self.device)
        loss_sums = None if self._loss_sums is None else self._world.sum(self._loss_sums).cpu()
        if self._world.is_main:
            self._write_checkpoint(states, loss_sums, is_best=is_best)
        self._world.wait()  # if another process ended now, torchrun would end process 0 while it writes

    def note_signal(self, number: int) -> None:
        """Stop after this step, as if the signal ``number`` had arrived."""
        self._signals.note(number)

    def _write_checkpoint(self, states: dict[str, Any], loss_sums: Tensor | None, *, is_best: bool) -> None:
        check_weights(self.model)
        averaged = {} if self._average is None else {"state_dict_ema": _on_cpu(self._average.model)}
        save_checkpoint(
            {
                **self.entries,
                **self._position.entries(),
                "arch": self._card.arch,
                "state_dict": _on_cpu(self.model),
                **averaged,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "loss_sums": loss_sums,
                **states,
                "config": dataclasses.asdict(self.config),
                "processes": self._world.size,
                "job": self._world.job,
                "metadata": self._card.to_json(),
            },
            self.workspace,
            self.config.checkpoint_filename,
            is_best=is_best,
            gather=self.config.gather_checkpoints if self._position.batch == 0 < self._position.epoch else 0,
        )

    def _stopped_early(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self._position.epochs_since_best

    def _new_average(self) -> WeightAverage | None:
        if self.config.use_ema is None:
            return None
        average = WeightAverage(self.model, self.config.use_ema)
        if self.config.compile:  # copies of a compiled network are not compiled
            average.model.compile()
        return average

    def _interruptible_backward(self) -> AbstractContextManager[None]:
        # a GPU's passes are short for the main thread, and torch.compile would compile the hooks
        plain = self.device.type == "cpu" and self._world.size == 1 and not self.config.compile
        return interruptible_backward(self.model) if plain else nullcontext()

    def _network(self) -> nn.Module:
        """The model for training: gradients are averaged over the processes, and buffers are those of process 0."""
        if self._world.size == 1:
            return self.model
        return DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(learned_ranges(self.model)),  # unused while their quantizers are off
        )

    def _train_epoch(self, network: nn.Module, loader: Loader, start: StepStart) -> dict[str, float]:
        config, position = self.config, self._position
        lr = learning_rate(
            config.lr_schedule,
            position.epoch,
            base_lr=config.lr,
            epochs=config.epochs,
            warmup=config.warmup,
            end_lr=config.end_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_SCALE, 1)
        self._start_training_mode()
        total = self._batches_of(loader)
        first, steps_before, effective_before = position.batch, position.step, self._effective_steps
        meter = LossMeter(self.device, self._loss_sums)
        self._loss_sums = meter.sums
        scaled = self._scaler.is_enabled()
        locate = partial(self._locate_divergence, loader)
        watch = DivergenceWatch(
            meter, loader, position.epoch, self.workspace, self._world, scaled=scaled, locate=locate
        )
        stopwatch = self._stopwatch(total - first)
        title = f"epoch {position.epoch + 1}/{config.epochs} train"
        batches = self._signals.waiting_for(islice(loader.epoch(position.epoch, first), max(0, total - first)))
        start.note(position.batch, meter.sums)
        for images, targets in progress(batches, total - first, title, config.print_freq):
            stopwatch.data_ready()
            before = position.batch % self._batches_per_step
            # the last step of an epoch may have fewer batches
            accumulated = min(self._batches_per_step, total - (position.batch - before))
            complete = before + 1 == accumulated
            with self._signals.abandonable():
                self._forward_backward(network, images, targets, accumulated, complete, meter, watch)
            if complete:
                self._optimizer_step()
            self._synchronize()
            stopwatch.batch_done(len(images))
            position.batch += 1
            if complete:
                start.note(position.batch, meter.sums)
            if complete and position.batch < total:
                every = config.checkpoint_every_steps
                if every > 0 and position.step % every == 0:
                    watch.check()
                    self.save()
                self._stop_if_signalled(watch)
        self._wait_for_device(stopwatch)
        watch.check()
        self.optimizer.zero_grad(set_to_none=True)
        if self._world.size > 1:
            self._world.broadcast(self.model.buffers())
            if self._average is not None:
                self._world.broadcast(self._average.model.buffers())
        for callback in self.callbacks:
            with self._signals.abandonable():
                callback.on_epoch_end(position.epoch)
        metrics = {"train.loss": meter.mean(self._world), "train.lr": lr, **self._speeds(stopwatch, "train")}
        if scaled:
            steps = position.step - steps_before
            skipped = steps - int(self._effective_steps - effective_before)
            metrics["train.skipped_steps"] = skipped
            watch.report_skipped(skipped, steps)
        return metrics

    def _start_training_mode(self) -> None:
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()
        for callback in self.callbacks:
            callback.on_epoch_start(self._position.epoch)

    def _forward_backward(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Targets,
        accumulated: int,
        complete: bool,
        meter: LossMeter,
        watch: DivergenceWatch,
    ) -> None:
        seed = mix(self._seed, self._position.epoch, self._position.batch, self._world.rank)
        inputs = self._inputs(images)
        if self.config.random_erasing:
            inputs = erase(inputs, self.config.random_erasing, mix(seed, 1))
        inputs, targets = self.task.mixed(inputs, self._targets(targets), self._card.num_classes or -1, seed)
        # processes exchange gradients once per optimizer step
        local = not complete and isinstance(network, DistributedDataParallel)
        with network.no_sync() if local else nullcontext():  # type: ignore[operator]
            with self._precision.autocast():
                outputs = network(inputs)
                loss = self.loss(in_float32(outputs), targets, inputs)
            meter.add(loss.detach(), len(images), self._position.batch)
            # asking a GPU means waiting for it, so it is asked rarely
            if self.device.type == "cpu" or self._position.batch % self.config.print_freq == 0:
                watch.check()
            if self._position.batch % self._batches_per_step == 0:
                # if they were freed right after the step, a CPU's forward pass would take their memory, and the backward
                # pass would pay for new memory (6 %)
                self.optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(loss / accumulated).backward()

    def _optimizer_step(self) -> None:
        if self.config.clip_grad_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trained, self.config.clip_grad_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update(self.model, self._position.step)
        self._position.step += 1
        for callback in self.callbacks:
            callback.on_step_end(self._position.step)

    def _locate_divergence(self, loader: Loader, batch: int) -> str | None:
        """The part of the network that a callback names as the origin of a batch's non-finite loss."""
        if not self.callbacks:
            return None
        images, _ = next(loader.epoch(self._position.epoch, batch))
        inputs = self._inputs(images)
        return next((place for callback in self.callbacks if (place := callback.on_divergence(inputs))), None)

    def _count_step(self, *arguments: object) -> None:
        # the scaler calls a fused optimizer for skipped steps too, with found_inf set on the device
        overflowed = getattr(self.optimizer, "found_inf", None)
        self._effective_steps = self._effective_steps + (1 if overflowed is None else 1 - overflowed)

    def _inputs(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return normalize(images, self._input_spec).contiguous(memory_format=self._memory_format)

    def _targets(self, targets: Targets) -> Targets:
        """Move all tensors to the trainer's device; leave other values, such as text."""

        def moved(target: Any) -> Any:
            return target.to(self.device, non_blocking=True) if isinstance(target, Tensor) else target

        return map_leaves(moved, targets)

    def _batches_of(self, loader: Loader) -> int:
        return len(loader) if self.config.prof < 0 else min(self.config.prof, len(loader))

    def _stopwatch(self, batches: int) -> Stopwatch:
        """A new stopwatch. With --prof the first tenth of the batches is warm-up."""
        warmup = max(1, batches // 10) if self.config.prof > 0 and batches > 1 else 0
        return Stopwatch(self._world.size, warmup)

    def _speeds(self, stopwatch: Stopwatch, prefix: str) -> dict[str, float]:
        waited_for = self.device.type == "cpu" or self.config.prof > 0
        return stopwatch.metrics(prefix) | (stopwatch.latencies(prefix) if waited_for else {})

    def _synchronize(self) -> None:
        """With --prof, wait for the GPU, so that the stopwatch measures its time."""
        if self.device.type == "cuda" and self.config.prof > 0:
            torch.cuda.synchronize()

    def _wait_for_device(self, stopwatch: Stopwatch) -> None:
        """At the end of a loop, wait for the GPU and count the time as the last batch's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            stopwatch.device_done()

    def _stop_if_signalled(self, watch: DivergenceWatch | None = None, *, save: bool = True) -> None:
        number = self._world.any(self._signals.noted)
        if number:
            if watch is not None:
                watch.check()
            if save:
                self.save()
            raise Interrupted(number)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

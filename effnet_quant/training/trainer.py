"""The loop: train, validate, remember, resume."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import Preprocessing, normalize
from effnet_quant.errors import UserError
from effnet_quant.models.weights import Weights, load_weights
from effnet_quant.training.checkpoint import save_checkpoint
from effnet_quant.training.config import TrainConfig
from effnet_quant.training.metrics import Accuracy, Recorder, Stopwatch
from effnet_quant.training.optimizers import build_optimizer
from effnet_quant.training.progress import progress
from effnet_quant.training.schedules import learning_rate


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Trainer:
    """Trains and evaluates one model.

    Args:
        model: the network; moved to the device.
        config: hyperparameters and run control.
        preprocessing: how uint8 images become the model's input.
        device: where to compute.
        workspace: folder of the checkpoints.
        recorder: where metrics go.
        metadata: what checkpoints say of the model (arch, classes, preprocessing …), plain values.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        workspace: Path,
        recorder: Recorder,
        metadata: dict[str, Any],
    ) -> None:
        self.config = config
        self.device = device
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(model, config)
        self._preprocessing = preprocessing
        self._workspace = workspace
        self._recorder = recorder
        self._metadata = metadata
        self._amp_dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        # a static scale, as in NVIDIA's recipes: it never grows; a step that overflows is skipped and halves it
        self._scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.static_loss_scale,
            growth_interval=10**9,
            enabled=config.amp and device.type == "cuda",
        )
        self._epoch = 0
        self._batch = 0  # of the epoch; not 0 only in a run that was interrupted within it
        self._best_top1 = -math.inf
        self._epochs_since_best = 0
        self._signal: int | None = None

    def fit(self, train: Loader, val: Loader, after_epoch: Callable[[], None] | None = None) -> None:
        """Train to the end of the configured epochs, validating and writing checkpoints after each.

        ``after_epoch`` is called when an epoch's training is done, before its validation and its checkpoint.

        SIGINT and SIGTERM end the run after the current step with a checkpoint from which it resumes there.

        Raises:
            Interrupted: a signal arrived.
            UserError: an image can't be read, a checkpoint can't be written, or the loss is not finite.
        """
        config = self.config
        last = config.epochs
        if config.run_epochs > 0:
            last = min(last, self._epoch + config.run_epochs)
        with _signals_noted(self):
            while self._epoch < last:
                metrics = self._train_epoch(train)
                if after_epoch is not None:
                    after_epoch()
                if not config.training_only:
                    metrics |= self.evaluate(val, "val", f"epoch {self._epoch + 1}/{config.epochs} val")
                self._recorder.record(metrics, epoch=self._epoch)
                print(f"epoch {self._epoch + 1}/{config.epochs}: {describe(metrics)}", flush=True)
                top1 = metrics.get("val.top1")
                is_best = top1 is not None and top1 > self._best_top1
                if top1 is not None:
                    self._best_top1 = max(self._best_top1, top1)
                    self._epochs_since_best = 0 if is_best else self._epochs_since_best + 1
                self._epoch, self._batch = self._epoch + 1, 0
                self.save(is_best=is_best)
                self._stop_if_signalled()
                if 0 < config.early_stopping_patience <= self._epochs_since_best:
                    print(f"stopped early: {self._epochs_since_best} epochs without a better top-1", flush=True)
                    break

    @torch.no_grad()
    def evaluate(self, loader: Loader, prefix: str = "val", title: str = "evaluate") -> dict[str, float]:
        """Loss, accuracies and speeds of the model in eval mode on every image of ``loader``, under ``<prefix>.``."""
        self.model.eval()
        accuracy = Accuracy(self.config.topk, self.device)
        total = len(loader) if self.config.prof < 0 else min(self.config.prof, len(loader))
        stopwatch = Stopwatch()
        for images, labels in progress(islice(loader.epoch(), total), total, title, self.config.print_freq):
            stopwatch.data_ready()
            with self._autocast():
                logits = self.model(self._inputs(images))
            truth = labels.to(self.device, non_blocking=True)
            logits = logits.float()
            accuracy.add(F.cross_entropy(logits, truth), logits, truth)
            self._synchronize()
            stopwatch.batch_done(len(labels))
            self._stop_if_signalled(save=True)
        return accuracy.metrics(prefix) | stopwatch.metrics(prefix)

    def resume(self, checkpoint: dict[str, Any], source: str) -> bool:
        """Take up model, optimizer, position and random state from a checkpoint (``load_checkpoint``'s).

        Returns:
            Whether every quantizer of the model has a range now (True for a float model).

        Raises:
            UserError: it does not fit the model or the configuration.
        """
        batch, made_with = int(checkpoint.get("batch", 0)), (checkpoint.get("config") or {}).get("batch_size")
        if batch > 0 and made_with != self.config.batch_size:
            raise UserError(
                f"{source} stands in the middle of an epoch of batches of {made_with}; resume it with -b {made_with}."
            )
        has_ranges = load_weights(self.model, Weights(checkpoint["state_dict"], source=source))
        try:
            if checkpoint.get("optimizer"):
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                _check_shapes(self.optimizer)
            if checkpoint.get("scaler"):
                self._scaler.load_state_dict(checkpoint["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the optimizer state in {source} does not fit: {error}; resume with the --optimizer it was made with."
            ) from error
        self._epoch = int(checkpoint["epoch"])
        self._batch = batch
        best = checkpoint.get("best_prec1")
        self._best_top1 = -math.inf if best is None else float(best)
        self._epochs_since_best = int(checkpoint.get("epochs_since_best", 0))
        if isinstance(random_state := checkpoint.get("rng"), Tensor):
            torch.set_rng_state(random_state)
        if isinstance(random_state := checkpoint.get("cuda_rng"), Tensor) and self.device.type == "cuda":
            torch.cuda.set_rng_state(random_state)
        return has_ranges

    def save(self, *, is_best: bool = False) -> None:
        """Write the checkpoint of this moment, unless checkpoints are off."""
        if not self.config.save_checkpoints:
            return
        save_checkpoint(
            {
                "epoch": self._epoch,
                "batch": self._batch,
                "arch": self._metadata["arch"],
                "state_dict": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
                "best_prec1": self._best_top1,
                "epochs_since_best": self._epochs_since_best,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                "config": dataclasses.asdict(self.config),
                "metadata": self._metadata,
            },
            self._workspace,
            self.config.checkpoint_filename,
            is_best=is_best,
            gather=self.config.gather_checkpoints if self._batch == 0 else 0,
        )

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember to stop after this step; a second signal of the kind ends the process at once."""
        self._signal = number
        signal.signal(number, signal.SIG_DFL)

    def _train_epoch(self, loader: Loader) -> dict[str, float]:
        config = self.config
        lr = learning_rate(
            config.lr_schedule,
            self._epoch,
            base_lr=config.lr,
            epochs=config.epochs,
            warmup=config.warmup,
            end_lr=config.end_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total = len(loader) if config.prof < 0 else min(config.prof, len(loader))
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        title = f"epoch {self._epoch + 1}/{config.epochs} train"
        first = self._batch
        batches = islice(loader.epoch(self._epoch, first), max(0, total - first))
        stopwatch = Stopwatch()
        for images, labels in progress(batches, total - first, title, config.print_freq):
            stopwatch.data_ready()
            losses += self._step(images, labels, total)
            self._synchronize()
            stopwatch.batch_done(len(labels))
            self._batch += 1
            if self._signal is not None and self._batch % config.batches_per_step == 0 and self._batch < total:
                self._check_finite(losses)
                self._stop_if_signalled(save=True)
        if self._batch == first:  # resumed behind the last batch
            return {}
        self._check_finite(losses)
        mean_loss = (losses / (self._batch - first)).item()
        return {"train.loss": mean_loss, "train.lr": lr, **stopwatch.metrics("train")}

    def _check_finite(self, losses: Tensor) -> None:
        if not torch.isfinite(losses):
            raise UserError(
                f"the loss is {losses.item()} in epoch {self._epoch + 1}: training has diverged; lower --lr, "
                "and resume from the last checkpoint."
            )

    def _step(self, images: Tensor, labels: Tensor, total: int) -> Tensor:
        config = self.config
        labels = labels.to(self.device, non_blocking=True)
        with self._autocast():
            logits = self.model(self._inputs(images))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        # the mean over the optimizer's batch, which at the end of an epoch may hold fewer batches
        position = self._batch % config.batches_per_step
        accumulated = min(config.batches_per_step, total - (self._batch - position))
        self._scaler.scale(loss / accumulated).backward()
        if position + 1 == accumulated:
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().double()

    def _inputs(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return normalize(images, self._preprocessing).contiguous(memory_format=self._memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=self.config.amp)

    def _synchronize(self) -> None:
        """Let the stopwatch see the device's time; only where the user asked for a profile."""
        if self.device.type == "cuda" and self.config.prof > 0:
            torch.cuda.synchronize()

    def _stop_if_signalled(self, *, save: bool = False) -> None:
        if self._signal is not None:
            if save:
                self.save()
            raise Interrupted(self._signal)


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")


class _signals_noted:
    """SIGINT and SIGTERM set the trainer's flag while the block runs (in the main thread; elsewhere it does nothing)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._trainer.note_signal)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def describe(metrics: dict[str, float]) -> str:
    """Metrics on one line for people."""
    shown = {
        name: value
        for name, value in metrics.items()
        if not name.endswith(("data_time", "compute_time", "compute_ips"))
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())

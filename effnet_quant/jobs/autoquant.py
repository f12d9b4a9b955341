"""Climbs from cheap to dear ways of quantization until the engine loses little enough, and keeps the best so far."""

from __future__ import annotations

import copy
import json
import math
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effnet_quant.api import build
from effnet_quant.card import ModelCard
from effnet_quant.data.transforms import normalize
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, replace_file
from effnet_quant.jobs.engine_judge import EngineJudge, Verdict
from effnet_quant.jobs.float_training import fit
from effnet_quant.jobs.quantized_training import distilled, prepare_quantized
from effnet_quant.jobs.run import Run, calibration_loader, hold_back
from effnet_quant.models.weights import Weights, load_weights, write_weights
from effnet_quant.quantization.calibration import track_outputs
from effnet_quant.quantization.ptq.mixed_precision import mixed_precision
from effnet_quant.quantization.ptq.step import Step, StepContext
from effnet_quant.quantization.qat import QatConfig
from effnet_quant.quantization.recipe import RECIPES
from effnet_quant.quantization.spec import FLOAT, QuantSpec, resolve_spec
from effnet_quant.tasks import get_task
from effnet_quant.training.callback import Callback
from effnet_quant.training.signals import Interrupted, SignalWatch

WEIGHTS, ENGINE, TABLE = "autoquant.safetensors", "autoquant.onnx", "autoquant.json"


MIXED, QAT = "mixed precision", "QAT with distillation"
# Without w8a16: no CPU runtime has integer kernels for it, so a layer in float is as fast and loses less.
MIXED_CANDIDATES = ("w4a8", "w8a8", FLOAT)


class OutOfTime(Exception):
    """The time budget is spent."""


@dataclass(frozen=True)
class Tried:
    """A rung of the climb.

    Attributes:
        name: of the rung.
        verdict: on its network; None if it came to no network.
        loss: how much of the float network's score is lost, in points; None without a verdict.
        seconds: what it took, its judgement included.
        note: why it came to no network, or what it chose; else empty.
    """

    name: str
    verdict: Verdict | None
    loss: float | None
    seconds: float
    note: str = ""


@dataclass
class Climb:
    """What autoquant tried.

    Attributes:
        target_drop: the most that may be lost, in points.
        float: the float network's verdict.
        score: title and unit of the score.
        judged_on: which images, and whether the engine or the simulation was judged.
        tried: the rungs so far.
        best: name of the best rung; None before any.
        ended: why the climb ended.
        card: of the best network.
    """

    target_drop: float
    float: Verdict
    score: str
    judged_on: str
    tried: list[Tried] = field(default_factory=list)
    best: str | None = None
    ended: str = "still climbing"
    card: ModelCard | None = None

    @property
    def reached(self) -> bool:
        """Whether the best network meets the target."""
        return any(t.name == self.best and t.loss is not None and t.loss <= self.target_drop for t in self.tried)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(replace(self, card=None))
        return values | {"reached": self.reached, "card": None if self.card is None else self.card.to_json()}

    def cells(self) -> list[tuple[str, ...]]:
        """The table of rungs: a header, the float network, the rungs."""
        rows = [
            ("step", self.score, "lost", "agree %", "ms", "MB", "took s", "note"),
            ("float", *_cells(self.float), "", ""),
        ]
        for tried in self.tried:
            note = ", ".join(filter(None, ["best" if tried.name == self.best else "", tried.note]))
            rows.append((tried.name, *_cells(tried.verdict, tried.loss), f"{tried.seconds:.0f}", note))
        return rows

    def __str__(self) -> str:
        """The table as text."""
        rows = self.cells()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        lines = []
        for first, *numbers, note in rows:
            aligned = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([f"{first:<{widths[0]}}", *aligned, note]).rstrip())
        return "\n".join([*lines, f"judged on {self.judged_on}; {self.ended}"])


def _cells(verdict: Verdict | None, loss: float | None = None) -> tuple[str, ...]:
    if verdict is None:
        return ("", "", "", "", "")
    return (
        f"{verdict.score:.2f}",
        "" if loss is None else f"{loss:.2f}",
        f"{verdict.agreement:.2f}",
        "" if verdict.latency_ms is None else f"{verdict.latency_ms:.2f}",
        f"{verdict.size_bytes / 1e6:.2f}",
    )


def autoquant(
    run: Run,
    qat: QatConfig,
    folder: Path,
    *,
    target_drop: float,
    time_budget: float | None = None,
    held_back: int = 0,
    recipes: Mapping[str, tuple[Step, ...]] = RECIPES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Climb:
    """Climb from cheap to dear, and stop at the first network whose engine meets the target.

    The rungs are the recipes, mixed precision, and QAT with distillation from the float network. Each network is exported
    and its engine judged by the task's score. The best so far lies in the folder as soon as it is known: weights, engine
    file and table, each replaced whole. So an end by the time budget, a signal or a kill loses nothing that was found.

    Args:
        run: an opened quantized run. Its model holds the float weights.
        qat: the number of calibration images, and the settings of QAT, for the run's epochs. 0 epochs leave it out.
        folder: where the best network lies, as autoquant.safetensors and autoquant.onnx, and the table, autoquant.json.
        target_drop: the most of the float network's score that may be lost, in points.
        time_budget: seconds; None for no limit.
        held_back: judge on so many training images, which no step sees, instead of on the validation images.
        recipes: from the cheapest to the dearest; the steps of each, calibration first.
        progress: told a title and how many of all parts are done.

    Returns:
        What was tried. ``ended`` says why the climb ended.

    Raises:
        UserError: a setting can't be used, or no rung came to a network.
        Interrupted: a signal ended the climb. The best so far is on disk.
    """
    if run.world.size > 1:
        raise UserError("--auto runs in one process; start it without multiproc.py.")
    if not target_drop >= 0:
        raise UserError(f"--target-drop is at least 0 points, not {target_drop:g}.")
    if time_budget is not None and not time_budget > 0:
        raise UserError("--time-budget must be above 0.")
    for name in (WEIGHTS, ENGINE, TABLE):
        check_writable(folder / name)
    with SignalWatch() as watch:
        deadline = _Deadline(watch, time_budget)
        climber = _Climber(run, qat, folder, deadline, held_back, target_drop, recipes, progress)
        rungs: list[tuple[str, Callable[[], _Made]]] = [(name, partial(climber.recipe, name)) for name in recipes]
        rungs.append((MIXED, climber.mixed))
        if run.config.epochs > 0:
            rungs.append((QAT, climber.trained))
        return climber.climb(rungs)


class _Deadline:
    """Says when to stop: at the end of the time, or after a signal."""

    def __init__(self, watch: SignalWatch, seconds: float | None) -> None:
        self._watch = watch
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._end

    def check(self) -> None:
        """Raises Interrupted after a signal, OutOfTime after the end."""
        if self._watch.noted:
            raise Interrupted(self._watch.noted)
        if self.over:
            raise OutOfTime


@dataclass(frozen=True)
class _Made:
    """A quantized network on the CPU, its spec, and a note about it."""

    model: nn.Module
    spec: QuantSpec
    note: str = ""


class _Climber:
    """Tries the rungs in turn."""

    def __init__(
        self,
        run: Run,
        qat: QatConfig,
        folder: Path,
        deadline: _Deadline,
        held_back: int,
        target_drop: float,
        recipes: Mapping[str, tuple[Step, ...]],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        assert run.card.quant_spec is not None and run.card.input is not None and run.card.target is not None
        self._run = run
        self._qat = qat
        self._folder = folder
        self._deadline = deadline
        self._recipes = recipes
        self._show = progress
        self._spec = resolve_spec(run.card.quant_spec)
        tensors = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
        self._float = Weights(tensors, run.card).without_ranges()
        where = "the validation images"
        loader = run.val
        if held_back:
            loader, where = hold_back(run, held_back, qat.calibration_images), f"{held_back} held-back training images"
        self._batches: list[Tensor] = []
        self._targets: list[Any] = []
        for pixels, targets in calibration_loader(run, qat.calibration_images).epoch():
            self._batches.append(normalize(pixels.cpu(), run.card.input))
            self._targets.append(targets)
        self._judge = EngineJudge(run.card, run.card.target, loader, self._built(None))
        score, how = self._judge.score, f"{run.card.target}'s engine"
        if not self._judge.runs_engine:
            how = "the simulation, because TensorRT is not installed"
        self.state = Climb(target_drop, self._judge.float, f"{score.title} {score.unit}", f"{where}, {how}")
        self._best: tuple[float, float] | None = None
        self._steps: tuple[Step, ...] = RECIPES["minmax"]  # of the best recipe
        self._start: nn.Module | None = None  # the best network on the run's own grids, from which QAT starts

    def climb(self, rungs: Sequence[tuple[str, Callable[[], _Made]]]) -> Climb:
        """Try rungs until one meets the target, the time is over or a signal arrives."""
        for name, make in rungs:
            start = time.monotonic()
            try:
                self._deadline.check()
                if self._show is not None:
                    self._show(name, 0, 1)
                self._try(name, make, start)
            except OutOfTime:
                self._note(Tried(name, None, None, time.monotonic() - start, "the time was over"))
                self.state.ended = "the time budget is spent"
                break
            except (Interrupted, KeyboardInterrupt):
                self.state.ended = "a signal ended it"
                self._write()
                raise
            except UserError as error:
                self._note(Tried(name, None, None, time.monotonic() - start, str(error)))
            if self.state.reached:
                self.state.ended = "the target is met"
                break
        else:
            self.state.ended = "no step met the target"
        self._write()
        if self.state.best is None:
            raise UserError(f"no step gave a network: {self.state.tried[-1].note}")
        return self.state

    def _try(self, name: str, make: Callable[[], _Made], start: float) -> None:
        made = make()
        card = replace(self._run.card, quant_spec=made.spec.to_json())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, ENGINE)
            verdict = self._judge.judge(made.model.eval(), card, path)
            rank = self._judge.score.ranked(verdict.score), verdict.agreement
            tried = Tried(name, verdict, self._judge.loss(verdict), time.monotonic() - start, made.note)
            better = self._best is None or rank > self._best
            if better:
                self._best = rank
                write_weights(self._folder / WEIGHTS, made.model.state_dict(), card)
                replace_file(self._folder / ENGINE, path.read_bytes())
                self.state.best, self.state.card = name, card
        if made.spec == self._spec and (self._start is None or better):
            self._start = made.model
            self._steps = self._recipes.get(name, self._steps)
        self._note(tried)

    def _note(self, tried: Tried) -> None:
        self.state.tried.append(tried)
        self._write()

    def _write(self) -> None:
        replace_file(self._folder / TABLE, (json.dumps(self.state.to_json(), indent=2) + "\n").encode())

    def recipe(self, name: str) -> _Made:
        """The network of a recipe, on the run's own grids."""
        return _Made(self._quantized(self._spec, self._recipes[name]), self._spec)

    def mixed(self) -> _Made:
        """Layers that lose much get more bits; then the steps of the best recipe."""
        target = self._run.card.target
        assert target is not None
        base = next((name for name in MIXED_CANDIDATES if resolve_spec(name) == self._spec), None)
        if base is None:
            raise UserError(f"mixed precision starts from w4a8 or w8a8, not from {self._spec.weight}.")
        chosen = mixed_precision(
            self._built(None).to(self._run.device),
            self._batches,
            self._targets,
            target_drop=self.state.target_drop,
            candidates=MIXED_CANDIDATES[MIXED_CANDIDATES.index(base) :],
            target=target,
            task=get_task(self._run.card.task),
            context=StepContext(progress=self._progress),
        )
        counts = Counter(chosen.assignment.values())
        note = ", ".join(f"{count} layers {name}" for name, count in sorted(counts.items()))
        return _Made(self._quantized(chosen.spec, self._steps), chosen.spec, note)

    def trained(self) -> _Made:
        """QAT from the best network on the run's own grids, with the float network as teacher."""
        run = self._run
        assert run.train is not None
        if self._start is None:
            raise UserError("no recipe gave a network from which training could start.")
        load_weights(run.model, Weights(self._start.state_dict(), run.card))
        run.trainer.loss = distilled(run, self._qat, self._float)
        prepare_quantized(run, replace(self._qat, distill=None))
        run.trainer.callbacks.append(_StopInTime(run, self._deadline))
        note = ""
        try:
            fit(run)
        except Interrupted:
            if not self._deadline.over:
                raise
            note = "stopped by the time budget"
        model = copy.deepcopy(run.model).cpu().eval()
        track_outputs(model, self._batches)
        return _Made(model, self._spec, note)

    def _quantized(self, spec: QuantSpec, steps: Sequence[Step]) -> nn.Module:
        model = self._built(spec).to(self._run.device)
        seed = self._run.config.seed or 0
        for step in steps:
            step(model, self._batches, StepContext(seed=seed, progress=self._progress))
        return model.cpu()

    def _built(self, spec: QuantSpec | None) -> nn.Module:
        """The float network, with quantizers without ranges if a spec is given."""
        card = replace(self._run.card, quant_spec=None if spec is None else spec.to_json())
        return build(card, self._float, **self._run.options).eval()

    def _progress(self, title: str, done: int, total: int) -> None:
        self._deadline.check()
        if self._show is not None:
            self._show(title, done, total)


class _StopInTime(Callback):
    """Ends a training, with a checkpoint, when the time is over."""

    def __init__(self, run: Run, deadline: _Deadline) -> None:
        self._run = run
        self._deadline = deadline

    def on_step_end(self, step: int) -> None:
        if self._deadline.over:
            self._run.trainer.note_signal(signal.SIGTERM)

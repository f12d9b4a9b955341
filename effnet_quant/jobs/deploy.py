"""deploy: from a network to the fastest engine on this machine that agrees with its simulation."""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.api import has_ranges
from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.checks.engines_machine import describe_engines_machine, machine_line
from effnet_quant.checks.footprint import measure_footprint
from effnet_quant.checks.latency import Latency, interleaved_seconds, measure_engines, median_seconds
from effnet_quant.checks.tuning import PAYS, SCREENING_ROUNDS, operations_of
from effnet_quant.checks.verify import compare
from effnet_quant.data.backends import open_loader
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.transforms import evaluation_transform, normalize
from effnet_quant.engines.deployment import NAME, Deployment, read_deployment, write_deployment
from effnet_quant.engines.engine import load_engine, usable_precisions
from effnet_quant.engines.runtimes import RUNTIMES, how_to_install, installed
from effnet_quant.errors import UserError
from effnet_quant.export.file_formats import export_for
from effnet_quant.files import check_writable, create_folder, replace_file
from effnet_quant.jobs.engine_choice import Candidate, Deployed, choose
from effnet_quant.jobs.inference import open_images, own_agreement, run_engine, training_batches
from effnet_quant.quantization.eager_evaluation import Batch, model_arguments
from effnet_quant.quantization.placement.insertion import quantizers, simulate_target
from effnet_quant.quantization.ptq.range_refinement import RangeRefinement
from effnet_quant.quantization.recipe import FEWEST_EXAMPLES, Standard, ptq
from effnet_quant.quantization.targets import OPERATIONS, Target, get_target
from effnet_quant.report.deployment_page import deployment_page
from effnet_quant.saved_model import card_of
from effnet_quant.tasks import get_task
from effnet_quant.training.workspace import locked

PAGE = "deploy.html"
IMAGES, CALIBRATION_IMAGES, CALIBRATION_BATCH = 512, 64, 16
TIME_BUDGET = 300.0  # seconds
BATCH, THROUGHPUT_BATCH = 32, 32
FEWEST_IMAGES = 64
# shares of the time budget
_QUANTIZING, _VERIFYING, _SCREENING_ENDS, _ENDS = 0.25, 0.15, 0.7, 0.95
# The cost of the recipe "standard" in forward passes of the float network, measured on efficientnet-b0 at 224 px: for each
# calibration image without the refinement of ranges, and for each image of that.
_PASSES_AN_IMAGE, _PASSES_A_REFINED_IMAGE = 30, 95
_SHORTEST, _LONGEST = 0.3, 5.0  # seconds of measuring per engine and batch size


def _silent(line: str) -> None:
    """Shows nothing."""


def deploy(
    model: nn.Module,
    data: str,
    output: str | Path,
    *,
    card: ModelCard | None = None,
    batches: Iterable[Batch] | None = None,
    runtimes: Sequence[str] | None = None,
    images: int = IMAGES,
    threads: int | None = None,
    time_budget: float = TIME_BUDGET,
    say: Callable[[str], None] = _silent,
    progress: Callable[[str, int, int], None] | None = None,
) -> Deployed:
    """Find the fastest engine for a network on this machine that agrees with its simulation.

    For each runtime, float engines and 8-bit engines are exported, compiled, compared with their simulations on validation
    images, and timed in turns. The 8-bit placements are the target's own one, and the one without the operations that are
    faster in float. The folder gets the fastest engine that agrees, deploy.json for ``load_engine``, and the table as
    deploy.html. An 8-bit engine is kept only if it is at least 1.02 times as fast as the fastest float engine.

    Whatever ends the work early, the folder gets what was measured until then.

    Args:
        model: float, or quantized and calibrated; left untouched. A float network is quantized with the recipe "standard".
        data: labelled images, as the DATA argument of the scripts.
        output: the folder; created if it is missing.
        card: describes the model; None for what ``create_model`` and ``quantize`` know.
        batches: calibration examples for a float network; None takes up to 64 training images of ``data``.
        runtimes: names of engines.runtimes.RUNTIMES; None for all that are installed.
        images: validation images to compare on, at most. Slow networks are compared on fewer, at least 64.
        threads: CPU threads of one call; None leaves the number to each runtime.
        time_budget: seconds for all of it. Placements are left out, and fewer images and rounds measured, to keep it.
        say: takes progress messages, one line each.
        progress: told how far the quantization of a float network is, as ``ptq`` does.

    Returns:
        The table, and what was kept.

    Raises:
        UserError: a runtime is missing, the data are not the model's, or a setting or the folder can't be used.
    """
    if images < 1 or not time_budget > 0 or (threads is not None and threads < 1):
        raise UserError("images, threads and the time budget must be above 0.")
    chosen = usable_runtimes(runtimes)
    card = card or card_of(model)
    if card.input is None:
        raise UserError("deploy needs to know which images the model takes; give a card with an InputSpec.")
    if not has_ranges(model):
        raise UserError("the model is quantized, but not calibrated; calibrate it, or give the float model.")
    source = open_images(data, card)
    folder = create_folder(Path(output), "--output")
    for name in (NAME, PAGE):
        check_writable(folder / name)
    with locked(folder, setting="--output"), tempfile.TemporaryDirectory() as scratch:
        work = _Work(card, card.input, data, folder, Path(scratch), threads, time_budget, say)
        try:
            work.run(copy.deepcopy(model).cpu().eval(), source, chosen, images, batches, progress)
        except UserError:
            raise
        except BaseException:  # a signal: what was measured is kept
            if any(candidate.usable for candidate in work.candidates):
                say(str(work.keep("stopped before the end")))
            raise
        return work.keep()


def usable_runtimes(asked: Sequence[str] | None) -> list[str]:
    """The runtimes to deploy for: those asked for, or all that can run here.

    Raises:
        UserError: one that was asked for does not exist or is not installed.
    """
    for name in asked or ():
        if name not in RUNTIMES:
            raise UserError(f"there is no runtime '{name}'; choose one of: {', '.join(RUNTIMES)}.")
        if not installed(name):
            raise UserError(f"the runtime {name} is not installed; {how_to_install(name)}.")
    return list(asked) if asked else [name for name in RUNTIMES if installed(name) and _has_device(name)]


def _has_device(runtime: str) -> bool:
    return runtime != "tensorrt" or torch.cuda.is_available()


@dataclass
class _Work:
    """The candidates, and the steps that measure them."""

    card: ModelCard
    spec: InputSpec
    data: str
    folder: Path
    scratch: Path
    threads: int | None
    time_budget: float
    say: Callable[[str], None]
    candidates: list[Candidate] = field(default_factory=list)
    images: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    float_outputs: list[Any] | None = None
    start: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Share of the time budget."""
        return (time.monotonic() - self.start) / self.time_budget

    def run(
        self,
        model: nn.Module,
        source: ImageSource,
        runtimes: Sequence[str],
        images: int,
        batches: Iterable[Batch] | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        """Measure everything that the time allows."""
        is_float = not any(True for _ in quantizers(model))
        quantized = model
        if is_float:
            quantized = self._quantized(model, runtimes[0], batches, progress)
        self.quantized, self.floating = quantized, model
        self._open(source, images, 1 + len(runtimes))
        for runtime in runtimes:
            rules = get_target(runtime)
            left_out = rules if is_float else rules.leaving_in_float(OPERATIONS)
            self._measure(runtime, "float", None, left_out, self.floating, replace(self.card, quant_spec=None))
        for runtime in runtimes:
            rules = get_target(runtime)
            self._measure(runtime, "INT8", rules, rules, self.quantized, self.quantized_card())
        for runtime in self._by_speed(runtimes):
            self._tune(runtime)
        self._time_in_turns()

    def _quantized(
        self,
        model: nn.Module,
        runtime: str,
        batches: Iterable[Batch] | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> nn.Module:
        """The float network after the recipe "standard", with as many images as the time planned for that allows."""
        given = None if batches is None else list(batches)
        if given is None:
            given, _ = training_batches(self.data, self.card, self.spec, CALIBRATION_IMAGES, CALIBRATION_BATCH)  # type: ignore[assignment]
        assert given is not None
        arguments, count = model_arguments(given[0], torch.device("cpu"))
        with torch.no_grad():
            model(*arguments)  # the first run is slow
            start = time.monotonic()
            model(*arguments)
        an_image = max(time.monotonic() - start, 1e-9) / count
        passes = _QUANTIZING * self.time_budget / an_image
        if batches is None:
            given = given[: max(int(passes / 2 / _PASSES_AN_IMAGE / CALIBRATION_BATCH), 1)]
        examples = count * len(given)
        refined = int((passes - _PASSES_AN_IMAGE * examples) / _PASSES_A_REFINED_IMAGE)
        refinement = RangeRefinement(examples=min(max(refined, FEWEST_EXAMPLES), RangeRefinement().examples))
        self.say(f"quantizing by the recipe standard, {self._clock()}")
        recipe = [Standard(refinement=refinement)]
        return ptq(copy.deepcopy(model), given, target=runtime, recipe=recipe, progress=progress).eval()

    def quantized_card(self) -> ModelCard:
        """The card of the quantized network."""
        if self.card.quant_spec is not None:
            return self.card
        known = card_of(self.quantized)
        return replace(self.card, quant_spec=known.quant_spec, target=known.target)

    def _clock(self) -> str:
        return f"{time.monotonic() - self.start:.0f} of {self.time_budget:.0f} s"

    def _open(self, source: ImageSource, images: int, simulations: int) -> None:
        """Read the images to compare on: as many as can be simulated in the time planned for that."""

        def loaded(count: int) -> list[tuple[Tensor, Tensor]]:
            positions = torch.arange(count) * len(source) // count
            transform = evaluation_transform(self.spec)
            loader = open_loader("pytorch", source, transform, BATCH, torch.device("cpu"), indices=positions)
            return [(pixels.clone(), targets) for pixels, targets in loader.epoch()]

        few = loaded(min(BATCH, len(source)))
        start = time.monotonic()
        self._simulated(self.quantized, few)
        an_image = (time.monotonic() - start) / sum(len(pixels) for pixels, _ in few)
        affordable = int(_VERIFYING * self.time_budget / (simulations * max(an_image, 1e-9)))
        count = min(images, len(source), max(affordable, FEWEST_IMAGES))
        self.images = few if count <= BATCH else loaded(count)
        self.say(f"comparing on {count} of {len(source)} validation images, {self._clock()}")

    @torch.no_grad()
    def _simulated(self, model: nn.Module, images: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        return [model(normalize(pixels, self.spec)) for pixels, _ in images]

    def _measure(
        self, runtime: str, kind: str, rules: Target | None, exported: Target, model: nn.Module, card: ModelCard
    ) -> None:
        """Export a placement, and measure its engine in every precision of the runtime."""
        arch = (self.card.arch or "model").replace(":", "-").replace("/", "-")
        path = self.scratch / f"{arch}-{kind.lower().replace(' ', '-')}-{runtime}{exported.suffix}"
        expected = self.float_outputs if rules is None else None
        for precision in usable_precisions(runtime):
            usual = precision == usable_precisions(runtime)[0]
            name = f"{kind}, {runtime}" + ("" if usual else f", {precision}")
            candidate = Candidate(name, runtime, precision, rules, path)
            self.candidates.append(candidate)
            try:
                if not path.is_file():
                    left_out = export_for(model, path, self.spec.image_size, exported, card)
                    for operation, count in left_out.items():
                        self.say(f"{name}: {count} x {operation} is outside of its fast kernels")
                if expected is None:
                    expected = self._simulated(simulate_target(model, exported), self.images)
                    if rules is None:  # the same for every runtime
                        self.float_outputs = expected
                self._examine(candidate, expected, model)
            except UserError as error:  # the others may do
                candidate.note = f"can't be run: {error}"
            self.say(f"{name}: {candidate.note or 'measured'}, {self._clock()}")

    def _examine(self, candidate: Candidate, expected: Sequence[Any], simulation: nn.Module) -> None:
        """Load an engine, compare it with its simulation's outputs ``expected``, and time it for the first time."""
        engine = load_engine(candidate.path, candidate.runtime, precision=candidate.precision, threads=self.threads)
        engine.warm_up()
        outputs = iter(expected)
        task = get_task(self.card.task)
        candidate.comparison = compare(
            lambda pixels: run_engine(engine, torch.from_numpy(pixels), self.spec).numpy(),
            lambda pixels: next(outputs),
            self.images,
            task,
        )
        if not candidate.comparison.agrees():
            own = own_agreement(simulation, self.images, self.spec, task)
            candidate.comparison = replace(candidate.comparison, own_agreement=own)
        run = partial(engine, *engine.example_inputs(1))
        candidate.single = Latency.of(1, interleaved_seconds([run], SCREENING_ROUNDS)[0])
        candidate.engine = engine
        if not candidate.usable:
            candidate.note = "departs from its simulation"
            candidate.engine = None
        candidate.footprint = measure_footprint(candidate.path, candidate.runtime, candidate.precision, self.threads)

    def _by_speed(self, runtimes: Sequence[str]) -> list[str]:
        """The runtimes that have a usable 8-bit engine, the fastest first: the time may end before the last is tuned."""
        fastest = {
            runtime: min(candidate.seconds for candidate in found)
            for runtime in runtimes
            if (found := [one for one in self.candidates if one.usable and one.quantized and one.runtime == runtime])
        }
        return sorted(fastest, key=fastest.__getitem__)

    def _tune(self, runtime: str) -> None:
        """Leave one kind of operation after another in float, and measure those together that run faster so."""
        own = min(
            (one for one in self.candidates if one.usable and one.quantized and one.runtime == runtime),
            key=lambda one: one.seconds,
        )
        assert own.rules is not None and own.engine is not None
        image = own.engine.example_inputs(1)
        paying = []
        # without integer convolutions hardly any integers are left, which is the float network
        for operation in [
            name for name in OPERATIONS if name in operations_of(self.quantized) & own.rules.quantized - {"conv"}
        ]:
            if self.spent > _SCREENING_ENDS:
                self.say(f"{runtime}: no time for more placements, {self._clock()}")
                break
            path = self.scratch / f"placement{own.rules.suffix}"
            try:
                export_for(self.quantized, path, self.spec.image_size, own.rules.leaving_in_float([operation]))
                other = load_engine(path, runtime, precision=own.precision, threads=self.threads)
                other.warm_up()
            except UserError as error:
                self.say(f"{runtime}, {operation} in float: {error}")
                continue
            seconds = median_seconds([partial(own.engine, *image), partial(other, *image)], SCREENING_ROUNDS)
            if seconds[1] < PAYS * seconds[0]:
                paying.append(operation)
            self.say(f"{runtime}, {operation} in float: {seconds[0] / seconds[1]:.2f} times the speed, {self._clock()}")
        if paying:
            rules = own.rules.leaving_in_float(paying)
            kind = f"INT8 without {'+'.join(paying)}"
            self._measure(runtime, kind, rules, rules, self.quantized, self.quantized_card())

    def _time_in_turns(self) -> None:
        """Time all engines that may be kept in turns, for as long as the budget allows."""
        ready = [candidate for candidate in self.candidates if candidate.usable and candidate.engine is not None]
        engines = [candidate.engine for candidate in ready if candidate.engine is not None]
        if not ready:
            return
        left = max(_ENDS - self.spent, 0) * self.time_budget
        seconds = min(max(left / (2 * len(ready)), _SHORTEST), _LONGEST)
        self.say(f"timing {len(ready)} engines in turns, about {2 * len(ready) * seconds:.0f} s, {self._clock()}")
        for latencies in measure_engines(engines, (1, THROUGHPUT_BATCH), seconds, self.spec.image_size):
            for candidate, latency in zip(ready, latencies, strict=True):
                if latency.batch_size == 1:
                    candidate.single = latency
                else:
                    candidate.many = latency

    def keep(self, ended: str = "") -> Deployed:
        """Choose an engine, and write the folder's files."""
        kept, speedup, sentence = choose(self.candidates)
        if ended:
            sentence = f"{ended}: {sentence}"
        ordered = sorted(self.candidates, key=lambda one: one.seconds if one.usable else math.inf)
        rows = tuple(replace(one.row(), note="kept" if one is kept else one.note) for one in ordered)
        score = get_task(self.card.task).score
        title = f"{score.title} {score.unit}"
        path = None if kept is None else self._write(kept)
        compared = sum(len(pixels) for pixels, _ in self.images)
        facts = [
            ("result", sentence),
            ("compared on", f"{compared} validation images of {self.data}"),
            ("times", f"batch 1; images/s with batch {THROUGHPUT_BATCH}; load and peak memory in a process of its own"),
            ("machine", machine_line(describe_engines_machine(self.threads))),
        ]
        page = deployment_page(f"{self.card.arch or 'model'}: engines on this machine", rows, title, facts)
        replace_file(self.folder / PAGE, page.encode())
        return Deployed(
            rows, title, None if kept is None else kept.name, bool(kept and kept.quantized), speedup, path, sentence
        )

    def _write(self, kept: Candidate) -> Path:
        """Write the engine's file, then deploy.json, and delete the file that an earlier deploy.json named."""
        try:
            before: Path | None = read_deployment(self.folder / NAME)[1]
        except UserError:
            before = None
        content = kept.path.read_bytes()
        # a name of its own: until deploy.json is replaced, the one that is there stays true
        digest = hashlib.sha256(content).hexdigest()[:8]
        target = self.folder / f"{kept.path.stem}-{digest}{kept.path.suffix}"
        replace_file(target, content)
        path = write_deployment(
            Deployment(target.name, len(content), kept.runtime, kept.precision, self.threads), self.folder
        )
        if before is not None and before != target:
            before.unlink(missing_ok=True)
        return path

"""EngineJudge: exports a network, runs the engine on labelled images, and says how good, large and fast it is."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_quant.card import InputSpec, ModelCard
from effnet_quant.checks.latency import median_seconds
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import normalize
from effnet_quant.engines.engine import load_engine
from effnet_quant.export.onnx import export_onnx
from effnet_quant.jobs.inference import run_engine
from effnet_quant.structure import in_float32, map_leaves
from effnet_quant.tasks import get_task


@dataclass(frozen=True)
class Verdict:
    """A network on the judge's images.

    Attributes:
        score: the task's score, in the score's unit.
        agreement: with the float network, in percent of the images, as the task defines it.
        simulation: the score of the simulation; None if nothing was simulated.
        latency_ms: median milliseconds of the engine for one image; None without an engine.
        size_bytes: of the engine's file.
    """

    score: float
    agreement: float
    simulation: float | None
    latency_ms: float | None
    size_bytes: int


class EngineJudge:
    """Judges networks on the same images.

    Args:
        card: the float network's card.
        target: the runtime.
        loader: labelled images; their uint8 batches are read again for every network.
        model: the float network, in eval mode.

    Attributes:
        runs_engine: whether the runtime is installed here. If not, the simulation is judged.
        float: the verdict on the float network, whose engine is judged too.
    """

    def __init__(self, card: ModelCard, target: str, loader: Loader, model: nn.Module) -> None:
        assert card.input is not None
        self._spec: InputSpec = card.input
        self._target = target
        self._loader = loader
        self._task = get_task(card.task)
        self.score = self._task.score
        self.runs_engine = target != "tensorrt" or importlib.util.find_spec("tensorrt") is not None
        self._predictions: list[Any] = []
        with torch.no_grad():
            for pixels, _ in loader.epoch():
                self._predictions.append(self._task.predictions(in_float32(model(normalize(pixels.cpu(), self._spec)))))
        self.float = self.judge(model, replace(card, quant_spec=None), None)

    def judge(self, model: nn.Module, card: ModelCard, keep: Path | None, *, simulate: bool = False) -> Verdict:
        """Judge a network.

        Args:
            model: in eval mode, on the CPU; it simulates the target.
            card: of the network.
            keep: where the ONNX file goes; None to discard it.
            simulate: also measure the simulation, which takes longer than the engine.

        Raises:
            UserError: the network can't be exported, or the runtime refuses the file.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = keep or Path(folder, "judged.onnx")
            export_onnx(model, path, self._spec.image_size, target=self._target, card=card)
            size = path.stat().st_size
            if not self.runs_engine:
                score, agreement = self._figures(lambda pixels: self._simulated(model, pixels))
                return Verdict(score, agreement, score, None, size)
            engine = load_engine(path, self._target)
            score, agreement = self._figures(
                lambda pixels: map_leaves(torch.as_tensor, run_engine(engine, pixels, self._spec))
            )
            simulation = self._figures(lambda pixels: self._simulated(model, pixels))[0] if simulate else None
            engine.warm_up()
            image = engine.example_inputs(1)
            (seconds,) = median_seconds([lambda: engine(*image)])
            return Verdict(score, agreement, simulation, 1e3 * seconds, size)

    @torch.no_grad()
    def _simulated(self, model: nn.Module, pixels: Tensor) -> Any:
        return in_float32(model(normalize(pixels, self._spec)))

    def _figures(self, outputs_of: Callable[[Tensor], Any]) -> tuple[float, float]:
        """The score and the agreement of outputs."""
        metric = self._task.metric(torch.device("cpu"))
        agreed, images = 0.0, 0
        for (pixels, targets), expected in zip(self._loader.epoch(), self._predictions, strict=True):
            outputs = outputs_of(pixels.cpu())
            metric.add(outputs, targets)
            agreed += self._task.agreement(self._task.predictions(outputs), expected).sum().item()
            images += len(pixels)
        return metric.results()[self.score.key], 100 * agreed / max(images, 1)

    def loss(self, verdict: Verdict) -> float:
        """How much of the float network's score is lost, in points."""
        return self.score.ranked(self.float.score) - self.score.ranked(verdict.score)

"""Engine beside simulation: figures from float64, and outputs of any structure."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from effnet_quant.card import InputSpec
from effnet_quant.checks.verify import Comparison, compare
from effnet_quant.cli.verify import verdict
from effnet_quant.errors import UserError
from effnet_quant.jobs.inference import own_agreement
from effnet_quant.tasks.classification import CLASSIFICATION
from effnet_quant.tasks.task import Metric, Score, Task


def test_a_comparison_of_classifiers_is_that_of_all_images_at_once() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(23, 1, 2, 5)).astype(np.float32)
    weights = generator.normal(size=(10, 4)).astype(np.float32)
    labels = generator.integers(0, 4, 23)
    noise = generator.normal(size=weights.shape).astype(np.float32) * 0.3

    def engine(batch: np.ndarray) -> np.ndarray:
        return batch.reshape(len(batch), -1) @ (weights + noise)

    cut = [slice(0, 10), slice(10, 20), slice(20, 23)]  # the last batch is smaller
    comparison = compare(
        engine,
        lambda batch: batch.flatten(1) @ torch.from_numpy(weights),
        [(torch.from_numpy(images[part]), torch.from_numpy(labels[part])) for part in cut],
    )
    flat = images.reshape(23, -1).astype(np.float64)
    expected, got = flat @ weights, flat @ (weights + noise).astype(np.float64)
    difference = np.abs(got - expected)
    assert comparison.images == 23
    assert comparison.engine_score == pytest.approx(100 * (got.argmax(1) == labels).mean())
    assert comparison.simulation_score == pytest.approx(100 * (expected.argmax(1) == labels).mean())
    assert comparison.agreement == pytest.approx(100 * (got.argmax(1) == expected.argmax(1)).mean())
    assert 0 < comparison.agreement < 100
    assert comparison.relative_error == pytest.approx(
        np.linalg.norm(got - expected) / np.linalg.norm(expected), rel=1e-5
    )
    assert comparison.mean_error == pytest.approx(difference.mean(), rel=1e-5)
    assert comparison.worst_error == pytest.approx(difference.max(), rel=1e-5)
    assert comparison.worst_image == difference.max(1).argmax()


class _Nearness(Metric):
    """How far the points of an example are from the true ones, on average over the examples."""

    def __init__(self) -> None:
        self._distances: list[float] = []

    def add(self, outputs, targets) -> None:
        for point, target in zip(outputs["points"], targets, strict=True):
            self._distances.append((point - target["point"]).norm().item())

    def merge(self, processes) -> None:
        pass

    def results(self) -> dict[str, float]:
        return {"distance": float(np.mean(self._distances))}


@dataclass(frozen=True)
class _Points(Task):
    """Outputs: {"points": (N, 2), "parts": ((N,), labels int64 (N,))}; targets: a list of dicts."""

    name = "points"
    score = Score("distance", "distance", "px", higher_is_better=False)
    output_names = ("points", "mean", "quadrant")
    agreement_title = "same place"
    error_title = "point error"

    def loss(self, outputs, targets, inputs):
        return (outputs["points"] - torch.stack([target["point"] for target in targets])).square().mean()

    def distillation_loss(self, outputs, teacher_outputs, temperature):
        return (outputs["points"] - teacher_outputs["points"]).square().mean()

    def metric(self, device):
        return _Nearness()

    def predictions(self, outputs):
        return [point.tolist() for point in outputs["points"]]

    def agreement(self, one, other):
        near = [np.hypot(x - u, y - v) < 0.5 for (x, y), (u, v) in zip(one, other, strict=True)]
        return torch.tensor(near, dtype=torch.float64)

    def answers(self, outputs, classes, count):
        return [{"point": point} for point in self.predictions(outputs)]

    def answer_text(self, answer):
        return str(answer["point"])


def test_inputs_outputs_and_targets_may_be_several() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    shift = torch.tensor([0.0, 2.0, 0.25])

    def outputs(points, shift):
        x = points[:, 0] + shift
        moved = torch.stack([x, points[:, 1]], dim=1)
        return {"points": moved, "parts": (moved.mean(1), (x > 0).long())}

    def engine(points, shift):
        simulated = outputs(torch.from_numpy(points), torch.from_numpy(2 * shift))
        mean, quadrant = simulated["parts"]
        # an engine may give a dict in another order
        return {"parts": (mean.numpy(), quadrant.numpy()), "points": simulated["points"].numpy()}

    targets = [{"point": point} for point in points]
    batches = [((points[:2], shift[:2]), targets[:2]), ((points[2:], shift[2:]), targets[2:])]
    comparison = compare(engine, outputs, batches, _Points())
    assert comparison.images == 3
    assert (comparison.engine_score, comparison.simulation_score) == pytest.approx((4.5 / 3, 2.25 / 3))
    assert comparison.agreement == pytest.approx(200 / 3)
    # x differs by the shift, y not, and their mean by half of it; labels are no numbers to compare
    assert comparison.mean_error == pytest.approx(2.25 * 1.5 / 9)
    assert (comparison.worst_error, comparison.worst_image) == (2.0, 1)
    # points move to (0, 0), (5, 4), (1.25, 1), with the means 0, 4.5 and 1.125
    size = np.sqrt(25 + 16 + 1.25**2 + 1 + 4.5**2 + 1.125**2)
    assert comparison.relative_error == pytest.approx(np.sqrt((4 + 0.0625) * 1.25) / size)


def test_what_can_not_be_compared_is_one_sentence() -> None:
    batch = (torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"shape \(2, 3\) and the model's \(2, 2\); give the weights that"):
        compare(lambda x: x, lambda x: x[:, :2], [batch])
    with pytest.raises(UserError, match=r"shape \(2, 3\) and the model's 0 \(2, 3\), 1 \(2, 3\); give the weights"):
        compare(lambda x: x, lambda x: (x, x), [batch])
    with pytest.raises(UserError, match="there are no images to compare"):
        compare(lambda x: x, lambda x: x, [])
    with pytest.raises(UserError, match="the network tells 3 classes apart, and the data has a label 7"):
        compare(lambda x: x, lambda x: x, [(torch.zeros(2, 3), torch.tensor([0, 7]))])


def compared(agreeing: int, images: int) -> Comparison:
    """A comparison of two classifiers that agree on the first images and on no other."""
    logits = torch.eye(2).repeat(images, 1)[:images]
    engine = logits.clone()
    engine[agreeing:] = engine[agreeing:].flip(1)
    batch = (torch.arange(images)[:, None], torch.zeros(images, dtype=torch.int64))
    return compare(lambda rows: engine.numpy()[rows[:, 0]], lambda rows: logits[rows[:, 0]], [batch])


@pytest.mark.parametrize(("agreeing", "images"), [(400, 400), (1, 3), (0, 7), (995, 1000), (81, 263)])
def test_the_interval_is_that_of_the_score_test(agreeing: int, images: int) -> None:
    """Its ends are the shares p at which (agreement - p)^2 n = z^2 p (1 - p)."""
    low, high = (end / 100 for end in compared(agreeing, images).interval)
    share, z = agreeing / images, 1.959964
    for end in (low, high):
        assert (share - end) ** 2 * images == pytest.approx(z * z * end * (1 - end), abs=1e-9)
    assert low <= share <= high
    # Newcombe (1998), table I, method 3: 81 of 263 is 0.2553 to 0.3662
    if images == 263:
        assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_so_many_images_decide_and_no_fewer() -> None:
    assert compared(400, 400).images_to_decide(99.5) == 765
    assert compared(764, 764).interval[0] < 99.5 <= compared(765, 765).interval[0]
    below = compared(98, 100)
    count = below.images_to_decide(99.5)
    assert count is not None
    assert Comparison(count, {}, {}, below.score, 98.0, 0, 0, 0, 0).interval[1] < 99.5
    assert Comparison(count - 1, {}, {}, below.score, 98.0, 0, 0, 0, 0).interval[1] >= 99.5
    assert compared(199, 200).images_to_decide(99.5) is None
    assert compared(200, 200).images_to_decide(100) is None


class Amplifier(nn.Module):
    """Answers with the 8th and 9th decimal of a mean, which float32 does not hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        decimals = (images.flatten(1).mean(1, keepdim=True) * 1e8).remainder(1.0)
        return torch.cat([decimals, 0.5 * torch.ones_like(decimals)], dim=1)


def test_an_engine_need_not_agree_more_often_than_the_simulation_with_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in pixels.split(64)]
    steady = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    assert own_agreement(steady, batches, InputSpec(8, 8), CLASSIFICATION) == 100
    assert steady[1].weight.dtype == torch.float32
    own = own_agreement(Amplifier(), batches, InputSpec(8, 8), CLASSIFICATION)
    assert 20 < own < 80

    known = compared(196, 200)  # 98 %, whose interval ends at 99.2 %
    assert not known.agrees()
    assert verdict(known) == "the engine departs from the simulation"
    itself = replace(known, own_agreement=98.5)
    assert (itself.gate(), known.gate(), itself.gate(90.0)) == (98.5, 99.5, 90.0)
    assert itself.agrees()
    assert "its simulation in float64 has the same answer on 98.50 %" in verdict(itself)
    assert not replace(known, own_agreement=99.4).agrees()

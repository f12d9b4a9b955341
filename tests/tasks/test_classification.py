"""Losses, accuracies and answers of classifiers, against formulas in float64."""

import numpy as np
import pytest
import torch

from effnet_quant.errors import UserError
from effnet_quant.tasks.classification import CLASSIFICATION, Accuracy, Classification

CPU = torch.device("cpu")


class TwoProcesses:
    """A process whose peer has counted ``other``."""

    def __init__(self, other):
        self.other = other

    def sum(self, tensor):
        return tensor + self.other

    def gather(self, tensor):
        return [tensor, self.other]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(23, 9)).astype(np.float32) * 3


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(0, 9, 23)


def expected_figures(logits, labels, k):
    exact = logits.astype(np.float64)
    true = exact[np.arange(len(labels)), labels]
    losses = np.log(np.exp(exact).sum(1)) - true
    rank = (exact > true[:, None]).sum(1)  # how many classes score above the true one
    return {"loss": losses.mean(), "top1": 100 * (rank < 1).mean(), f"top{k}": 100 * (rank < k).mean()}


def test_accuracy_counts_each_example_once_whatever_the_batches(logits, labels):
    accuracy = Classification(topk=3).metric(CPU)
    for start, end in ((0, 10), (10, 20), (20, 23)):  # the last batch is smaller
        accuracy.add(torch.from_numpy(logits[start:end]), torch.from_numpy(labels[start:end]))
    assert accuracy.results() == pytest.approx(expected_figures(logits, labels, 3), rel=1e-6)


def test_accuracies_of_several_processes_are_those_of_all_examples(logits, labels):
    counts = []

    class Keep(TwoProcesses):
        def sum(self, tensor):
            counts.append(tensor.clone())
            return super().sum(tensor)

    theirs = Accuracy(5, CPU)
    theirs.add(torch.from_numpy(logits[16:]), torch.from_numpy(labels[16:]))
    theirs.merge(Keep(0))
    ours = Accuracy(5, CPU)
    ours.add(torch.from_numpy(logits[:16]), torch.from_numpy(labels[:16]))
    ours.merge(TwoProcesses(counts[0]))
    assert ours.results() == pytest.approx(expected_figures(logits, labels, 5), rel=1e-6)


def test_top5_of_fewer_than_five_classes_is_everything():
    accuracy = CLASSIFICATION.metric(CPU)
    accuracy.add(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    # ln(1 + 1/e) and ln(1 + e)
    assert accuracy.results() == pytest.approx({"loss": (0.3132616875 + 1.3132616875) / 2, "top1": 50.0, "top5": 100.0})


@pytest.mark.parametrize("k", [1, 2])
def test_of_equal_logits_the_first_is_the_prediction_everywhere(k):
    outputs, labels = torch.zeros(40, 100), torch.arange(40) % 4
    accuracy = Accuracy(k, CPU)
    accuracy.add(outputs, labels)
    predictions = CLASSIFICATION.predictions(outputs)
    assert predictions.tolist() == [0] * 40
    results = accuracy.results()
    assert results["top1"] == 25.0  # those of class 0
    assert results[f"top{k}"] >= 25.0


def test_a_label_of_another_data_set_is_one_sentence():
    with pytest.raises(UserError, match="tells 3 classes apart, and the data has a label 9; give data of"):
        Accuracy(5, CPU).add(torch.zeros(2, 3), torch.tensor([0, 9]))


def test_loss_is_cross_entropy_with_smoothed_labels(logits, labels):
    outputs, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    exact = logits.astype(np.float64)
    logarithms = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    smoothed = 0.9 * np.eye(9)[labels] + 0.1 / 9
    loss = Classification(label_smoothing=0.1).loss(outputs, targets, None)
    assert loss.item() == pytest.approx(-(smoothed * logarithms).sum(1).mean(), rel=1e-6)


def test_distillation_is_hintons():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator) * 3
    p = torch.softmax(teacher / 2.5, 1)
    q = torch.softmax(student / 2.5, 1)
    expected = (p * (p.log() - q.log())).sum(1).mean() * 2.5**2
    loss = CLASSIFICATION.distillation_loss(student, teacher, 2.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_mixup_blends_neighbours_and_their_labels_by_one_share():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2).clone()
    labels = torch.tensor([0, 1, 2, 0])
    blended, shares = Classification(mixup=0.4).mixed(images, labels, 3, seed=3)
    share = shares[1, 1].item()
    assert 0 < share < 1
    one_hot = np.eye(3)[[0, 1, 2, 0]]
    np.testing.assert_allclose(shares, share * one_hot + (1 - share) * one_hot[[3, 0, 1, 2]], rtol=1e-6)
    values = share * np.arange(4.0) + (1 - share) * np.array([3.0, 0, 1, 2])
    np.testing.assert_allclose(blended[:, 0, 0, 0], values, rtol=1e-5, atol=1e-6)


def test_nothing_is_mixed_unless_it_is_asked_for():
    images, labels = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    same, own = CLASSIFICATION.mixed(images, labels, 3, seed=3)
    assert same is images
    assert own is labels


def test_two_networks_agree_where_their_labels_are_the_same():
    one = CLASSIFICATION.predictions(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]))
    other = CLASSIFICATION.predictions(torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.5, 1.0]]))
    assert CLASSIFICATION.agreement(one, other).tolist() == [1.0, 0.0, 1.0]


def test_answers_name_the_likeliest_classes():
    outputs = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    first, second = CLASSIFICATION.answers(outputs, ["ant", "bee", "cat"], 2)
    e = np.exp([1.0, 3.0, 2.0])
    assert [(entry["class"], entry["index"]) for entry in first["top"]] == [("bee", 1), ("cat", 2)]
    assert [entry["probability"] for entry in first["top"]] == pytest.approx([e[1] / e.sum(), e[2] / e.sum()])
    assert CLASSIFICATION.answer_text(first) == "   66.52 %  bee\n   24.47 %  cat"
    assert second["top"][0]["class"] == "cat"
    (unnamed,) = CLASSIFICATION.answers(outputs[:1], None, 9)
    assert [entry["class"] for entry in unnamed["top"]] == ["class 1", "class 2", "class 0"]

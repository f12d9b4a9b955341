"""Classification: the task of finding the class of each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_quant.errors import UserError
from effnet_quant.tasks.task import Metric, Processes, Score, Task
from effnet_quant.terminal import printable


@dataclass(frozen=True)
class Classification(Task):
    """Outputs are logits (N, classes). Targets are labels, int64 (N,). Mixed examples have shares of the classes as targets,
    float32 (N, classes). Predictions are labels.

    Attributes:
        label_smoothing: 0 … 1, the share of a target that is spread evenly over all classes (Szegedy et al.,
            arXiv:1512.00567, section 7).
        mixup: alpha of mixup's Beta distribution; 0 for no mixup.
        cutmix: alpha of CutMix's Beta distribution; 0 for no CutMix. If both are set, a coin decides for each batch.
        topk: k of the second accuracy.
    """

    name: ClassVar[str] = "classification"
    score: ClassVar[Score] = Score("top1", "top-1", "%")
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    agreement_title: ClassVar[str] = "same class"
    error_title: ClassVar[str] = "logit error"

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    topk: int = 5

    def loss(self, outputs: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """Cross entropy, mean over the batch."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    def distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """temperature**2 * KL(teacher || student) of the softened probabilities, mean over the batch (Hinton et al.,
        arXiv:1503.02531); float32.

        The factor temperature**2 makes the size of the gradients independent of the temperature.
        """
        student = F.log_softmax(outputs.float() / temperature, dim=1)
        teacher = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

    def mixed(self, inputs: Any, targets: Any, num_classes: int, seed: int) -> tuple[Any, Any]:
        """Mixup or CutMix of images (N, C, H, W) and labels (N,). The labels become shares (N, num_classes)."""
        if not (self.mixup or self.cutmix):
            return inputs, targets
        from effnet_quant.data.mixing import mixed  # loads torchvision, which only training needs

        shares = F.one_hot(targets, num_classes).float()
        return mixed(inputs, shares, self.mixup, self.cutmix, torch.Generator().manual_seed(seed))

    def metric(self, device: torch.device) -> Accuracy:
        return Accuracy(self.topk, device)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The label of the highest logit, int64 (N,); the first of equal ones."""
        return outputs.argmax(1)

    def agreement(self, one: Tensor, other: Tensor) -> Tensor:
        """1 if the labels are equal, else 0; float64 (N,)."""
        return (one == other).double()

    def answers(self, outputs: Tensor, classes: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
        """``{"top": [{"class": name, "index": label, "probability": 0 … 1}, …]}``, the likeliest class first.

        Raises:
            UserError: a logit is no number.
        """
        if not bool(outputs.isfinite().all()):
            raise UserError("the network answers with NaN or infinity: its weights are too large; get or train others.")
        values, indices = outputs.softmax(1).topk(min(count, outputs.shape[1]))
        return [
            {
                "top": [
                    {"class": classes[index] if classes else f"class {index}", "index": index, "probability": value}
                    for value, index in zip(*row, strict=True)
                ]
            }
            for row in zip(values.tolist(), indices.tolist(), strict=True)
        ]

    def answer_text(self, answer: dict[str, Any]) -> str:
        """One line per class, with its probability in percent. Control characters in names are escaped."""
        return "\n".join(
            f"  {100 * entry['probability']:6.2f} %  {printable(entry['class'])}" for entry in answer["top"]
        )


class Accuracy(Metric):
    """Cross entropy, top-1 and top-k over a data set, summed on the device.

    Args:
        k: top-k accuracy counts an example if its label is among the k highest logits.
        device: of outputs and labels.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self._k = k
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of float32 logits (N, classes) and labels (N,).

        Raises:
            UserError: a label is none of the classes (checked on the CPU only).
        """
        classes = outputs.shape[1]
        try:
            loss = F.cross_entropy(outputs, targets)
        except IndexError as error:
            raise UserError(
                f"the network tells {classes} classes apart, and the data has a label {int(targets.max())}; give data of "
                "the network's classes."
            ) from error
        first = outputs.argmax(1) == targets
        # topk takes any of equal logits. A prediction that counts for top-1 counts for top-k too.
        top = first | (outputs.topk(min(self._k, classes), dim=1).indices == targets[:, None]).any(1)
        examples = torch.full((), len(targets), dtype=torch.float64, device=outputs.device)
        self._sums += torch.stack([loss.double() * examples, first.sum().double(), top.sum().double(), examples])

    def merge(self, processes: Processes) -> None:
        self._sums = processes.sum(self._sums)

    def results(self) -> dict[str, float]:
        """``loss``, and the accuracies ``top1`` and ``top<k>`` in percent."""
        *sums, examples = self._sums.tolist()
        loss, top1, topk = (value / max(1.0, examples) for value in sums)
        results = {"loss": loss, "top1": 100 * top1}
        results.setdefault(f"top{self._k}", 100 * topk)
        return results


CLASSIFICATION = Classification()
